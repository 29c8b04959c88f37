"""CUDA kernels in Triton, imported on demand and compiled when they first run.

`HALFPLATE_TRITON=0` turns them off, so that the torch path runs.
"""

import os
from importlib.util import find_spec

from halfplate.pattern import Pattern


def sweeps(pattern: Pattern) -> bool:
    """Whether there is a sweep kernel for a core of `pattern` with floating-point values; there is none for quantised cores yet."""
    return os.environ.get("HALFPLATE_TRITON") != "0" and pattern == Pattern(2, 4) and find_spec("triton") is not None
