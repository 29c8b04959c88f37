"""The safetensors files of a model folder, checked to be complete and intact before their tensors are read."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from halfplate.errors import HalfplateError
from halfplate.models.trust import read_json_file
from halfplate.storage.shards import INDEX, SINGLE, weight_map_of
from halfplate.storage.tensor_file import CODES, DamagedFile, StoredTensor, read_header

PICKLED = ("*.bin", "*.pt", "*.pth")
# The element types of an original model; other float types are too large or too coarse.
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
SAMPLED = 4096  # bytes per tensor that are sampled to distinguish two models of equal shape


@dataclass(frozen=True)
class WeightFiles:
    """Weight files sorted by name, their total bytes, and the tensors by name."""

    paths: tuple[Path, ...]
    nbytes: int
    tensors: dict[str, StoredTensor]


def find_weight_files(name: str, folder: Path) -> WeightFiles:
    """The weight files in `folder`, with their headers read. name: of the model, as the user gave it.

    Raises HalfplateError if there are none, or if one is missing or truncated.
    """
    paths = weight_paths(name, folder)
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            found = read_header(path)
        except DamagedFile as damage:
            raise HalfplateError(f"model={name!r}: {damage}") from None
        except OSError as error:
            raise HalfplateError(
                f"model={name!r}: {path.name} cannot be read ({error.strerror or error}); check that it is there and may be read"
            ) from None
        tensors |= found
    return WeightFiles(tuple(paths), sum(path.stat().st_size for path in paths), tensors)


def usual_dtype(name: str, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The element type of most bytes among the tensors of floats; codes do not count. Raises HalfplateError if there are no floats, or if weights are of other numbers."""
    nbytes: Counter[torch.dtype] = Counter()
    for tensor, stored in tensors.items():
        if stored.kind in CODES or (stored.kind in ("U8", "I8") and tensor.endswith("weight")):
            raise HalfplateError(
                f"model={name!r} is already quantised: {tensor} in {stored.path.name} is stored as {stored.kind}, and config.json does not tell how; "
                "pass the fp32, bf16 or fp16 model it was made from"
            )
        if stored.kind in DENSE and stored.encoded is None:
            nbytes[DENSE[stored.kind]] += stored.nbytes
    if not nbytes:
        raise HalfplateError(f"model={name!r}: its files hold no fp32, bf16 or fp16 tensor; download the model again")
    return nbytes.most_common(1)[0][0]


def weight_paths(name: str, folder: Path) -> list[Path]:
    """The weight files in `folder`, unread; raises HalfplateError if there are none or if one is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(name, folder)
    raise HalfplateError(_no_weights(name, folder))


def sampled_sha256(paths: Iterable[Path], tensors: Iterable[StoredTensor] = ()) -> str:
    """SHA-256 of the first and last bytes of files and of bytes from the middle of each tensor; it distinguishes trained models at the cost of reading headers."""
    digest = hashlib.sha256()

    def add(path: Path, start: int) -> None:
        with path.open("rb") as file:
            file.seek(max(0, start))
            digest.update(file.read(SAMPLED))

    for path in paths:
        add(path, 0)
        add(path, path.stat().st_size - SAMPLED)
    for tensor in tensors:
        parts = [tensor] if tensor.encoded is None else [part for _, part in tensor.encoded.parts]
        for part in parts:
            add(part.path, part.start + max(0, part.nbytes - SAMPLED) // 2)
    return digest.hexdigest()


def _shards(name: str, folder: Path) -> list[Path]:
    try:
        files = sorted(set(weight_map_of(read_json_file(folder / INDEX)).values()))
        missing = [file for file in files if not (folder / file).is_file()]
    except (OSError, ValueError) as error:
        raise HalfplateError(f"model={name!r}: {INDEX} cannot be read ({error!r}); download it again") from None
    if missing:
        raise HalfplateError(
            f"model={name!r} lacks {len(missing)} of its {len(files)} weight files ({missing[0]}); download the model again"
        )
    return [folder / file for file in files]


def _no_weights(name: str, folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"model={name!r} has only pickled weights ({pickled[0]}), which are never loaded because a pickle can run code; "
            "convert them to safetensors with save_pretrained in a place you trust"
        )
    return f"model={name!r} has no weights that can be read; expected {SINGLE} or {INDEX} beside config.json"
