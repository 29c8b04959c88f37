"""Finding the decoder layers of a model and their linears, and replacing a linear by another module."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn

from halfplate.errors import HalfplateError
from halfplate.formats.plain import is_plain_linear
from halfplate.models.auto import language_model
from halfplate.models.data_reads import data_reads

# A linear with one of these names and one output per expert is a router: tiny, and pruning it ruins the model.
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
# Parts of a module name: everything below belongs to a router, an indexer or a gate.
ROUTER = re.compile(r"(^|_)router(_|$)")
INDEXER = re.compile(r"(^|_)indexer(_|$)")
GATE = re.compile(r"(^|_)gate$")
# Parts of a module name: everything below reads images or sound.
TOWER = re.compile(r"(^|[._])(vision|visual|image|img|video|audio|speech)")
# Attention to the outputs of an encoder, which a text alone does not reach.
CROSS = re.compile(r"(^|_)(encoder_attn|cross_?attn|cross_?attention|encoder_decoder_attention)(_|$)")
# Gates of linear attention, with one or two outputs for each head.
HEAD_GATES = ("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj")
HEAD_GATE_OUTPUTS = 128
TINY_OUTPUTS, TINY_SHARE = 64, 16
# Attention projections may be equally narrow: one head of keys and values for all queries.
ATTENTION = re.compile(r"(^|_)w?(q|k|v|o|qk|kv|qkv|query|key|value)(_|$)")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class FoundLinear:
    """A linear of a decoder layer: its full name, the layer index, and the shape (d_out, d_in) of its weight."""

    name: str
    block: int
    d_out: int
    d_in: int
    bias: bool


@dataclass(frozen=True)
class SkippedModule:
    """A module of a decoder layer that is not compressed, with the reason (and what to do, if anything)."""

    name: str
    reason: str


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name, such as `("model.layers", ...)`.

    They are the outermost list of `num_hidden_layers` modules of the language model; of several such lists, the one with the most parameters
    whose name is not that of a vision or audio tower.
    Raises HalfplateError if there is none.
    """
    expected = _layer_counts(_text_config(model))
    lists: list[tuple[str, nn.ModuleList]] = []
    part, inside = language_model(model)
    for name, module in inside.named_modules(prefix=part):
        nested = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists.append((name, module))
    other = ", ".join(f"{name} of {len(blocks)}" for name, blocks in lists)
    if expected:
        lists = [(name, blocks) for name, blocks in lists if len(blocks) in expected]
    if not lists and other:
        raise HalfplateError(
            f"model {type(model).__name__} has module lists of lengths {other}, but its configuration names {expected[0]} layers (num_hidden_layers); "
            "expected one list of decoder layers that run in order: use another model"
        )
    if not lists:
        raise HalfplateError(
            f"model {type(model).__name__} has no list of {expected[0] if expected else 'decoder'} layers; "
            "expected a decoder-only model of the transformers library, such as LlamaForCausalLM"
        )
    lists = [entry for entry in lists if not TOWER.search(entry[0])] or lists
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))


