"""A model of any source as a plain Hugging Face folder, or as a GGUF file."""

import secrets
from pathlib import Path

from halfplate.checkpoint.config import RECORD_FILE
from halfplate.checkpoint.folder import check_out, new_folder
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.checkpoint.write import write_model, write_record
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.licence import origin
from halfplate.models.sources import is_compressed, load_dense


@plain_defaults()
def convert(model: str, out: str | Path, overwrite: bool = False) -> None:
    """Write the dense `model` (a folder, a Hub id or a `.gguf` file) to the folder `out`.

    Floating-point tensors keep the element type of the source; those of a GGUF file become bf16. The folder appears whole
    or not at all. Raises HalfplateError on bad input and where `out` cannot be written.
    """
    check_out(Path(out), overwrite)
    loaded = load_dense(model)
    with new_folder(Path(out), overwrite) as target:
        write_model(loaded.model, loaded.tokenizer, target, loaded.source.other_dtype, quantization=None)
        write_record(target, {"exported": "dense", "model": model} | origin(loaded.source))


@plain_defaults()
def export_gguf(model: str | Path, out: str | Path, overwrite: bool = False) -> None:
    """Write a checkpoint, multiplied out, or a dense model of any source to the GGUF file `out`: matrices in F16, the rest in F32.

    The file appears whole or not at all. Raises HalfplateError on bad input, for what `write_gguf` refuses, and where `out`
    cannot be written.
    """
    target = Path(out)
    if target.exists() and not (overwrite and target.is_file()):
        raise HalfplateError(f"out={str(out)!r} exists; choose another name, or pass --overwrite to replace a file")
    if is_compressed(model):
        folder = Path(model)
        # The file carries no checksums of its own, so damage must not pass from here unseen.
        inspect_checkpoint(folder, verify=(folder / RECORD_FILE).is_file())
        dense, tokenizer = load(folder, kernels=False).dequantize(), load_tokenizer(folder)
    else:
        loaded = load_dense(str(model))
        dense, tokenizer = loaded.model, loaded.tokenizer
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        write_gguf(dense, tokenizer, partial)
        partial.replace(target)
    except OSError as error:
        raise HalfplateError(
            f"out={str(out)!r} could not be written ({error.strerror or error}); check that the place exists and has room"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
