"""The safetensors files of a checkpoint: finding, checking, writing and hashing them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from halfplate.checkpoint.config import read_json
from halfplate.checkpoint.stack import ordered
from halfplate.errors import HalfplateError
from halfplate.formats.parts.core import INDEX as POSITIONS
from halfplate.formats.spec import WeightSpec
from halfplate.storage.shards import INDEX, SINGLE, weight_map_of, write_shards
from halfplate.storage.tensor_file import KINDS, DamagedFile, StoredTensor, TensorFileWriter, read_header, sha256_of

CURE = "copy or write the checkpoint again"


def read_headers(folder: Path, whole: bool = True) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers of its files; no data is read.

    whole: False allows files whose end is missing.
    Raises HalfplateError if files are missing, truncated or damaged, or if an index does not match them.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return headers_of([folder / SINGLE], whole)
    try:
        weight_map = weight_map_of(read_json(index))
    except ValueError as error:
        raise HalfplateError(f"{str(index)!r}: {error}; {CURE}") from None
    found = headers_of([folder / name for name in sorted(set(weight_map.values()))], whole)
    for tensor in sorted(found.keys() | weight_map.keys()):
        if tensor not in found:
            raise HalfplateError(f"{tensor} is not in {weight_map[tensor]}, as {str(index)!r} says; {CURE}")
        if weight_map.get(tensor) != found[tensor].path.name:
            raise HalfplateError(
                f"{tensor} is in {found[tensor].path.name}, but {str(index)!r} does not list it there; {CURE}"
            )
    return found


def headers_of(files: Iterable[Path], whole: bool = True) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files by name; raises HalfplateError naming a file that is damaged."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            if not file.is_file():
                raise HalfplateError(f"the weight file {str(file)!r} does not exist; {CURE}")
            tensors = read_header(file, whole)
        except (DamagedFile, OSError) as error:
            reason = getattr(error, "reason", error)
            raise HalfplateError(f"the weight file {str(file)!r} is damaged or cut short: {reason}; {CURE}") from None
        for name, tensor in tensors.items():
            if name in found:
                raise HalfplateError(
                    f"{name} is both in {found[name].path.name} and in {file.name}; write the checkpoint again"
                )
            if tensor.kind not in KINDS:
                raise HalfplateError(
                    f"{name} in {str(file)!r} has the element type {tensor.kind}, expected one of {', '.join(KINDS)}"
                )
        found |= tensors
    return found


def check_layout(found: Mapping[str, StoredTensor], specs: Mapping[str, WeightSpec]) -> None:
    """Raise HalfplateError unless every compressed module has exactly the tensors, shapes and types of its layout.

    A bias is allowed; only the model knows whether it must exist.
    """
    below: dict[str, dict[str, StoredTensor]] = {name: {} for name in specs}
    for full, tensor in found.items():
        module, _, name = full.rpartition(".")
        if module in below:
            below[module][name] = tensor
        elif name == POSITIONS:
            raise HalfplateError(
                f"{full} belongs to a compressed matrix that quantization_config.modules does not name; copy or write the checkpoint again"
            )
    for module, spec in specs.items():
        layout, stored = spec.layout(), below[module]
        for name, (shape, dtype) in layout.items():
            if name not in stored:
                raise HalfplateError(
                    f"{module}.{name} is missing, expected {_words(shape, dtype)}; copy or write the checkpoint again"
                )
            if (stored[name].shape, stored[name].dtype) != (shape, dtype):
                raise HalfplateError(
                    f"{module}.{name} in {stored[name].path.name} is {_words(stored[name].shape, stored[name].dtype)}, expected {_words(shape, dtype)} "
                    "from config.json; copy or write the checkpoint again"
                )
        if "bias" in stored and stored["bias"].shape != (spec.d_out,):
            raise HalfplateError(
                f"{module}.bias has the shape {stored['bias'].shape}, expected ({spec.d_out},); copy or write the checkpoint again"
            )
        for name in stored.keys() - layout.keys() - {"bias"}:
            raise HalfplateError(
                f"{module}.{name} in {stored[name].path.name} does not belong to a {spec.format} matrix; write the checkpoint again"
            )


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def read_back(folder: Path, checksums: Mapping[str, str]) -> None:
    """Raise HalfplateError unless the files in `folder` hold the tensors with these checksums."""
    found = read_headers(folder)
    for name, checksum in checksums.items():
        if name not in found or sha256_of(found[name]) != checksum:
            raise HalfplateError(
                f"out={str(folder)!r}: read back, {name} differs from the model; the disk or memory may be faulty, write it again or report this"
            )


def write_tensors(
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    folder: Path,
    max_shard_nbytes: int,
    stack: Sequence[str] = (),
) -> dict[str, str]:
    """Write tensors, each cast to its type in `dtypes`, to the files of a checkpoint; returns the SHA-256 of each.

    stack: as in `halfplate.checkpoint.assemble`.
    A file exceeds `max_shard_nbytes` only if a single tensor does. Raises HalfplateError for a value that is not finite.
    """

    def write(file: TensorFileWriter, name: str) -> str:
        stored = tensors[name].detach().to("cpu", dtypes[name])
        if stored.is_floating_point() and not bool(stored.isfinite().all()):
            raise HalfplateError(
                f"{name} holds values that are not finite in {dtypes[name]}; choose a wider type or another method"
            )
        return file.write(name, stored)

    entries = {name: (dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_shards(ordered(entries, stack), folder, max_shard_nbytes, write, bool(stack))
