"""The safetensors files of a model folder, checked to be all there and whole before anything reads their tensors."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfplate.errors import HalfplateError
from halfplate.models.trust import read_json_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
# Element types of safetensors that a dense model is stored in; whatever else is a float is too fine or too coarse.
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
LONGEST_HEADER = 100_000_000  # the limit that the safetensors library sets itself


@dataclass(frozen=True)
class WeightFiles:
    """Files in the order of their names, their bytes together, and the element type that most bytes are stored in."""

    paths: tuple[Path, ...]
    nbytes: int
    dtype: torch.dtype


def find_weight_files(name: str, folder: Path) -> WeightFiles:
    """The weight files in the `folder` of the model that the user named `name`, with their headers read.

    Raises HalfplateError when there are none, one is missing or cut short, or the weights are not plain floats.
    """
    if (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        paths = _shards(name, folder)
    else:
        raise HalfplateError(_no_weights(name, folder))
    nbytes: Counter[torch.dtype] = Counter()
    for path in paths:
        for tensor, kind, size in _tensors(name, path):
            if kind.startswith("F8") or (kind in ("U8", "I8") and tensor.endswith("weight")):
                raise HalfplateError(
                    f"model={name!r} is already quantised: {tensor} in {path.name} is stored as {kind}; "
                    "pass the fp32, bf16 or fp16 model it was made from"
                )
            if kind in DENSE:
                nbytes[DENSE[kind]] += size
    if not nbytes:
        raise HalfplateError(
            f"model={name!r}: {paths[0].name} holds no fp32, bf16 or fp16 tensor; download the model again"
        )
    return WeightFiles(tuple(paths), sum(path.stat().st_size for path in paths), nbytes.most_common(1)[0][0])


def _shards(name: str, folder: Path) -> list[Path]:
    try:
        files = sorted(set(read_json_file(folder / INDEX)["weight_map"].values()))
        # A name with a folder in it would lead out of the model.
        if not files or any(Path(file).name != file or "\\" in file or "\0" in file for file in files):
            raise ValueError("weight_map must name files of the same folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HalfplateError(f"model={name!r}: {INDEX} cannot be read ({error!r}); download it again") from None
    missing = [file for file in files if not (folder / file).is_file()]
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


def _tensors(name: str, path: Path) -> Iterator[tuple[str, str, int]]:
    """Name, element type and bytes of each tensor of a safetensors file, after checking that the file holds them all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise HalfplateError(
                f"model={name!r}: {path.name} is cut short or damaged: it has {size} bytes, its header alone {length}; download it again"
            )
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        spans = [(key, str(entry["dtype"]), [int(at) for at in entry["data_offsets"]]) for key, entry in header.items()]
        for key, _, (start, end) in spans:
            if not 0 <= start <= end or not all(type(d) is int and d >= 0 for d in header[key]["shape"]):
                raise ValueError(f"{key[:80]!r} has no place in it")
        needed = 8 + length + max((end for *_, (_, end) in spans), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise HalfplateError(
            f"model={name!r}: the header of {path.name} is damaged ({error!r}); download it again"
        ) from None
    if size < needed:
        raise HalfplateError(
            f"model={name!r}: {path.name} is cut short: it has {size} bytes, its header names {needed}; download it again"
        )
    for key, kind, (start, end) in spans:
        yield key, kind, end - start
