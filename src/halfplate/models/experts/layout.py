"""How an experts module of transformers arranges the matrices of its experts in 3-D tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BIAS = "_bias"
JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class Slot:
    """The place of one tensor of an expert in the tensor of all experts.

    joined: name of that tensor, e.g. `gate_up_proj`, whose first dimension counts the experts.
    outputs: the rows of this linear among those of the tensor.
    transposed: whether the tensor is stored as (inputs, outputs).
    """

    joined: str
    outputs: slice
    transposed: bool

    def of(self, expert: Tensor) -> Tensor:
        """This linear's part of the tensor of one expert: a view (d_out, d_in), or (d_out,) of a bias."""
        return (expert.T if self.transposed else expert)[self.outputs]


@dataclass(frozen=True)
class Layout:
    """The shape of an experts module, as the decorator `use_experts_implementation` of transformers describes it.

    joined: the shape of each 3-D tensor and each bias, by name.
    gated: whether there is a gate beside the up projection.
    transposed: weights are stored as (inputs, outputs).
    interleaved: gate and up alternate in the outputs of `gate_up_proj`; otherwise the gate comes first.
    """

    experts: int
    joined: tuple[tuple[str, tuple[int, ...]], ...]
    gated: bool
    transposed: bool
    interleaved: bool

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of each expert, in the order in which they run."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    @property
    def biased(self) -> bool:
        """Whether the linears have biases."""
        return any(name.endswith(BIAS) for name, _ in self.joined)

    def slots(self) -> dict[str, Slot]:
        """The place of each tensor of an expert, by names such as `gate_proj.weight`."""
        found: dict[str, Slot] = {}
        for name, shape in self.joined:
            weight = not name.endswith(BIAS)
            transposed = self.transposed and weight
            linears = JOINED[name.removesuffix(BIAS)]
            rows = shape[-1] if transposed or not weight else shape[1]
            for number, linear in enumerate(linears):
                own = rows // len(linears)
                outputs = slice(number * own, (number + 1) * own)
                if self.interleaved and len(linears) == 2:
                    outputs = slice(number, rows, 2)
                found[f"{linear}.{'weight' if weight else 'bias'}"] = Slot(name, outputs, transposed)
        return found

    def joined_tensor(self, name: str, experts: list[dict[str, Tensor]]) -> Tensor:
        """The tensor `name` of all experts from the tensors of each one, by the names of `slots`."""
        shape = dict(self.joined)[name]
        own = {part: slot for part, slot in self.slots().items() if slot.joined == name}
        first = experts[0][next(iter(own))]
        whole = torch.empty(shape, dtype=first.dtype, device=first.device)
        for number, tensors in enumerate(experts):
            for part, slot in own.items():
                slot.of(whole[number]).copy_(tensors[part])
        return whole


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of an experts module of transformers; None for any other module."""
    if not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS) or not hasattr(module, "_apply_gate"):
        return None
    found: Any = module
    names = ("gate_up_proj" if found.has_gate else "up_proj", "down_proj")
    wanted = [*names, *(f"{name}{BIAS}" for name in names if found.has_bias)]
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() != set(wanted) or any(
        parameters[name].ndim != (2 if name.endswith(BIAS) else 3) for name in wanted
    ):
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    layout = Layout(
        experts=shapes[names[0]][0],
        joined=tuple(shapes.items()),
        gated=found.has_gate,
        transposed=found.is_transposed,
        interleaved=not found.is_concatenated,
    )
    return layout if _fits(layout, shapes) else None


def _fits(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the shapes of the tensors fit each other."""

    def sides(name: str) -> tuple[int, int]:
        _, first, second = shapes[name]
        return (second, first) if layout.transposed else (first, second)

    first, count = ("gate_up_proj", 2) if layout.gated else ("up_proj", 1)
    (inner, hidden), (outer, width) = sides(first), sides("down_proj")
    return {shape[0] for shape in shapes.values()} == {layout.experts} and hidden == outer and inner == count * width
