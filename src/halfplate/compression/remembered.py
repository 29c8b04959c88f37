"""Outputs of the parts of a layer that later passes over the same tokens would compute again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.formats import CompressedLinear
from halfplate.models.experts import experts_of

LINEARS = (nn.Linear, CompressedLinear)
SAMPLED = 61  # numbers of an input that are compared


@dataclass(frozen=True, eq=False)
class _Output:
    """The output of a part for one batch.

    inside: the compressed linears in the part. samples: numbers of its inputs. versions: of `tensors`, which count changes in place.
    """

    inside: tuple[str, ...]
    samples: tuple[Tensor, ...]
    value: Tensor | tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def unchanged(self) -> bool:
        return self.versions == tuple(tensor._version for tensor in self.tensors)


class RememberedOutputs:
    """Outputs of linears, and of whole submodules such as attention, of one layer for the batches that ran through it.

    The linears of a layer are solved in stages, and each stage runs the layer from its start. An output is used again if the input
    and the compressed linears inside are the same, so results do not depend on what is remembered.

    room: most bytes that are kept; further outputs are computed again.
    """

    def __init__(self, room: int = 0) -> None:
        self.room, self.nbytes = room, 0
        self._outputs: dict[tuple[int, str], _Output] = {}
        self._changing: set[str] = set()  # parts whose outputs other code changes in place

    def clear(self) -> None:
        self._outputs.clear()
        self._changing.clear()
        self.nbytes = 0

    @contextmanager
    def recalling(self, layer: nn.Module, batch: int, targets: Sequence[str] = ()) -> Iterator[None]:
        """Context manager in which the parts of `layer` return what they returned before for batch number `batch`.

        targets: names of linears inside the layer whose inputs the caller watches, so the submodules around them run.
        """
        parts = _parts(layer, targets)
        own = [part.__dict__.get("forward") for part in parts.values()]
        try:
            for name, part in parts.items():
                part.forward = self._instead(batch, name, part, part.forward)
            yield
        finally:
            for part, forward in zip(parts.values(), own, strict=True):
                part.__dict__.pop("forward", None)
                if forward is not None:
                    part.forward = forward

    def _instead(self, batch: int, name: str, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        inside = tuple(inner for inner, module in part.named_modules() if isinstance(module, CompressedLinear))
        called = False

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            again, called = called, True
            samples, key = _samples(args, kwargs), (batch, name)
            if again or samples is None or name in self._changing:
                return forward(*args, **kwargs)
            before = self._outputs.get(key)
            if before is not None and not before.unchanged:
                self._changing.add(name)
            elif before is not None and before.inside == inside and _equal(before.samples, samples):
                return before.value
            self._drop(key)
            value = forward(*args, **kwargs)
            self._keep(key, inside, samples, value)
            return value

        return call

    def _keep(self, key: tuple[int, str], inside: tuple[str, ...], samples: tuple[Tensor, ...], value: Any) -> None:
        values = value if isinstance(value, tuple) else (value,)
        if not all(each is None or isinstance(each, Tensor) for each in values) or key[1] in self._changing:
            return
        batch, name = key
        for other in [other for other in self._outputs if other[0] == batch and other[1].startswith(f"{name}.")]:
            self._drop(other)  # the whole part is recalled from now on
        tensors = tuple(each for each in values if each is not None)
        output = _Output(inside, samples, value, tensors, tuple(tensor._version for tensor in tensors))
        if output.nbytes <= self.room - self.nbytes and all(tensor.device.type == "cpu" for tensor in tensors):
            self._outputs[key] = output
            self.nbytes += output.nbytes

    def _drop(self, key: tuple[int, str]) -> None:
        if (output := self._outputs.pop(key, None)) is not None:
            self.nbytes -= output.nbytes


def _parts(layer: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The submodules and linears of a layer whose outputs may be remembered, without those inside experts."""
    experts = tuple(f"{name}." for name in experts_of(layer))  # which may be left out of a pass
    linears = {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, LINEARS) and not name.startswith(experts)
    }
    whole = {
        name: child
        for name, child in layer.named_children()
        if name not in linears
        and any(linear.startswith(f"{name}.") for linear in linears)
        and not any(inner.startswith(f"{name}.") for inner in (*targets, *experts))
    }
    return whole | linears


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """Some numbers of each tensor that a part is given; None if it is given something that it may change, such as a cache.

    A change of one token reaches all its channels, so they tell inputs apart.
    """
    given = [*args, *kwargs.values()]
    flat = [each for one in given for each in (one if isinstance(one, tuple) else (one,))]
    if not all(each is None or isinstance(each, Tensor | bool | int | float | str) for each in flat):
        return None
    numbers = [each.reshape(-1) for each in flat if isinstance(each, Tensor)]
    return tuple(each[:: max(1, len(each) // SAMPLED)].clone() for each in numbers)


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
