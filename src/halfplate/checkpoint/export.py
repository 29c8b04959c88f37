"""Export to a dense model that transformers loads without Halfplate."""

from pathlib import Path

from halfplate.arguments import path_text
from halfplate.checkpoint.config import RECORD_FILE, other_dtype, read_record
from halfplate.checkpoint.folder import check_out, new_folder
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.checkpoint.write import write_model, write_record
from halfplate.defaults import plain_defaults


@plain_defaults()
def export_dense(path: str | Path, out: str | Path, overwrite: bool = False) -> None:
    """Multiply out every matrix of the checkpoint `path` and write a plain Hugging Face folder to `out`.

    All floating-point tensors have the `dtype` of the checkpoint's config.json; products are taken in fp32. The folder
    appears whole or not at all. Raises HalfplateError on a damaged checkpoint and where `out` cannot be written.
    """
    folder, out = Path(path_text("path", path)), Path(path_text("out", out))
    check_out(out, overwrite)
    # A dense copy carries no checksums of its own, so damage must not pass from here unseen.
    recorded = (folder / RECORD_FILE).is_file()
    inspect_checkpoint(folder, verify=recorded)
    origin = {key: read_record(folder).get(key) for key in ("model", "base_model", "license")} if recorded else {}
    dtype = other_dtype(folder)
    model = load(folder, dtype, kernels=False).dequantize(dtype=dtype)
    with new_folder(out, overwrite) as target:
        write_model(model, load_tokenizer(folder), target, dtype, quantization=None)
        write_record(target, origin | {"exported": "dense"})
