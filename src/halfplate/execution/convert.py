"""A dense model of any source as a plain Hugging Face folder."""

from pathlib import Path

from halfplate.checkpoint.folder import check_out, new_folder
from halfplate.checkpoint.write import write_model, write_record
from halfplate.models.sources import load_dense


def convert(model: str, out: str | Path, overwrite: bool = False) -> None:
    """Write the dense `model` (a folder, a Hub id or a `.gguf` file) to the folder `out`.

    Floating-point tensors keep the element type of the source; those of a GGUF file become bf16. The folder appears whole
    or not at all. Raises HalfplateError on bad input and where `out` cannot be written.
    """
    check_out(Path(out), overwrite)
    loaded = load_dense(model)
    with new_folder(Path(out), overwrite) as target:
        write_model(loaded.model, loaded.tokenizer, target, loaded.source.other_dtype, quantization=None)
        write_record(target, {"exported": "dense"})
