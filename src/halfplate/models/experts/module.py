"""The module that runs experts as linears."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from halfplate.models.experts.families import Call, family_of
from halfplate.models.experts.group import kernel_matrices, products, rows_in_group
from halfplate.models.experts.layout import Layout


class Expert(nn.Module):
    """The linears of one expert: `up_proj`, `down_proj` and, if it is gated, `gate_proj`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


class Left(nn.Module):
    """What is left of a module inside an experts module whose tensors are those of all experts. kind: its class."""

    kind: Any


def hand_over(original: nn.Module, other: nn.Module, without: Collection[str] = ()) -> None:
    """Give the attributes, parameters, buffers and submodules of a module, except those named, to another."""
    inner = {"_parameters", "_modules", "_buffers", "_non_persistent_buffers_set"}
    other.__dict__.update({key: value for key, value in vars(original).items() if key not in {*inner, *without}})
    for key in inner - {"_non_persistent_buffers_set"}:
        getattr(other, key).update({name: one for name, one in getattr(original, key).items() if name not in without})
    other._non_persistent_buffers_set.update(original._non_persistent_buffers_set)


class LinearExperts(nn.Module):
    """The experts of a layer, each with its own linears, in the place of an experts module of transformers.

    The children `0`, `1`, … are the experts. Each runs on the tokens that are routed to it, so a hook on one of its linears sees only these
    tokens. Experts with few tokens whose linears are in kernel layout run together. Attributes, and other parameters and submodules, are
    those of the original.

    original: the module that is replaced; its tensors of all experts are not kept, except as the views that the linears use.
    experts: the linears of each expert.
    """

    def __init__(self, original: nn.Module, layout: Layout, experts: list[Expert]) -> None:
        super().__init__()
        taken = {tensor.name for tensor in layout.joined}
        hand_over(original, self, taken)
        for owner in {name.rpartition(".")[0] for name in taken} - {""}:
            left, module = Left(), original.get_submodule(owner)
            hand_over(module, left, {name.rpartition(".")[2] for name in taken})
            left.kind = module.__class__
            self.set_submodule(owner, left)
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.kind: Any = original.__class__
        self.family, self.layout = family_of(original), layout
        self.train(original.training)

    @property
    def experts(self) -> list[Expert]:
        """The experts in order."""
        return [self.expert(number) for number in range(self.layout.experts)]

    def expert(self, number: int) -> Expert:
        """The expert with this number."""
        found = self._modules[str(number)]
        assert isinstance(found, Expert)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of the experts of each token, as the original computes it: (tokens, hidden).

        The arguments are those of the original (`Family.call`).
        """
        call, shape = self.call(args, kwargs), self.family.hidden(self.kind, args, kwargs).shape
        width, result = call.chosen.shape[-1], self.family.begun(self, call)
        for slots, output in self._outputs(call.hidden, hits(call.chosen, self.layout.experts), width):
            weighted = output * call.weights.reshape(-1).index_select(0, slots).unsqueeze(1)
            result.index_add_(0, slots // width, weighted.to(result.dtype))
        return self.family.finished(self, result.reshape(shape))

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The tokens and their experts in the arguments of a call."""
        return self.family.call(self, args, kwargs)

    def recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The tokens and their experts that calibration records of a call."""
        return self.family.recorded(self.call(args, kwargs), self.layout.experts)

    def _outputs(self, x: Tensor, found: Hits, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The outputs (slots, hidden) of all experts that tokens are routed to, some experts at a time, with their slots."""
        few = rows_in_group(x)
        packed = [
            kernel_matrices(self._linears(number)) if count < few else None
            for number, count in zip(found.numbers, found.counts, strict=True)
        ]
        together = [matrices for matrices in packed if matrices is not None]
        slots, counts = found.slots, found.counts
        if len(together) < len(packed):
            grouped = []
            for number, own, matrices in zip(found.numbers, slots.split(counts), packed, strict=True):
                if matrices is None:
                    yield own, self.run(number, x[own // width])
                else:
                    grouped.append(own)
            slots, counts = torch.cat([slots[:0], *grouped]), list(map(len, grouped))
        if together:
            # All experts of a single token read the same row.
            alone = x.shape[0] == 1 and len(counts) == slots.shape[0]
            yield slots, self._run_group(x if alone else x[slots // width], together, counts)

    def _run_group(self, x: Tensor, packed: list[list[Tensor]], counts: list[int]) -> Tensor:
        """`run` for several experts in two native calls, which read only their matrices.

        x: the rows of all experts, in order. packed, counts: the matrices of each expert in the order in which they run, and its rows.
        """
        first = products(x, [matrices[:-1] for matrices in packed], counts)
        if self.layout.gated and self.layout.interleaved:
            inner = self.activated(*first.chunk(2, -1))
        else:
            inner = self._activated(first)
        return self._normed(products(inner, [matrices[-1:] for matrices in packed], counts))

    def _linears(self, number: int) -> list[nn.Module]:
        """The linears of an expert, in the order in which they run."""
        expert = self._modules[str(number)]._modules  # type: ignore[union-attr]
        return [expert[leaf] for leaf in self.layout.linears]  # type: ignore[misc]

    def in_group(self) -> list[bool]:
        """Whether each expert runs together with others, if few tokens are routed to it."""
        return [kernel_matrices(self._linears(number)) is not None for number in range(self.layout.experts)]

    def run(self, number: int, x: Tensor) -> Tensor:
        """The output (tokens, hidden) of one expert for `x`, without its routing weight."""
        expert = self.expert(number)
        up = expert.up_proj(x)
        gate = expert.gate_proj(x) if self.layout.gated else None
        return self._normed(expert.down_proj(self.activated(gate, up)))

    def _normed(self, output: Tensor) -> Tensor:
        if getattr(self, "has_post_expert_norm", False):  # not in transformers before 5.23
            output = self.post_expert_norm(output)  # type: ignore[operator]
        return output

    def activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The input of the down projection from the outputs of the other two linears."""
        if gate is None:
            return self._activated(up)
        return self._activated(
            torch.stack((gate, up), -1).flatten(-2) if self.layout.interleaved else torch.cat((gate, up), -1)
        )

    def _activated(self, outputs: Tensor) -> Tensor:
        return self.family.activated(self, outputs)


@dataclass(frozen=True)
class Hits:
    """The experts that tokens are routed to, in order.

    numbers, counts: of each expert, its number and the slots that name it.
    slots: int64 places in the experts of all tokens, (tokens, k) in a row; those of the first expert first, each in the order of tokens.
    """

    numbers: list[int]
    counts: list[int]
    slots: Tensor


def hits(chosen: Tensor, count: int) -> Hits:
    """The experts that tokens are routed to among `count`, from those of each token: `chosen` (tokens, k).

    Without values, each expert gets the first token.
    """
    if chosen.is_meta or isinstance(chosen, FakeTensor):
        return Hits(list(range(count)), [1] * count, torch.zeros(count, dtype=torch.int64, device=chosen.device))
    ordered, order = chosen.reshape(-1).sort(stable=True)
    found = Counter(ordered.tolist())
    known = {number: length for number, length in found.items() if 0 <= number < count}
    start = sum(length for number, length in found.items() if number < 0)
    numbers, counts = list(known), list(known.values())
    return Hits(numbers, counts, order[start : start + sum(counts)])


def experts_of(model: nn.Module) -> dict[str, LinearExperts]:
    """The experts modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts)}


@contextmanager
def without_experts(modules: list[LinearExperts]) -> Iterator[None]:
    """Context manager in which `modules` return zeros without running any expert."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = _zeros(module)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _zeros(module: LinearExperts) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: torch.zeros_like(module.family.hidden(module.kind, args, kwargs))