def find_linears(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    reads: Mapping[str, str] | None = None,
) -> tuple[list[FoundLinear], list[SkippedModule]]:
    """The linears to compress, in layer order, and every other matrix of the layers with the reason.

    Routers, indexers and gates of heads are never included. Other tiny linears are included only if a pattern of `include` has
    more than `*` after its last dot. Works on the meta device.

    include, exclude: fnmatch patterns on full names; without `include` all linears are included.
    reads: result of `data_reads` for the model, computed if None.
    Raises HalfplateError if a pattern matches nothing, or if no linear is left.
    """
    found: list[FoundLinear] = []
    skipped: list[SkippedModule] = []
    prefix, blocks = find_blocks(model)
    experts = _expert_count(model)
    reads = data_reads(model, prefix)[0] if reads is None else reads
    reads = _shared_weights(model, prefix) | dict(reads)
    for index, block in enumerate(blocks):
        for inner, module in block.named_modules():
            name = f"{prefix}.{index}.{inner}" if inner else f"{prefix}.{index}"
            reason = _skip_reason(inner, module, experts) or reads.get(name)
            if reason is None and isinstance(module, nn.Linear) and not _asked_for(name, include):
                reason = _tiny_reason(inner, module)
            if reason is not None:
                skipped.append(SkippedModule(name, reason))
            elif isinstance(module, nn.Linear):
                linear = FoundLinear(name, index, module.out_features, module.in_features, module.bias is not None)
                found.append(linear)

    linear_names = [linear.name for linear in found]
    reasons = {module.name: module.reason for module in skipped}
    if not found:
        raise HalfplateError(_nothing_left(model, skipped))
    for pattern in include:
        _check_pattern("include", pattern, linear_names, reasons)
    for pattern in exclude:
        _check_pattern("exclude", pattern, [*linear_names, *reasons])

    kept: list[FoundLinear] = []
    for linear in found:
        excluding = next((pattern for pattern in exclude if fnmatchcase(linear.name, pattern)), None)
        if excluding is not None:
            skipped.append(SkippedModule(linear.name, f"excluded by exclude={excluding!r}"))
        elif include and not any(fnmatchcase(linear.name, pattern) for pattern in include):
            skipped.append(SkippedModule(linear.name, f"not among include={', '.join(include)}"))
        else:
            kept.append(linear)
    if not kept:
        raise HalfplateError(
            f"include={', '.join(include) or 'everything'} and exclude={', '.join(exclude)} leave none of the "
            f"{len(found)} linears; widen include or drop an exclude pattern"
        )
    return kept, skipped


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of the full name `name` by `module`; raises HalfplateError if there is none."""
    try:
        model.get_submodule(name)
    except AttributeError:
        raise HalfplateError(
            f"model {type(model).__name__} has no module {name!r}; expected a name that find_linears gave"
        ) from None
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layer_counts(config: Any) -> list[int]:
    """Layers that the configuration counts: twice as many where a module of the list holds two (`num_layers` of LongCat)."""
    counts = (getattr(config, name, None) for name in ("num_hidden_layers", "num_layers"))
    return [count for count in counts if isinstance(count, int)]


def _expert_count(model: nn.Module) -> int | None:
    config = _text_config(model)
    counts = (getattr(config, name, None) for name in EXPERT_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _skip_reason(inner: str, module: nn.Module, experts: int | None) -> str | None:
    """Why a module with its own matrices is not compressed; None for linears to compress and modules without matrices.

    inner: name of the module within the layer.
    """
    matrices = {key: tuple(tensor.shape) for key, tensor in module.named_parameters(recurse=False) if tensor.ndim >= 2}
    if not matrices:
        return None
    if isinstance(module, nn.Linear):
        return _router_reason(inner.split("."), module, experts) or (
            None if is_plain_linear(module) else f"{type(module).__name__} has a forward of its own; not compressed"
        )
    key, shape = max(matrices.items(), key=lambda item: len(item[1]))
    if len(shape) == 3 and shape[0] == experts:
        return (
            f"{shape[0]} experts stored in 3-D tensors ({key} of shape {shape}) instead of linears; not compressed: "
            "use a model without experts to compress its MLPs"
        )
    if len(shape) == 2 and shape[0] == experts:
        return f"router of {experts} experts: tiny, and chooses the experts of a token; not compressed"
    return f"{type(module).__name__} (its {key} has shape {shape}) is not an nn.Linear; not compressed"


def _router_reason(parts: list[str], module: nn.Linear, experts: int | None) -> str | None:
    """Why a linear is left uncompressed because of its place: a router, an indexer, a gate, cross-attention; None for others. parts: its name."""
    leaf = parts[-1]
    if leaf in ROUTER_NAMES and experts is not None and module.out_features in (1, experts):
        return f"router of {experts} experts: tiny, and chooses the experts of a token; not compressed"
    if any(map(INDEXER.search, parts)):
        return "indexer, which chooses the tokens that attention sees; not compressed"
    if any(map(ROUTER.search, parts)):
        return "part of a router, which chooses the experts of a token; not compressed"
    if any(map(GATE.search, parts[:-1])) and module.out_features <= HEAD_GATE_OUTPUTS:
        return "part of a gate; not compressed"
    if any(map(CROSS.search, parts)):
        return "attends to an encoder, which does not run on a text alone; not compressed"
    if leaf in HEAD_GATES and module.out_features <= HEAD_GATE_OUTPUTS:
        return f"gate of linear attention with only {module.out_features} outputs; not compressed"
    return None


def ties_layers(model: nn.Module) -> bool:
    """Whether some layers of a model have tensors in common."""
    tied = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    return any(in_layer(name) and in_layer(owner) for name, owner in tied)


def in_layer(name: str) -> bool:
    """Whether the module or tensor `name` is in one of several layers."""
    return any(part.isdigit() for part in name.split("."))


def shared_linears(model: nn.Module, prefix: str) -> dict[str, str]:
    """The linears of the layers `prefix` whose weight and bias are those of a linear of an earlier layer, with the name of that one."""
    tied = _tied_between_layers(model, prefix)
    found: dict[str, str] = {}
    for name, owner in tied.items():
        module, leaf = name.rpartition(".")[::2]
        linear, lender = model.get_submodule(module), owner.rpartition(".")[0]
        if leaf != "weight" or not is_plain_linear(linear) or _index(module, prefix) <= _index(lender, prefix):
            continue
        if linear.bias is None or tied.get(f"{module}.bias") == f"{lender}.bias":
            found[module] = lender
    return found


def _shared_weights(model: nn.Module, prefix: str) -> dict[str, str]:
    """The modules of the layers that have a weight in common with another layer and are not compressed by themselves, with the reason."""
    compressed, found = shared_linears(model, prefix), dict[str, str]()
    for pair in _tied_between_layers(model, prefix).items():
        name, owner = (place.rpartition(".")[0] for place in pair)
        if compressed.get(name) == owner:
            found[name] = f"its weight is that of {owner}"
        else:
            found |= dict.fromkeys((name, owner), "several layers share its weight; not compressed")
    return found


def _tied_between_layers(model: nn.Module, prefix: str) -> dict[str, str]:
    """The tensors of the layers `prefix` that are those of another layer, with the name of the other."""
    tied = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    return {name: owner for name, owner in tied if name.startswith(f"{prefix}.") and owner.startswith(f"{prefix}.")}


def _index(name: str, prefix: str) -> int:
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])


def _tiny_reason(inner: str, module: nn.Linear) -> str | None:
    """Why a linear with few outputs relative to its inputs is not compressed; None for others.

    The criterion is relative, because whole models can be that small.
    """
    d_out, d_in = module.out_features, module.in_features
    if d_out > TINY_OUTPUTS or TINY_SHARE * d_out > d_in or ATTENTION.search(inner.rpartition(".")[2]):
        return None
    return f"{d_out} outputs of {d_in} inputs: too small to benefit from it; not compressed unless --include names it"


def _asked_for(name: str, include: Sequence[str]) -> bool:
    """Whether a pattern names the linear itself (`*.in_proj`) and not only a place (`*.mlp.*`)."""
    return any(fnmatchcase(name, pattern) and pattern.rpartition(".")[2].strip("*") for pattern in include)


def _nothing_left(model: nn.Module, skipped: list[SkippedModule]) -> str:
    example = f" ({len(skipped)} modules skipped, such as {skipped[0].name}: {skipped[0].reason})" if skipped else ""
    return f"model {type(model).__name__} has no nn.Linear to compress in its decoder layers{example}; pass a model built of nn.Linear, such as LlamaForCausalLM"


def _check_pattern(
    argument: str, pattern: str, names: list[str], reasons: Mapping[str, str] = MappingProxyType({})
) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    dense = next((name for name in reasons if fnmatchcase(name, pattern)), None)
    if dense is not None:
        raise HalfplateError(
            f"{argument}={pattern!r} matches nothing that can be compressed ({dense}: {reasons[dense]}); drop it"
        )
    leaves = dict.fromkeys("*." + name.rpartition(".")[2] for name in names)
    near = get_close_matches(pattern, [*leaves, *names], n=3, cutoff=0.5) or list(leaves)[:3]
    raise HalfplateError(
        f"{argument}={pattern!r} matches none of the {len(names)} modules; did you mean {' or '.join(map(repr, near))}?"
    )
