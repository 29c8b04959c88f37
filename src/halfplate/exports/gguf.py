"""Export to a GGUF file for llama.cpp: matrices in F16, the rest in F32."""

from pathlib import Path
from typing import Any

from halfplate.checkpoint.config import RECORD_FILE
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.errors import HalfplateError
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import is_compressed, load_dense
from halfplate.storage.atomic import whole_file


def export_gguf(source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint, multiplied out, or an original model of any source as one file (see `halfplate.exports.Exporter`).

    Also raises HalfplateError for models that llama.cpp cannot compute.
    """
    if out.suffix != ".gguf":
        raise HalfplateError(f"out={str(out)!r} is not a .gguf file; name one, e.g. model.gguf")
    if out.exists() and not (overwrite and out.is_file()):
        raise HalfplateError(f"out={str(out)!r} exists; choose another name, or pass --overwrite to replace a file")
    dense, tokenizer = _dense_model(source)
    try:
        with whole_file(out) as partial:
            write_gguf(dense, tokenizer, partial)
    except OSError as error:
        raise HalfplateError(
            f"out={str(out)!r} could not be written ({error.strerror or error}); check that the folder exists and the disk has free space"
        ) from error
    return f"{out}: {source} in F16 for llama.cpp"


def _dense_model(source: str) -> tuple[Any, Any]:
    """The full-size model and its tokenizer."""
    if not is_compressed(source):
        loaded = load_dense(source)
        return loaded.model, loaded.tokenizer
    folder = Path(source)
    # The file has no checksums, so damage must be found here.
    inspect_checkpoint(folder, verify=(folder / RECORD_FILE).is_file())
    return load(folder, kernels=False).dequantize(), load_tokenizer(folder)
