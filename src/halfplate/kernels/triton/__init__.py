"""Kernels for CUDA, written in Triton: compiled when they are first run, imported when they are first asked for.

`HALFPLATE_TRITON=0` turns them off, so that everything runs on its torch path.
"""

import os
from importlib.util import find_spec

from halfplate.pattern import Pattern


def sweeps(pattern: Pattern) -> bool:
    """Whether a kernel sweeps over a core of `pattern` whose values are free; a core on a grid has none yet."""
    return os.environ.get("HALFPLATE_TRITON") != "0" and pattern == Pattern(2, 4) and find_spec("triton") is not None
