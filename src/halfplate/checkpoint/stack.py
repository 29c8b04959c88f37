"""Steps of size: the order in which a checkpoint stores them, and the first of them that fit a size."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from halfplate.arguments import size_in_bytes
from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec
from halfplate.storage.shards import Entry
from halfplate.storage.tensor_file import StoredTensor, usual_order


def stack_order(specs: Mapping[str, WeightSpec], losses: Mapping[str, Sequence[float]] | None = None) -> list[str]:
    """The tensors of the steps of all matrices: the first steps, then always the step that gains most for its bytes.

    losses: of each matrix, the relative error with none of its steps, with the first one, and so on. Without them, the first steps of
        all matrices come first, then the second ones.
    """
    steps = {name: spec.steps() for name, spec in specs.items()}
    order, waiting = [], []
    for place, (name, tensors) in enumerate(steps.items()):
        if tensors:
            waiting.append((-float("inf"), place, name, 0))
    heapq.heapify(waiting)
    while waiting:
        _, place, name, step = heapq.heappop(waiting)
        order += [f"{name}.{tensor}" for tensor in steps[name][step]]
        following = step + 1
        if following < len(steps[name]):
            gain = _gain(specs[name], steps[name][following], (losses or {}).get(name), following)
            heapq.heappush(waiting, (-gain, place, name, following))
    return order


def _gain(spec: WeightSpec, tensors: Sequence[str], losses: Sequence[float] | None, step: int) -> float:
    if losses is None or len(losses) <= step + 1:
        return -float(step)
    layout = spec.layout()
    nbytes = sum(prod(layout[tensor][0]) * layout[tensor][1].itemsize for tensor in tensors)
    return max(losses[step] - losses[step + 1], 0.0) / nbytes


def ordered(entries: Mapping[str, Entry], stack: Sequence[str]) -> dict[str, Entry]:
    """`entries` with those of `stack` behind all others, which have the order of the safetensors library; unchanged without a stack."""
    if not stack:
        return dict(entries)
    behind = set(stack)
    others = usual_order({name: entry for name, entry in entries.items() if name not in behind})
    return {name: entries[name] for name in (*others, *stack)}


@dataclass(frozen=True)
class _Step:
    """A step of one matrix: its tensors by full name, and where the last of them ends."""

    module: str
    number: int
    tensors: dict[str, StoredTensor]

    @property
    def place(self) -> tuple[str, int]:
        return max((str(tensor.path), tensor.start + tensor.nbytes) for tensor in self.tensors.values())


def prefix(
    path: str, specs: Mapping[str, WeightSpec], found: Mapping[str, StoredTensor], fit: int | str
) -> tuple[dict[str, WeightSpec], dict[str, StoredTensor]]:
    """The specifications and the tensors of as many steps as fit in `fit` bytes of weight files, and are there.

    Raises HalfplateError, naming the least, if the first step of every matrix does not fit, and if the checkpoint has no steps.
    """
    limit = size_in_bytes("fit", fit)
    if type(limit) is not int or limit < 1:
        raise HalfplateError(f"fit={fit!r} must be a size above 0, such as 300MB")
    steps = [
        _Step(module, number, {f"{module}.{name}": found[f"{module}.{name}"] for name in names})
        for module, spec in specs.items()
        for number, names in enumerate(spec.steps())
    ]
    if not steps:
        raise HalfplateError(
            f"fit={fit!r}: path={path!r} has one size, because it holds no steps; compress the model with --method bitstack, or leave fit out"
        )
    in_steps = {name for step in steps for name in step.tensors}
    always = {name: tensor for name, tensor in found.items() if name not in in_steps}
    if _as_written(steps, always):
        steps.sort(key=lambda step: step.place)
    else:  # saved by transformers, by name
        steps.sort(key=lambda step: (step.number, step.place))
    headers = sum(min(t.start for t in found.values() if t.path == file) for file in {t.path for t in found.values()})
    spent = headers + sum(tensor.nbytes for tensor in always.values())
    ends = {file: file.stat().st_size for file in {tensor.path for tensor in found.values()}}
    kept, chosen = dict(always), dict.fromkeys((step.module for step in steps), 0)
    first = spent + sum(t.nbytes for step in steps if step.number == 0 for t in step.tensors.values())
    for step in steps:
        spent += sum(tensor.nbytes for tensor in step.tensors.values())
        here = all(tensor.start + tensor.nbytes <= ends[tensor.path] for tensor in step.tensors.values())
        if spent > limit or not here:
            break
        kept |= step.tensors
        chosen[step.module] += 1
    if not all(chosen.values()) or any(tensor.start + tensor.nbytes > ends[tensor.path] for tensor in always.values()):
        raise HalfplateError(
            f"fit={fit!r}: path={path!r} takes at least {first:,} bytes, with one step of every matrix; raise fit, or copy more of the file"
        )
    return {name: spec.at_steps(chosen[name]) if name in chosen else spec for name, spec in specs.items()}, kept


def _as_written(steps: Sequence[_Step], always: Mapping[str, StoredTensor]) -> bool:
    """Whether all steps lie behind everything else, and those of each matrix in their order."""
    end = max(((str(tensor.path), tensor.start) for tensor in always.values()), default=("", 0))
    if any((str(tensor.path), tensor.start) < end for step in steps for tensor in step.tensors.values()):
        return False
    by_module: dict[str, tuple[str, int]] = {}
    for step in steps:  # by module, then by number
        start = min((str(tensor.path), tensor.start) for tensor in step.tensors.values())
        if start < by_module.get(step.module, ("", 0)):
            return False
        by_module[step.module] = step.place
    return True
