"""Export to a full-size Hugging Face folder, which transformers loads without Halfplate."""

from pathlib import Path

from halfplate.checkpoint.config import RECORD_FILE, other_dtype, read_record
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.output import check_result_folder
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.checkpoint.write import write_model, write_record
from halfplate.models.licence import origin
from halfplate.models.sources import is_compressed, load_dense


def export_dense(source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint, multiplied out, or an original model of any source as a folder (see `halfplate.exports.Exporter`).

    Floating-point tensors keep the element type of the source; those of a GGUF file become bf16. Products are computed in fp32.
    """
    check_result_folder(out, overwrite, Path(source))
    write = _multiplied_out if is_compressed(source) else _converted
    write(source, out, overwrite)
    return f"{out}: a dense copy of {source}"


def _multiplied_out(source: str, out: Path, overwrite: bool) -> None:
    folder = Path(source)
    # The copy has no checksums, so damage must be found here.
    recorded = (folder / RECORD_FILE).is_file()
    inspect_checkpoint(folder, verify=recorded)
    known = {key: read_record(folder).get(key) for key in ("model", "base_model", "license")} if recorded else {}
    dtype = other_dtype(folder)
    model = load(folder, dtype, kernels=False).dequantize(dtype=dtype)
    with new_folder(out, overwrite) as target:
        write_model(model, load_tokenizer(folder), target, dtype, quantization=None, beside=folder)
        write_record(target, known | {"exported": "dense"})


def _converted(source: str, out: Path, overwrite: bool) -> None:
    loaded = load_dense(source)
    with new_folder(out, overwrite) as target:
        write_model(
            loaded.model,
            loaded.tokenizer,
            target,
            loaded.source.other_dtype,
            quantization=None,
            beside=loaded.source.path,
        )
        write_record(target, {"exported": "dense", "model": source} | origin(loaded.source))
