"""What structured pruning measures of a layer while text runs through it. Sums are fp64, statistics fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfplate.transforms.base import Probe


class Moments(Probe):
    """The mean `NAME.mean` and the variance `NAME.variance` of each input of the linears `names`, over all tokens."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        return [layer.get_submodule(name).register_forward_pre_hook(partial(self._add, name)) for name in self.names]

    def _add(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = rows(args[0])
        first, second = (values.sum(0, dtype=torch.float64) for values in (inputs, inputs.square()))
        count, *before = self._sums.get(name, (0, torch.zeros_like(first), torch.zeros_like(first)))
        self._sums[name] = count + len(inputs), before[0] + first, before[1] + second

    def statistics(self) -> dict[str, Tensor]:
        found = {}
        for name, (count, first, second) in self._sums.items():
            mean = first / count
            found[f"{name}.mean"] = stored(mean)
            found[f"{name}.variance"] = stored((second / count - mean.square()).clamp_min(0))
        return found


class Angle(Probe):
    """`angle`: the angle between the input and the output of the layer, as a share of π, averaged over all tokens; shape (1,)."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        return [layer.register_forward_hook(self._add)]

    def _add(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first, last = rows(args[0]).double(), rows(output[0] if isinstance(output, tuple) else output).double()
        cosine = torch.nn.functional.cosine_similarity(first, last, dim=1).clamp(-1, 1)
        self._sum += float(cosine.arccos().sum()) / math.pi
        self._count += len(first)

    def statistics(self) -> dict[str, Tensor]:
        return {"angle": torch.tensor([self._sum / self._count], dtype=torch.float32, device="cpu")}


class Gram:
    """The mean of x xᵀ over rows x, fp64 (d, d). The product of a batch is fp32, which takes half the time; its sum over batches is not."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, inputs: Tensor) -> None:
        """Add the rows of `inputs` (..., d)."""
        inputs = rows(inputs)
        product = (inputs.T @ inputs).double()
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._count += len(inputs)

    @property
    def mean(self) -> Tensor:
        assert self._sum is not None, "no batch has run"
        return self._sum / self._count


def rows(tensor: Tensor) -> Tensor:
    """A tensor (..., d) as fp32 (rows, d)."""
    return tensor.reshape(-1, tensor.shape[-1]).float()


def stored(tensor: Tensor) -> Tensor:
    """A statistic in the type in which it is kept."""
    return tensor.to("cpu", torch.float32).contiguous()
