"""Assembling a checkpoint from the artifacts of a compression, without holding it in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfplate.checkpoint.stack import ordered
from halfplate.errors import HalfplateError
from halfplate.storage.shards import MAX_SHARD_NBYTES, write_shards
from halfplate.storage.tensor_file import StoredTensor, TensorFileWriter


@dataclass(frozen=True)
class Finished:
    """A tensor of the checkpoint with its location, and the SHA-256 that its bytes must have."""

    stored: StoredTensor
    sha256: str


def assemble(
    tensors: Mapping[str, Finished],
    folder: Path,
    progress: Callable[[int, int], None],
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    stack: Sequence[str] = (),
) -> dict[str, str]:
    """Copy `tensors`, in order, to the safetensors files of a checkpoint; returns the SHA-256 of each.

    stack: those that lie behind all others in this order (halfplate.checkpoint.stack).

    Without a stack, the files equal those that `write_tensors` writes for the same tensors. Raises HalfplateError if a checksum does not match.
    """
    done = 0

    def copy(file: TensorFileWriter, name: str) -> str:
        nonlocal done
        sha256 = file.copy(name, tensors[name].stored)
        if sha256 != tensors[name].sha256:
            raise HalfplateError(
                f"{name} in {str(tensors[name].stored.path)!r} is damaged: its checksum does not match; run the same "
                "command again with --resume to compute it again"
            )
        done += 1
        progress(done, len(tensors))
        return sha256

    entries = {name: (tensor.stored.dtype, tensor.stored.shape) for name, tensor in tensors.items()}
    return write_shards(ordered(entries, stack), folder, max_shard_nbytes, copy, bool(stack))
