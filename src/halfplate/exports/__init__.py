"""Exports, one file each, which write a checkpoint or an original model in the format of another tool.

To add one: write its file with a function of the type `Exporter`, and add a line to `EXPORTS`. Other packages add theirs
through an entry point of the group `halfplate.exports` (docs/extending.md).
"""

from pathlib import Path
from typing import Any, Protocol

from halfplate.arguments import path_text
from halfplate.defaults import plain_defaults
from halfplate.registry import Registry

__all__ = ["EXPORTS", "Exporter", "export"]


class Exporter(Protocol):
    """Writes the model `source` atomically to `out`, and returns one sentence that describes the result.

    source: a Halfplate checkpoint or an original model of any source.
    overwrite: replace existing content of `out`.
    Raises HalfplateError for a damaged source, for a model that the format cannot hold, and if `out` cannot be written.
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
    """Write the checkpoint or original model `path` to `out` in the format of another tool, and return a sentence that describes it.

    - format: `dense` (a Hugging Face folder), `gguf` (one F16 file for llama.cpp), or a format of another package
    - overwrite: replace existing content of `out`

    Raises HalfplateError on bad input and if `out` cannot be written.
    """
    write = EXPORTS.get(format)
    return write(path_text("path", path), Path(path_text("out", out)), overwrite)
