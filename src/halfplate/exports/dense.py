"""Export to a full-size Hugging Face folder, which transformers loads without Halfplate."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from halfplate.checkpoint.config import CONFIG_FILE, RECORD_FILE, other_dtype, read_record
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.output import check_result_folder
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.checkpoint.weights import read_back
from halfplate.checkpoint.write import write_model, write_record
from halfplate.errors import HalfplateError
from halfplate.models.licence import origin
from halfplate.models.quantised_folders import QuantisedFolder, open_quantised
from halfplate.models.sources import is_compressed, load_dense
from halfplate.storage.shards import MAX_SHARD_NBYTES, Entry, write_shards
from halfplate.storage.tensor_file import TensorFileWriter

QUANTISED_ENTRIES = ("quantization_config", "compression_config")
# The files of a model beside its weights that a copy needs.
CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*_tokens*.json",
    "*.model",
    "chat_template*",
)


def export_dense(source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint, multiplied out, or an original model of any source as a folder (see `halfplate.exports.Exporter`).

    Models in the formats of GPTQ, AWQ, compressed-tensors and FP8 in blocks are dequantised, matrix by matrix. Floating-point tensors keep the element type of the source; those of a GGUF file become bf16. Products are computed in fp32.
    """
    check_result_folder(out, overwrite, Path(source))
    if not is_compressed(source) and (quantised := open_quantised(source)) is not None:
        return _dequantised(quantised, source, out, overwrite)
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
        checksums = write_model(model, load_tokenizer(folder), target, dtype, quantization=None, beside=folder)
        read_back(target, checksums)
        write_record(target, known | {"exported": "dense"})


def _converted(source: str, out: Path, overwrite: bool) -> None:
    loaded = load_dense(source)
    with new_folder(out, overwrite) as target:
        checksums = write_model(
            loaded.model,
            loaded.tokenizer,
            target,
            loaded.source.other_dtype,
            quantization=None,
            beside=loaded.source.path,
        )
        read_back(target, checksums)
        write_record(target, {"exported": "dense", "model": source} | origin(loaded.source))


def _dequantised(quantised: QuantisedFolder, source: str, out: Path, overwrite: bool) -> str:
    """Write the matrices of a quantised model in floats, one at a time, and all else as it is."""
    folder, dtype = Path(source), quantised.dtype
    entries: dict[str, Entry] = {name: (stored.dtype, stored.shape) for name, stored in quantised.others.items()}
    entries |= {name: (dtype, matrix.shape) for name, matrix in quantised.matrices.items()}

    def write(file: TensorFileWriter, name: str) -> str:
        if name in quantised.others:
            return file.copy(name, quantised.others[name])
        values = quantised.matrices[name].values().to(dtype)
        if not bool(values.isfinite().all()):
            raise HalfplateError(
                f"model={source!r}: {name} holds values that are not finite in {dtype}; download the model again"
            )
        return file.write(name, values)

    with new_folder(out, overwrite) as target:
        read_back(target, write_shards(dict(sorted(entries.items())), target, MAX_SHARD_NBYTES, write))
        kept = {key: value for key, value in quantised.entries.items() if key not in QUANTISED_ENTRIES}
        (target / CONFIG_FILE).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name != CONFIG_FILE and any(fnmatch(file.name, one) for one in CARRIED):
                shutil.copyfile(file, target / file.name)
        write_record(target, {"exported": "dense", "model": source})
    named = str(dtype).removeprefix("torch.")
    return f"{out}: {source} in floats, {len(quantised.matrices)} matrices of {quantised.method} dequantised and rounded to {named}; what quantising lost stays lost"
