"""Export to a full-size Hugging Face folder, which transformers loads without Halfplate."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from halfplate.checkpoint.config import CONFIG_FILE, RECORD_FILE, other_dtype, read_record
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.output import check_result_folder
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.checkpoint.weights import read_back
from halfplate.checkpoint.write import write_model, write_record
from halfplate.errors import HalfplateError
from halfplate.models.configuration import QUANTISED_ENTRIES, read_entries
from halfplate.models.licence import origin
from halfplate.models.sources import Source, is_compressed, load_dense, open_source
from halfplate.storage.shards import MAX_SHARD_NBYTES, Entry, write_shards
from halfplate.storage.tensor_file import NAMES, TensorFileWriter, read_tensor

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

    Models that another tool quantised are decoded, tensor by tensor. Floating-point tensors keep the element type of the source; those of a
    GGUF file become bf16. Products are computed in fp32.
    """
    check_result_folder(out, overwrite, Path(source))
    if is_compressed(source):
        _multiplied_out(source, out, overwrite)
    elif (opened := open_source(source)).quantised is not None:
        return _decoded(opened, out, overwrite)
    else:
        _converted(opened, out, overwrite)
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


def _converted(source: Source, out: Path, overwrite: bool) -> None:
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
        write_record(target, {"exported": "dense", "model": source.name} | origin(source))


def _decoded(source: Source, out: Path, overwrite: bool) -> str:
    """Write a model of codes in floats, one tensor at a time, and all else as it is."""
    folder, dtype = source.path, source.other_dtype
    codes = [name for name, stored in source.tensors.items() if stored.encoded is not None]
    tensors = source.tensors | {name: replace(source.tensors[name], kind=NAMES[dtype]) for name in codes}
    entries: dict[str, Entry] = {name: (stored.dtype, stored.shape) for name, stored in tensors.items()}

    def write(file: TensorFileWriter, name: str) -> str:
        if tensors[name].encoded is None:
            return file.copy(name, tensors[name])
        values = read_tensor(tensors[name])
        if not bool(values.isfinite().all()):
            raise HalfplateError(
                f"model={source.name!r}: {name} holds values that are not finite in {dtype}; download the model again"
            )
        return file.write(name, values)

    with new_folder(out, overwrite) as target:
        read_back(target, write_shards(dict(sorted(entries.items())), target, MAX_SHARD_NBYTES, write))
        kept = {key: value for key, value in read_entries(source.name, folder).items() if key not in QUANTISED_ENTRIES}
        (target / CONFIG_FILE).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name != CONFIG_FILE and any(fnmatch(file.name, one) for one in CARRIED):
                shutil.copyfile(file, target / file.name)
        write_record(target, {"exported": "dense", "model": source.name} | origin(source))
    named = str(dtype).removeprefix("torch.")
    return f"{out}: {source.name} in floats, {len(codes)} matrices of {source.quantised} decoded and rounded to {named}; what quantising lost stays lost"
