"""Hidden states of the calibration tokens between two layers, kept in files to save memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from halfplate.calibration.collect import CHUNKS
from halfplate.compression.token_arguments import TokenArguments
from halfplate.models.blockwise import BlockInputs
from halfplate.models.handover import BlockArguments, Carried
from halfplate.storage.tensor_file import KINDS, NAMES

# Arguments of one layer by the number of samples in a batch. Those of other tokens differ only in TokenArguments.
Arguments = dict[int, BlockArguments]
HIDDEN = "hidden"


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states in batches. Each batch is a file with a checksum file, so any process may write it.

    There is one file per batch because, on some network storage, machines that write to the same file see old bytes of each other.

    path: prefix of the file names.
    shape: (samples, L, d), in fp32; if a batch has another shape, or layers pass on more tensors, the checksum file lists the
        tensors of the batch.
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
        """The number of samples in batch `number`."""
        return min(self.batch, self.shape[0] - number * self.batch)

    def read(self, number: int) -> Tensor:
        """The hidden state of batch `number`, (samples, L, d) in most models."""
        return self.load(number)[0]

    def load(self, number: int) -> tuple[Tensor, Carried]:
        """Batch `number`: the hidden state, and the other tensors that layers pass on."""
        tensors = {
            name: torch.empty(shape, dtype=KINDS[kind], device="cpu") for name, kind, shape in self._entries(number)
        }
        path = self.file(number)
        with path.open("rb", buffering=0) as file:
            for tensor in tensors.values():
                data, done = _bytes(tensor), 0
                while done < len(data):
                    got = file.readinto(data[done:])
                    if not got:
                        raise OSError(f"{path} ends early")
                    done += got
        return tensors.pop(HIDDEN), tensors

    def write(self, number: int, hidden: Tensor, carried: Carried | None = None) -> None:
        """Write batch `number`; any number of processes may write batches of their own."""
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in {HIDDEN: hidden, **(carried or {})}.items()
        }
        entries = [(name, NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()]
        path, digest = self.file(number), hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            for tensor in tensors.values():
                data, done = _bytes(tensor), 0
                digest.update(data)
                while done < len(data):
                    done += file.write(data[done:])
        plain = len(entries) == 1 and entries[0][1:] == ("F32", [self.samples(number), *self.shape[1:]])
        self._check_file(number).write_text(digest.hexdigest() + ("" if plain else f"\n{json.dumps(entries)}"))

    def _entries(self, number: int) -> list[tuple[str, str, list[int]]]:
        """Name, element type and shape of each tensor of a batch, the hidden state first."""
        _, _, entries = self._check_file(number).read_text().partition("\n")
        plain = [(HIDDEN, "F32", [self.samples(number), *self.shape[1:]])]
        return json.loads(entries) if entries else plain

    def whole(self) -> bool:
        """Whether every batch exists and matches its checksum."""
        try:
            return all(self._whole(number) for number in range(self.batches))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _whole(self, number: int) -> bool:
        digest = hashlib.sha256()
        hidden, carried = self.load(number)
        for tensor in (hidden, *carried.values()):
            digest.update(_bytes(tensor))
        return self._check_file(number).read_text().partition("\n")[0] == digest.hexdigest()

    def remove(self) -> None:
        for number in range(self.batches):
            self._check_file(number).unlink(missing_ok=True)
            self.file(number).unlink(missing_ok=True)

    def file(self, number: int) -> Path:
        """The file of batch `number`."""
        return self.path.with_name(f"{self.path.name}.{number}")

    def _check_file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}.sha256")


@dataclass(frozen=True)
class Batches(Sequence[BlockInputs]):
    """Some batches of hidden states as inputs of one layer, read on demand. own: arguments that depend on the tokens."""

    hidden: HiddenStates
    arguments: Arguments
    layer: int
    device: str = "cpu"
    numbers: tuple[int, ...] | None = None
    own: TokenArguments | None = None

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
        hidden, carried = self.hidden.load(number)
        samples = self.hidden.samples(number)
        arguments = self.arguments[samples]
        if self.own is not None:
            arguments = self.own.put_into(arguments, number, self.layer)
        # The arguments are looked up by layer index.
        return BlockInputs(
            hidden.to(self.device),
            {self.layer: arguments},
            {name: tensor.to(self.device) for name, tensor in carried.items()},
            (samples, self.hidden.shape[1]),
        )


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)
