"""The inputs of a layer's linears in the original model, kept in files until all statistics of the layer are collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.storage.artifact import load_artifact, remove_artifact, save_artifact
from halfplate.storage.tensor_file import read_tensor


@dataclass(frozen=True)
class RecordedInputs:
    """One artifact for each batch, with a tensor for each linear: its input, fp32 (samples, L, d_in) in most models.

    path: prefix of the file names.
    batches: number of batches.
    """

    path: Path
    batches: int

    def write(self, number: int, inputs: Mapping[str, Tensor]) -> None:
        """Write batch `number`; any number of processes may write batches of their own."""
        save_artifact(self._file(number), {name: x.detach().cpu() for name, x in inputs.items()}, {}, durable=False)

    def read(self, number: int, name: str) -> Tensor:
        """The input of the linear `name` in batch `number`; raises HalfplateError if it is not there."""
        artifact = load_artifact(self._file(number))
        if artifact is None or name not in artifact.tensors:
            raise HalfplateError(
                f"{name} has no recorded input in {str(self._file(number))!r}: the file is damaged or cannot be read by this machine; "
                "put OUT on storage that all machines share, and use --resume"
            )
        return read_tensor(artifact.tensors[name])

    def remove(self) -> None:
        for number in range(self.batches):
            remove_artifact(self._file(number))

    def _file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}.safetensors")


@dataclass(frozen=True)
class InputsOfOne(Sequence[Tensor]):
    """The inputs of the linear `name` in some batches, read on demand."""

    inputs: RecordedInputs
    name: str
    device: str
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.inputs.read(self.numbers[index], self.name).to(self.device)
