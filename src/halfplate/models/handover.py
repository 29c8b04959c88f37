"""The arguments of a decoder layer besides the hidden state, and the values that it passes to later layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from halfplate.errors import HalfplateError

# Tensors that layers pass on, by a name that says where a later layer uses them.
Carried = dict[str, Tensor]
# Tensors among the arguments of all layers, by layer and position among its arguments.
Places = dict[tuple[int, int], Tensor]


class BlockArguments(NamedTuple):
    """Positional and keyword arguments of one layer, without the hidden state.

    handed_on: names of the outputs of this and earlier layers that a later layer uses. In args and kwargs, a FromBlock stands
        for such an output.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    handed_on: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FromBlock:
    """Stands for a value that layer `block` returns besides the hidden state: leaf `leaf` of its other outputs."""

    block: int
    leaf: int

    @property
    def name(self) -> str:
        return f"{self.block}.{self.leaf}"


def copied(arguments: Any) -> Any:
    """A copy of the containers of `arguments`, so that a layer that writes into them does not change the original."""
    return tree_map(lambda leaf: copy.copy(leaf) if isinstance(leaf, MutableMapping) else leaf, arguments)


def filled(arguments: Any, value: Callable[[FromBlock], Any]) -> Any:
    """A copy of `arguments` with `value(place)` in place of each FromBlock."""
    return tree_map(lambda leaf: value(leaf) if isinstance(leaf, FromBlock) else leaf, copied(arguments))


def with_handed_on(recorded: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[BlockArguments]:
    """The arguments of every layer, each with the names of the values to keep after it."""
    last: dict[FromBlock, int] = {}
    for index, arguments in enumerate(recorded):
        last |= {leaf: index for leaf in tree_leaves(arguments) if isinstance(leaf, FromBlock)}
    return [
        BlockArguments(*arguments, frozenset(at.name for at, end in last.items() if at.block <= index < end))
        for index, arguments in enumerate(recorded)
    ]


def hands_on(arguments: Iterable[BlockArguments]) -> bool:
    """Whether any layer passes on more than a hidden state, or writes into a mapping of the model."""
    return any(
        called.handed_on or any(not isinstance(mapping, dict) for _, mapping in _mappings(called.args, called.kwargs))
        for called in arguments
    )


def call_arguments(arguments: BlockArguments, carried: Carried) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to call a layer with: `arguments` with the values that earlier layers passed on."""
    args, kwargs = filled((arguments.args, arguments.kwargs), lambda place: carried.get(place.name))
    entries: dict[str, dict[Any, Any]] = {}
    for name, tensor in carried.items():
        if name.startswith("["):
            store, key, position = json.loads(name)
            if position is None:
                entries.setdefault(store, {})[key] = tensor
            else:
                # The tensors of one entry are in order.
                entries.setdefault(store, {})[key] = (*entries.get(store, {}).get(key, ()), tensor)
    for store, mapping in _mappings(args, kwargs):
        mapping.update(entries.get(store, {}))
    return args, kwargs


def carried_on(
    index: int,
    arguments: BlockArguments,
    called: tuple[tuple[Any, ...], dict[str, Any]],
    outputs: Any,
    carried: Carried,
) -> Carried:
    """The values that layers after `index` need, from its other `outputs` and from the mappings that it wrote into.

    called: the arguments of the call.
    carried: the values passed to this layer.
    Raises HalfplateError for values that are not tensors.
    """
    kept = {name: tensor for name, tensor in carried.items() if name in arguments.handed_on}
    for leaf, value in enumerate(tree_leaves(outputs)):
        name = FromBlock(index, leaf).name
        if name in arguments.handed_on and value is not None:
            kept[name] = _tensor(index, value)
    before = dict(_mappings(arguments.args, arguments.kwargs))
    for store, mapping in _mappings(*called):
        for key, value in mapping.items():
            if key in before[store] and _identical(before[store][key], value):
                continue
            if isinstance(value, tuple | list):
                named = {json.dumps([store, key, at]): _tensor(index, part) for at, part in enumerate(value)}
            else:
                named = {json.dumps([store, key, None]): _tensor(index, value)}
            kept |= named
    return kept


def _mappings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
    """The arguments of a layer that it may write into, by name."""
    named = {str(position): value for position, value in enumerate(args)} | dict(kwargs)
    return ((name, value) for name, value in named.items() if isinstance(value, MutableMapping))


def _identical(value: Any, other: Any) -> bool:
    """Whether two arguments are the same objects, possibly in different containers."""
    leaves, others = tree_leaves(value), tree_leaves(other)
    return len(leaves) == len(others) and all(a is b for a, b in zip(leaves, others, strict=True))


def _tensor(index: int, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise HalfplateError(
            f"layer {index} passes a {type(value).__name__} to later layers, expected tensors, so the model cannot be run layer "
            "by layer; use a method that needs no text (magnitude, rtn)"
        )
    return value


def differing(reference: Sequence[BlockArguments], own: Sequence[BlockArguments]) -> Places:
    """The tensors in which the arguments `own` of all layers differ from `reference`, those of other tokens of the same shape.

    Raises HalfplateError if they differ in more than tensors.
    """
    found: Places = {}
    # Most layers share their masks and positions.
    known: dict[tuple[int, int], bool] = {}
    for block, (before, now) in enumerate(zip(reference, own, strict=True)):
        leaves, form = tree_flatten((before.args, before.kwargs))
        others, other_form = tree_flatten((now.args, now.kwargs))
        if form != other_form:
            raise HalfplateError(_other(block, "their structure"))
        for place, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
            key = (id(leaf), id(other))
            if key not in known:
                known[key] = _same(leaf, other, block)
            if not known[key]:
                found[block, place] = other
    return found


def patched(arguments: BlockArguments, tensors: Mapping[int, Tensor]) -> BlockArguments:
    """`arguments` of a layer with `tensors` put in their positions."""
    if not tensors:
        return arguments
    leaves, form = tree_flatten((arguments.args, arguments.kwargs))
    args, kwargs = tree_unflatten([tensors.get(place, leaf) for place, leaf in enumerate(leaves)], form)
    return BlockArguments(args, kwargs, arguments.handed_on)


def _same(leaf: object, other: object, block: int) -> bool:
    if isinstance(leaf, Tensor) and isinstance(other, Tensor):
        return leaf.shape == other.shape and leaf.dtype == other.dtype and torch.equal(leaf, other)
    if isinstance(leaf, Tensor) or isinstance(other, Tensor) or type(leaf) is not type(other):
        raise HalfplateError(_other(block, f"a {type(leaf).__name__} in one is a {type(other).__name__} in the other"))
    if isinstance(leaf, bool | int | float | str) and leaf != other:
        raise HalfplateError(_other(block, f"{leaf!r} in one is {other!r} in the other"))
    return True


def _other(block: int, what: str) -> str:
    return (
        f"the arguments of layer {block} differ between two batches of tokens in more than tensors ({what}), so the model cannot be run "
        "layer by layer; use a method that needs no text (magnitude, rtn)"
    )
