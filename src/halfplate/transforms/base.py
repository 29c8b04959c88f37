"""The interface of transforms, which turn a model into an equivalent or smaller one, layer by layer, before compression."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfplate.errors import HalfplateError
from halfplate.models.linears import find_blocks
from halfplate.models.sources import Source, skeleton

# Model types whose norms multiply by the weight, not by 1 + weight, and whose layers have the names of Llama.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

FP32 = 4

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
# The statistics of the layer with this index, as its probe returned them.
Statistics = Callable[[int], Mapping[str, Tensor]]


class Transform(ABC):
    """Turns a model into an equivalent or smaller one.

    Halfplate writes each piece to a file with checksums, keeps finished pieces if the run is interrupted, and makes no piece twice. So a
    piece must be the same in every process, whatever was made before it. `refusal`, `configuration` and `held_nbytes` are called while
    planning, before earlier transforms have made their tensors. They may only use the configuration, and names and shapes
    (`halfplate.models.sources.skeleton`).

    name: its name in the registry.
    version: increased whenever the result changes.
    summary: one sentence.
    shrinks: the recipe must say with `keep` how much of the model stays; `keeping` receives it.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    shrinks: ClassVar[bool] = False

    def keeping(self, keep: float) -> Transform:
        """This transform for a result with at most `keep` (above 0, at most 1) times the parameters of the model; only called if it `shrinks`."""
        raise NotImplementedError(f"{self.name} does not shrink a model")

    @abstractmethod
    def refusal(self, source: Source) -> str | None:
        """Why this transform does not support the model, as a clause; None if it does."""

    def configuration(self, source: Source) -> PretrainedConfig:
        """The configuration of the result: a changed copy, or that of the source."""
        return source.config

    def described(self, source: Source) -> str:
        """What it makes of the model, in a few words for the plan; empty if there is nothing to say."""
        return ""

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


class Probe(ABC):
    """Collects statistics of one layer while the calibration text runs through it."""

    @abstractmethod
    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        """Register hooks on the layer, which runs once for each batch (samples, L, d) of the text."""

    @abstractmethod
    def statistics(self) -> dict[str, Tensor]:
        """What is kept of the layer, after the last batch; not empty."""


@dataclass(frozen=True)
class Settled:
    """A result of which everything is decided: its configuration, and what makes its pieces."""

    config: PretrainedConfig
    make: Maker


class MeasuredTransform(Transform):
    """A transform that depends on statistics of the model.

    Halfplate runs the calibration text once through the layers of the source, with one layer in memory, and keeps what the probe of each
    layer returns in a file. Then `settled` decides, and makes the tensors.
    """

    @abstractmethod
    def probe(self, source: Source, layer: int) -> Probe:
        """What collects the statistics of the layer with this index."""

    @abstractmethod
    def settled(self, source: Source, statistics: Statistics) -> Settled:
        """The result; its configuration may differ from `configuration` in values, but not in the shapes that follow from it."""

    @abstractmethod
    def statistics_nbytes(self, source: Source) -> int:
        """Bytes of what a probe returns, at most."""

    def open(self, source: Source) -> Maker:
        raise HalfplateError(
            f"transforms={self.label!r} needs statistics of the model: call `settled` instead of `open`"
        )


class WholeTransform(MeasuredTransform):
    """A transform that depends on statistics of the whole model at once, such as gradients.

    Halfplate holds the whole model in memory in fp32, and keeps what `measured` returns in a file for each layer.
    """

    @abstractmethod
    def measured(self, model: PreTrainedModel, ids: Tensor, tell: Callable[[int], None]) -> list[dict[str, Tensor]]:
        """The statistics of each layer, not empty, as `settled` receives them. Gradients are enabled, but of no parameter.

        ids: int64 (samples, L) on the device of the model. tell: called with the number of finished samples.
        """

    def measuring_nbytes(self, source: Source, seq_len: int) -> int:
        """Peak bytes of `measured`, the model included: by default for gradients of all tensors, from one sample at a time."""
        pieces = pieces_of(skeleton(source))
        config = source.config.get_text_config()
        wide = max(
            max(shape) for piece in pieces if piece.index is not None for _, shape in piece.entries.values() if shape
        )
        # Of a layer: about eight tensors of its widest, and the weights of attention of all heads.
        kept: int = FP32 * seq_len * (8 * wide + 2 * config.num_attention_heads * seq_len) * config.num_hidden_layers
        return 2 * sum(piece.nbytes for piece in pieces) + kept + 3 * FP32 * seq_len * int(config.vocab_size)

    def probe(self, source: Source, layer: int) -> Probe:
        raise HalfplateError(f"transforms={self.label!r} measures the whole model: call `measured` instead of `probe`")


def making(tensor: Callable[[str], Tensor]) -> Maker:
    """A maker of pieces from a function that makes each tensor of the result by its name."""

    def make(piece: Piece) -> Iterator[tuple[str, Tensor]]:
        for name in piece.entries:
            yield name, tensor(name)

    return make


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
