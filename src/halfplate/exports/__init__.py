"""Exports, one file each: a checkpoint or an original model as the files of other tools.

To add one: write its file with a function of the type `Exporter`, and add a line to `EXPORTS`. Other packages add theirs
by an entry point of the group `halfplate.exports` (docs/extending.md).
"""

from pathlib import Path
from typing import Any, Protocol

from halfplate.arguments import path_text
from halfplate.defaults import plain_defaults
from halfplate.registry import Registry

__all__ = ["EXPORTS", "Exporter", "export"]


class Exporter(Protocol):
    """Writes the model `source` to `out`, whole or not at all, and returns one sentence on what was written.

    source: a Halfplate checkpoint or an original model of any source. overwrite: replace what `out` holds. Raises HalfplateError
    for a damaged source, for what the format cannot hold, and if `out` cannot be written.
    """

    def __call__(self, source: str, out: Path, overwrite: bool) -> str: ...


def _fault(found: Any, name: str) -> str | None:
    return None if callable(found) else f"is a {type(found).__name__}, expected a function"


EXPORTS: Registry[Exporter] = Registry(
    "format",
    "halfplate.exports",
    {
        "dense": "halfplate.exports.dense:export_dense",
        "gguf": "halfplate.exports.gguf:export_gguf",
    },
    _fault,
)


@plain_defaults()
def export(path: str | Path, out: str | Path, format: str = "dense", overwrite: bool = False) -> str:
    """Write the checkpoint or dense model `path` to `out` in a format of another tool, and return a sentence on it.

    format: `dense` (a Hugging Face folder), `gguf` (one F16 file for llama.cpp), or one that another package adds.
    overwrite: replace what `out` holds. Raises HalfplateError on bad input and if `out` cannot be written.
    """
    write = EXPORTS.get(format)
    return write(path_text("path", path), Path(path_text("out", out)), overwrite)
