"""Choosing the sizes of a smaller model: equal in every layer, as a plain configuration needs, and known before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from math import gcd

from halfplate.errors import HalfplateError
from halfplate.transforms.structure.graph import CHANNELS, HEADS, HIDDEN, LAYERS, PAIRS, WORDS, StructureGraph

# Groups of a quantised core, blocks of GGUF types and kernels divide such widths; larger ones are for groups of 128 and the K types of GGUF.
STEP = 32
STEPS = (256, 128, 64)
FINE = 32  # steps at least in a width for which a larger step is taken
HEAD_STEP = 8  # of the values in a head


def options(graph: StructureGraph, kind: str) -> list[int]:
    """The sizes that dimensions of this kind may have, ascending: every width is a multiple of `step_of` what it was."""
    size = graph.size(kind)
    return [units for units in range(1, size) if _useful(graph, kind, units)] + [size]


def _useful(graph: StructureGraph, kind: str, units: int) -> bool:
    if not graph.allowed({kind: units}):
        return False
    if kind == LAYERS:
        return True
    if kind in (CHANNELS, HIDDEN):
        return units % step_of(graph.size(kind)) == 0
    head = 2 * units if kind == PAIRS else graph.head_dim
    heads = units if kind == HEADS else graph.heads
    # The width of k and v; that of q is a multiple of it.
    wide = heads * head % gcd(STEP, graph.heads * graph.head_dim) == 0
    return wide and head % gcd(HEAD_STEP, graph.head_dim) == 0


def step_of(width: int) -> int:
    """What a smaller width is a multiple of: the largest of STEPS that divides `width` into enough parts, or what it shares with STEP."""
    fitting = (step for step in STEPS if width % step == 0 and width >= FINE * step)
    return next(fitting, gcd(STEP, width))


def one_size(graph: StructureGraph, kind: str, budget: int, keep: float) -> dict[str, int]:
    """The largest size of the dimensions of one kind with which the model has at most `budget` parameters."""
    found = [{kind: units} for units in options(graph, kind)]
    fitting = [sizes for sizes in found if graph.parameters(sizes) <= budget]
    if not fitting:
        raise _too_small(graph, found[0], budget, keep)
    return fitting[-1]


def two_sizes(graph: StructureGraph, attention: str, budget: int, keep: float) -> dict[str, int]:
    """Sizes of a kind of dimension in attention, and of the MLP, with which the model has at most `budget` parameters.

    Attention keeps at least the share that the layers keep on average, because its few sizes are far apart; the MLP, whose sizes are
    close, fills the budget. If that leaves the MLP nothing, attention becomes smaller.
    """
    outer = graph.parameters({LAYERS: 0})
    share = (budget - outer) / (graph.parameters() - outer)
    heads, channels = options(graph, attention), options(graph, CHANNELS)
    for units in _preferred(heads, share * graph.size(attention)):
        fitting = [
            sizes for width in channels if graph.parameters(sizes := {attention: units, CHANNELS: width}) <= budget
        ]
        if fitting:
            return fitting[-1]
    raise _too_small(graph, {attention: heads[0], CHANNELS: channels[0]}, budget, keep)


def _preferred(sizes: Sequence[int], wanted: float) -> Iterator[int]:
    """The smallest of `sizes` that is at least `wanted`, then the smaller ones, largest first."""
    first = next(size for size in sizes if size >= wanted or size == sizes[-1])
    yield from (size for size in reversed(sizes) if size <= first)


def _too_small(graph: StructureGraph, least: Mapping[str, int], budget: int, keep: float) -> HalfplateError:
    others = "" if LAYERS in least else ", or use depth, which removes whole layers"
    if all(units == graph.size(kind) for kind, units in least.items()):
        return HalfplateError(
            f"keep={keep:g}: nothing of this model can go: it has {spoken(graph, least)}, the fewest that can stay; use keep 1{others}"
        )
    # Of the model as it is: `graph` may have biases in addition. Both roundings are upwards, so that this share works.
    share = math.ceil(graph.parameters(least) * keep / max(budget, 1) * 10_000) / 10_000
    return HalfplateError(
        f"keep={keep:g} is too small: with {spoken(graph, least)}, the fewest that can stay, the model has {share:.4f} of its parameters; "
        f"use keep {share:.4f} or more{others}"
    )


def spoken(graph: StructureGraph, sizes: Mapping[str, int]) -> str:
    """What stays of a model, in words."""
    return ", ".join(f"{units} of {graph.size(kind)} {WORDS[kind]}" for kind, units in sizes.items())
