"""Hidden states of the calibration tokens between two blocks, kept in files so that they take no memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from halfplate.calibration.collect import CHUNKS
from halfplate.models.blockwise import BlockArguments, BlockInputs

# Arguments of one block by the number of samples in a batch; on them and the length alone do they depend.
Arguments = dict[int, BlockArguments]


@dataclass(frozen=True)
class HiddenStates:
    """fp32 (samples, L, d) in batches, each in a file of its own with its checksum beside it, so that any process may write it.

    path: the files are named after it. Machines that write parts of one file see old bytes of each other on some network storage.
    """

    path: Path
    shape: tuple[int, int, int]
    batch: int

    @property
    def batches(self) -> int:
        return -(-self.shape[0] // self.batch)

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of all batches in order, in at most CHUNKS runs of nearly equal length."""
        count = min(CHUNKS, self.batches)
        ends = [self.batches * chunk // count for chunk in range(count + 1)]
        return tuple(tuple(range(start, end)) for start, end in pairwise(ends))

    def samples(self, number: int) -> int:
        """How many samples batch `number` has."""
        return min(self.batch, self.shape[0] - number * self.batch)

    def read(self, number: int) -> Tensor:
        """Batch `number`, (samples, L, d)."""
        tensor = torch.empty(self.samples(number), *self.shape[1:], dtype=torch.float32, device="cpu")
        if not tensor.numel():
            return tensor
        data, path = _bytes(tensor), self.file(number)
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < len(data):
                got = file.readinto(data[done:])
                if not got:
                    raise OSError(f"{path} ends early")
                done += got
        return tensor

    def write(self, number: int, hidden: Tensor) -> None:
        """Write batch `number`; any number of processes may write batches of their own."""
        data, path = _bytes(hidden.detach().cpu().contiguous()), self.file(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        self._check_file(number).write_text(hashlib.sha256(data).hexdigest())

    def whole(self) -> bool:
        """Whether every batch is there and has its checksum."""
        try:
            return all(
                self._check_file(number).read_text() == hashlib.sha256(_bytes(self.read(number))).hexdigest()
                for number in range(self.batches)
            )
        except OSError:
            return False

    def remove(self) -> None:
        for number in range(self.batches):
            self._check_file(number).unlink(missing_ok=True)
            self.file(number).unlink(missing_ok=True)

    def file(self, number: int) -> Path:
        """Where batch `number` lies."""
        return self.path.with_name(f"{self.path.name}.{number}")

    def _check_file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}.sha256")


@dataclass(frozen=True)
class Batches(Sequence[BlockInputs]):
    """Some batches of hidden states as inputs of one block, read when they are asked for."""

    hidden: HiddenStates
    arguments: Arguments
    block: int
    device: str = "cpu"
    numbers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def _chosen(self) -> tuple[int, ...]:
        return tuple(range(self.hidden.batches)) if self.numbers is None else self.numbers

    @overload
    def __getitem__(self, index: int) -> BlockInputs: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockInputs]: ...
    def __getitem__(self, index: int | slice) -> BlockInputs | list[BlockInputs]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = self._chosen[index]
        hidden = self.hidden.read(number).to(self.device)
        # Blocks find their arguments by their index.
        arguments = {self.block: self.arguments[self.hidden.samples(number)]}
        return BlockInputs(hidden, arguments)


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)
