"""How an experts module of transformers arranges the matrices of its experts in the tensors of all experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfplate.storage.tensor_file import StoredTensor

BIAS = "_bias"


@dataclass(frozen=True)
class Joined:
    """One tensor of all experts.

    name: below the experts module, e.g. `gate_up_proj`.
    shape: (experts, d_out, d_in), (experts × d_out, d_in), or (experts, d_out) of biases.
    linears: whose rows it holds, in order, e.g. `("gate_proj", "up_proj")`.
    bias: holds biases, not weights.
    transposed: the last two dimensions of weights are (inputs, outputs).
    spare: number of experts at its end that never run.
    """

    name: str
    shape: tuple[int, ...]
    linears: tuple[str, ...]
    bias: bool = False
    transposed: bool = False
    spare: int = 0

    @property
    def in_rows(self) -> bool:
        """Whether the experts follow each other in the rows of a matrix."""
        return not self.bias and len(self.shape) == 2

    def by_expert(self, tensor: Tensor, experts: int) -> Tensor:
        """The tensor with the experts as its first dimension: a view."""
        return tensor.view(experts, -1, tensor.shape[1]) if self.in_rows else tensor

    def stored_by_expert(self, stored: StoredTensor, experts: int) -> StoredTensor:
        """`by_expert` for a tensor in a file."""
        rows, *others = stored.shape
        return replace(stored, shape=(experts, rows // experts, *others)) if self.in_rows else stored


@dataclass(frozen=True)
class Slot:
    """The place of one tensor of an expert in the tensor of all experts.

    joined: name of that tensor.
    outputs: the rows of this linear among those of an expert.
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
    """The tensors of an experts module.

    interleaved: gate and up alternate in the outputs of a tensor that holds both; otherwise the gate comes first.
    """

    experts: int
    joined: tuple[Joined, ...]
    interleaved: bool = False

    @property
    def gated(self) -> bool:
        """Whether there is a gate beside the up projection."""
        return any("gate_proj" in tensor.linears for tensor in self.joined)

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of each expert, in the order in which they run."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    @property
    def biased(self) -> bool:
        """Whether the linears have biases."""
        return any(tensor.bias for tensor in self.joined)

    def tensor(self, name: str) -> Joined:
        """The tensor of all experts with this name."""
        return next(tensor for tensor in self.joined if tensor.name == name)

    def slots(self) -> dict[str, Slot]:
        """The place of each tensor of an expert, by names such as `gate_proj.weight`."""
        found: dict[str, Slot] = {}
        for tensor in self.joined:
            rows = self._outputs(tensor)
            for number, linear in enumerate(tensor.linears):
                own = rows // len(tensor.linears)
                outputs = slice(number * own, (number + 1) * own)
                if self.interleaved and len(tensor.linears) == 2:
                    outputs = slice(number, rows, 2)
                found[f"{linear}.{'bias' if tensor.bias else 'weight'}"] = Slot(tensor.name, outputs, tensor.transposed)
        return found

    def joined_tensor(self, name: str, experts: list[dict[str, Tensor]]) -> Tensor:
        """The tensor `name` of all experts from the tensors of each one, by the names of `slots`."""
        own = {part: slot for part, slot in self.slots().items() if slot.joined == name}
        first, joined = experts[0][next(iter(own))], self.tensor(name)
        empty = torch.zeros if joined.spare else torch.empty
        whole = empty(joined.shape, dtype=first.dtype, device=first.device)
        apart = joined.by_expert(whole, self.experts)
        for number, tensors in enumerate(experts):
            for part, slot in own.items():
                slot.of(apart[number]).copy_(tensors[part])
        return whole

    def fits(self) -> bool:
        """Whether the shapes of the tensors fit each other and the number of experts."""
        sides = {
            linear: (self._outputs(tensor) // len(tensor.linears), self._inputs(tensor))
            for tensor in self.joined
            if not tensor.bias
            for linear in tensor.linears
        }
        (inner, hidden), (outer, width) = sides["up_proj"], sides["down_proj"]
        whole = all(tensor.shape[0] % self.experts == 0 if tensor.in_rows else tensor.shape[0] == self.experts + tensor.spare for tensor in self.joined)  # fmt: skip
        return (
            whole and (hidden, inner) == (outer, width) and sides.get("gate_proj", (inner, hidden)) == (inner, hidden)
        )

    def _outputs(self, tensor: Joined) -> int:
        """The outputs of one expert in a tensor."""
        if tensor.in_rows and not tensor.transposed:
            return tensor.shape[0] // self.experts
        return tensor.shape[-1] if tensor.transposed or tensor.bias else tensor.shape[1]

    def _inputs(self, tensor: Joined) -> int:
        """The inputs of one expert in a tensor of weights."""
        if tensor.in_rows and tensor.transposed:
            return tensor.shape[0] // self.experts
        return tensor.shape[-2] if tensor.transposed else tensor.shape[-1]
