"""What a transform is: a model in, an equivalent or smaller model out, made layer by layer before anything is compressed."""

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
    """What is made and kept at once: the tensors of one layer of the result, or all that are outside the layers (index None).

    entries: element type and shape of each tensor, by its name in the model; floats are fp32.
    """

    index: int | None
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self.entries.values()))


# Gives every tensor of a piece with its name, in any order, one at a time.
Maker = Callable[[Piece], Iterator[tuple[str, Tensor]]]


class Transform(ABC):
    """A model in, an equivalent or smaller model out.

    name: that of the registry. version: goes up whenever the result changes. summary: one sentence.

    A transform describes; Halfplate does the work: it writes each piece to a file with checksums, keeps finished pieces if the run
    is interrupted, and makes no piece twice. So a piece must be the same in every process, whatever was made before it.
    `refusal`, `configuration` and `held_nbytes` run while planning, when an earlier transform has not made any tensors yet: they may
    look at the configuration, and at names and shapes (`halfplate.models.sources.skeleton`).
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
        """Bytes held at most, beside the process itself; unless overridden, twice the largest layer or outer tensor in fp32."""
        result = outline(self, source)
        sides = [source] if result.config is source.config else [source, result]
        return 2 * max(_largest(pieces_of(skeleton(side))) for side in sides)

    @abstractmethod
    def open(self, source: Source) -> Maker:
        """What makes the pieces of the result; `halfplate.models.streamed.StreamedModel(source)` reads the tensors of the source."""

    @property
    def label(self) -> str:
        """How recipes, fingerprints and reports call it."""
        return f"{self.name}@{self.version}"


def outline(transform: Transform, source: Source) -> Source:
    """The result as far as it is known without its tensors, which is what planning looks at."""
    return replace(source, config=transform.configuration(source), tensors={}, in_model_form=True)


def pieces_of(model: PreTrainedModel) -> list[Piece]:
    """What an empty `model` consists of: its layers, then all that is outside of them; a tensor that is shared stands once."""
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
