"""Writing a checkpoint from the parts of an unfinished compression, without ever holding it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from halfplate.checkpoint.weights import INDEX_FILE, MAX_SHARD_NBYTES, SINGLE_FILE
from halfplate.errors import HalfplateError
from halfplate.tensor_file import KINDS, StoredTensor, TensorFileWriter


@dataclass(frozen=True)
class Finished:
    """A tensor as it will stand in the checkpoint, and the SHA-256 that its bytes must have."""

    stored: StoredTensor
    sha256: str

    @property
    def entry(self) -> tuple[torch.dtype, tuple[int, ...]]:
        return KINDS[self.stored.kind], self.stored.shape


def assemble(
    tensors: Mapping[str, Finished],
    folder: Path,
    progress: Callable[[int, int], None],
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
) -> dict[str, str]:
    """Copy `tensors`, in their order, to the safetensors files of a checkpoint; returns the SHA-256 of each.

    The files are those that `write_tensors` makes of the same tensors. Raises HalfplateError where bytes are not those that
    were finished.
    """
    shards: list[list[str]] = [[]]
    nbytes = total = 0
    for name, tensor in tensors.items():
        size = tensor.stored.nbytes
        if shards[-1] and nbytes + size > max_shard_nbytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(name)
        nbytes, total = nbytes + size, total + size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with TensorFileWriter(folder / file, {name: tensors[name].entry for name in names}) as writer:
            for name in names:
                if writer.copy(name, tensors[name].stored) != tensors[name].sha256:
                    raise HalfplateError(
                        f"{name} in {str(tensors[name].stored.path)!r} is damaged: it has not the bytes that were written; run the same "
                        "command again with --resume, which computes that part anew"
                    )
                weight_map[name] = file
                progress(len(weight_map), len(tensors))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {name: tensors[name].sha256 for name in tensors}
