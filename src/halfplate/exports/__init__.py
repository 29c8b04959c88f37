"""Exports, one file each, which write a checkpoint or an original model in the format of another tool.

To add one: write its file with a function of the type `Exporter`, and add a line to `EXPORTS`. Other packages add theirs
through an entry point of the group `halfplate.exports` (docs/extending.md).
"""

from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Protocol

from halfplate.arguments import path_text
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.registry import Registry

__all__ = ["EXPORTS", "Exporter", "export"]


class Exporter(Protocol):
    """Writes the model `source` atomically to `out`, and returns one sentence that describes the result.

    source: a Halfplate checkpoint or an original model of any source.
    overwrite: replace existing content of `out`.
    Options of its own are keyword-only arguments with defaults, which `export` passes on.
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
        "compressed-tensors": "halfplate.exports.compressed_tensors:export_compressed_tensors",
        "gptq": "halfplate.exports.gptq:export_gptq",
        "mlx": "halfplate.exports.mlx:export_mlx",
    },
    _fault,
)


@plain_defaults()
def export(
    path: str | Path, out: str | Path, format: str = "dense", overwrite: bool = False, **options: str | None
) -> str:
    """Write the checkpoint or original model `path` to `out` in the format of another tool, and return a sentence that describes it.

    - format: `dense` (a Hugging Face folder of full size), `gguf` (one file for llama.cpp), `compressed-tensors` or `gptq` (folders of codes
      for vLLM and others), `mlx` (a folder of codes for Apple's machines), or a format of another package
    - overwrite: replace existing content of `out`
    - options: those of the format, as in `halfplate export --help`; None stands for the default

    Raises HalfplateError on bad input and if `out` cannot be written.
    """
    write: Any = EXPORTS.get(format)
    known = [name for name, one in signature(write).parameters.items() if one.kind is Parameter.KEYWORD_ONLY]
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise HalfplateError(
                f"{name}={value!r} is not an option of format={format!r}, which has {', '.join(known) or 'none'}; leave it out"
            )
    described: str = write(path_text("path", path), Path(path_text("out", out)), overwrite, **given)
    return described
