"""The interface of transforms, which turn a model into an equivalent or smaller one, layer by layer, before compression."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from halfplate.models.linears import find_blocks
from halfplate.models.sources import Source, skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Piece:
    """The unit that is made and kept at once: the tensors of one layer of the result, or all tensors outside the layers (index None).

    entries: element type and shape of each tensor, by its name in the model; floats are fp32.
    """

    index: int | None
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self.entries.values()))


# Yields every tensor of a piece with its name, in any order, one at a time.
Maker = Callable[[Piece], Iterator[tuple[str, Tensor]]]


class Transform(ABC):
    """Turns a model into an equivalent or smaller one.

    Halfplate writes each piece to a file with checksums, keeps finished pieces if the run is interrupted, and makes no piece twice. So a
    piece must be the same in every process, whatever was made before it. `refusal`, `configuration` and `held_nbytes` are called while
    planning, before earlier transforms have made their tensors. They may only use the configuration, and names and shapes
    (`halfplate.models.sources.skeleton`).

    name: its name in the registry.
    version: increased whenever the result changes.
    summary: one sentence.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]

    @abstractmethod
    def refusal(self, source: Source) -> str | None:
        """Why this transform does not support the model, as a clause; None if it does."""

    def configuration(self, source: Source) -> PretrainedConfig:
        """The configuration of the result: a changed copy, or that of the source."""
        return source.config

    def held_nbytes(self, source: Source) -> int:
        """Peak bytes in addition to the process itself; by default, twice the largest layer or outer tensor in fp32."""
        result = outline(self, source)
        sides = [source] if result.config is source.config else [source, result]
        return 2 * max(_largest(pieces_of(skeleton(side))) for side in sides)

    @abstractmethod
    def open(self, source: Source) -> Maker:
        """A function that makes the pieces of the result; `halfplate.models.streamed.StreamedModel(source)` reads the tensors of the source."""

    @property
    def label(self) -> str:
        """Its name in recipes, fingerprints and reports."""
        return f"{self.name}@{self.version}"


def outline(transform: Transform, source: Source) -> Source:
    """The result as far as it is known without its tensors; planning uses it."""
    return replace(source, config=transform.configuration(source), tensors={}, in_model_form=True)


def pieces_of(model: PreTrainedModel) -> list[Piece]:
    """The pieces of an empty `model`: its layers, then everything outside them; a shared tensor appears once."""
    state = model.state_dict(keep_vars=True)
    tied = {name for name, origin in (model.all_tied_weights_keys or {}).items() if origin in state}
    prefix, blocks = find_blocks(model)
    found: dict[int | None, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
        index: {} for index in [*range(len(blocks)), None]
    }
    for name, tensor in state.items():
        if name not in tied:
            number = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else None
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            found[None if number is None else int(number)][name] = (dtype, tuple(tensor.shape))
    return [Piece(index, entries) for index, entries in found.items()]


def _largest(pieces: list[Piece]) -> int:
    outer = [_nbytes(entry) for piece in pieces if piece.index is None for entry in piece.entries.values()]
    return max([*outer, *(piece.nbytes for piece in pieces if piece.index is not None)])


def _nbytes(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return prod(shape) * dtype.itemsize
