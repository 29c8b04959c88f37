"""How the classes of transformers run their experts: the tensors, the arguments of a call, and what happens between the linears."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.models.experts.layout import BIAS, Joined, Layout

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Call:
    """A call of an experts module.

    hidden: (tokens, hidden), one row for each token that is routed.
    chosen, weights: the experts of each row and their weights, (tokens, k). A number beyond the experts stands for none.
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


class Family:
    """Experts as `use_experts_implementation` of transformers describes them: `gate_up_proj` or `up_proj`, and `down_proj`.

    Other families differ from it in some of the methods.
    """

    def layout(self, module: nn.Module) -> Layout | None:
        """The tensors of an experts module; None if it is not of this family."""
        if not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS) or not hasattr(module, "_apply_gate"):  # fmt: skip
            return None
        found: Any = module
        return tensors_named(module, found.has_gate, found.has_bias, found.is_transposed, not found.is_concatenated)

    def hidden(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden states among the arguments of the forward of the class `kind`."""
        found: Tensor = _bound(kind, args, kwargs)[0]
        return found

    def call(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call that these arguments are; experts: the module of linears."""
        hidden, chosen, weights, *_ = _bound(experts.kind, args, kwargs)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return Call(rows, chosen.reshape(-1, chosen.shape[-1]), weights.reshape(-1, weights.shape[-1]))

    def recorded(self, call: Call, experts: int) -> Call:
        """What calibration records of a call. Its rows are as many whatever the router chooses."""
        return call

    def activated(self, experts: Any, outputs: Tensor) -> Tensor:
        """The input of the down projection, from the outputs of the linears before it as the layout of `experts` joins them."""
        # The code of the original, which may clamp and scale, sees this module as itself.
        found: Tensor = experts.kind._apply_gate(experts, outputs) if experts.layout.gated else experts.act_fn(outputs)
        return found

    def begun(self, experts: Any, call: Call) -> Tensor:
        """What the experts are added to, (tokens, hidden), without those that are linears."""
        return torch.zeros_like(call.hidden)

    def finished(self, experts: Any, result: Tensor) -> Tensor:
        """The output of the module. result: sums over the experts of each token, in the shape of the hidden states."""
        return result


class Unmarked(Family):
    """Experts that run as the decorated ones do, but whose class does not say so."""

    def layout(self, module: nn.Module) -> Layout | None:
        return tensors_named(module)


class Llama4(Family):
    """Llama 4: its only argument has the tokens once for each expert, scaled by their scores, which are 0 for experts that are not chosen."""

    def layout(self, module: nn.Module) -> Layout | None:
        return tensors_named(module, transposed=True)

    def call(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        hidden, count = self.hidden(experts.kind, args, kwargs), experts.layout.experts
        rows = torch.arange(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        own = rows // max(hidden.shape[0] // count, 1)
        chosen = torch.where(hidden.ne(0).any(-1), own, count)
        return Call(hidden, chosen[:, None], hidden.new_ones(hidden.shape[0], 1))

    def recorded(self, call: Call, experts: int) -> Call:
        chosen = call.chosen.view(experts, -1).T
        # As many rows for each token as experts are chosen, in the order of the tokens.
        most = max(int((chosen < experts).sum(1).max()), 1)
        numbers = chosen.sort(1).values[:, :most]
        tokens = torch.arange(chosen.shape[0], dtype=torch.int64, device=chosen.device)[:, None]
        places = numbers.clamp(max=experts - 1) * chosen.shape[0] + tokens
        rows = call.hidden[places.reshape(-1)]
        return Call(rows, numbers.reshape(-1, 1), rows.new_ones(len(rows), 1))

    def activated(self, experts: Any, outputs: Tensor) -> Tensor:
        return _gated(experts.act_fn, outputs)


class Dbrx(Family):
    """DBRX: the rows of all experts in one matrix, in a module below."""

    def layout(self, module: nn.Module) -> Layout | None:
        tensors = [("mlp.w1", ("gate_proj",), False), ("mlp.v1", ("up_proj",), False), ("mlp.w2", ("down_proj",), True)]
        return named(module, getattr(module, "num_experts", 0), tensors)

    def activated(self, experts: Any, outputs: Tensor) -> Tensor:
        return _gated(experts.mlp.activation_fn, outputs)


class JetMoe(Family):
    """The MLP of JetMoE, whose module has the router inside, and a bias for the sum."""

    def layout(self, module: nn.Module) -> Layout | None:
        inner: Any = module
        count = inner.input_linear.num_experts
        return named(module, count, [("input_linear.weight", GATE_UP, False), ("output_linear.weight", ("down_proj",), False)])  # fmt: skip

    def call(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        hidden = self.hidden(experts.kind, args, kwargs)
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores, chosen = experts.router.layer(rows).float().topk(experts.router.top_k, dim=1)
        return Call(rows, chosen, scores.softmax(1).type_as(rows))

    def activated(self, experts: Any, outputs: Tensor) -> Tensor:
        return _gated(experts.activation, outputs)

    def finished(self, experts: Any, result: Tensor) -> Tensor:
        found: Tensor = result + experts.bias
        return found


class Longcat(Unmarked):
    """LongCat-Flash, whose last experts return their input; `gate_up_proj` has space for them."""

    def layout(self, module: nn.Module) -> Layout | None:
        return tensors_named(module, spare=getattr(module, "zero_expert_num", 0))

    def begun(self, experts: Any, call: Call) -> Tensor:
        same = (call.weights * (call.chosen >= experts.layout.experts)).sum(1, keepdim=True)
        found: Tensor = (call.hidden * same).to(call.hidden.dtype)
        return found

    def activated(self, experts: Any, outputs: Tensor) -> Tensor:
        return _gated(experts.act_fn, outputs)


DECORATED = Family()
# By the class of transformers. All others are decorated, or not experts.
FAMILIES: dict[str, Family] = {
    "DbrxExperts": Dbrx(),
    "JetMoeMoE": JetMoe(),
    "Llama4TextExperts": Llama4(),
    "LongcatFlashExperts": Longcat(),
    "Step3p7Experts": Unmarked(),
}


def family_of(module: nn.Module) -> Family:
    """The family of an experts module of transformers."""
    return FAMILIES.get(type(module).__name__, DECORATED)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of an experts module of transformers; None for any other module."""
    return family_of(module).layout(module)


def tensors_named(
    module: nn.Module,
    gated: bool = True,
    biased: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
    spare: int = 0,
) -> Layout | None:
    """The layout of a module whose parameters are `gate_up_proj` or `up_proj`, and `down_proj`, and nothing else.

    spare: experts at the end of `gate_up_proj` that never run.
    """
    first = ("gate_up_proj", GATE_UP) if gated else ("up_proj", ("up_proj",))
    weights: list[tuple[str, tuple[str, ...]]] = [first, ("down_proj", ("down_proj",))]
    wanted = [(name, linears, transposed) for name, linears in weights]
    biases = [f"{name}{BIAS}" for name, _ in weights] if biased else []
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() != {*(name for name, *_ in wanted), *biases}:
        return None
    return named(module, parameters["down_proj"].shape[0], wanted, biased, interleaved, {"gate_up_proj": spare})


def named(
    module: nn.Module,
    experts: int,
    weights: Sequence[tuple[str, tuple[str, ...], bool]],
    biased: bool = False,
    interleaved: bool = False,
    spare: Mapping[str, int] = MappingProxyType({}),
) -> Layout | None:
    """The layout of these weights, each with the linears that it holds and whether it is transposed; None if their shapes do not fit.

    spare: experts that never run, by the name of the tensor that has them.
    """
    wanted = {name: (linears, False, transposed) for name, linears, transposed in weights}
    if biased:
        wanted |= {f"{name}{BIAS}": (linears, True, False) for name, linears, _ in weights}
    # In the order of the original, which is that of its files.
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters() if name in wanted}
    joined = tuple(Joined(name, shape, *wanted[name], spare.get(name, 0)) for name, shape in shapes.items())
    known = all(len(tensor.shape) in ((2,) if tensor.bias else (2, 3)) for tensor in joined)
    layout = Layout(experts, joined, interleaved)
    return layout if shapes.keys() == wanted.keys() and known and experts > 0 and layout.fits() else None


def _gated(activation: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    gate, up = outputs.chunk(2, -1)
    return activation(gate) * up


def _bound(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of the forward of a class, without `self`."""
    return list(_signature(kind).bind(None, *args, **kwargs).arguments.values())[1:]


@cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)
