"""Finding the tensors of each expert in the files of a model, which hold them one by one or in 3-D tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn

from halfplate.models.experts.layout import Joined, Layout, Slot
from halfplate.models.experts.module import experts_of
from halfplate.storage.tensor_file import Arrangement, StoredTensor

NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass
class ExpertTensors:
    """The tensors of experts among those of a model's files.

    found: those that can be read one by one, by their name in the model, e.g. `….experts.17.gate_proj.weight`.
    made: names in the model of those that are made of the stored ones by a conversion of transformers.
    stored: names in the files of all of them.
    beyond: names in the files of experts that the model does not have.
    misshapen: by the name of a joined tensor, its shape in the file and that of the model.
    """

    found: dict[str, StoredTensor] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    beyond: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


def joined_names(model: nn.Module) -> dict[str, tuple[str, str, Layout]]:
    """The names that the tensors of all experts have in transformers: the name of the module, of the tensor, and the layout."""
    return {
        f"{name}.{joined.name}": (name, joined.name, module.layout)
        for name, module in experts_of(model).items()
        for joined in module.layout.joined
    }


def expert_tensors(
    model: nn.Module,
    renamed: Mapping[str, tuple[str, str | None]],
    converters: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
) -> ExpertTensors:
    """The tensors of the experts of `model`, whose experts are linears.

    renamed: name in the model of each stored name, and the pattern of its conversion (`names_in_model`).
    converters: the conversion of transformers by pattern.
    """
    joined, result = joined_names(model), ExpertTensors()
    for stored, (key, pattern) in renamed.items():
        if key not in joined:
            continue
        module, name, layout = joined[key]
        result.stored.add(stored)
        if pattern is None:
            _from_all(result, key, module, name, layout, tensors[stored])
        elif (linear := _one_by_one(converters[pattern], pattern, name, layout)) is not None:
            number = int(NUMBER.findall(stored)[-1])
            if number < layout.experts:
                result.found[f"{module}.{number}.{linear}.weight"] = tensors[stored]
            elif number >= layout.experts + layout.tensor(name).spare:
                result.beyond.append(stored)
        else:
            result.made |= set(_parts(module, name, layout))
    return result


def _parts(module: str, joined: str, layout: Layout) -> dict[str, tuple[int, Slot]]:
    """The tensors inside a joined one, by their name in the model."""
    slots = {part: slot for part, slot in layout.slots().items() if slot.joined == joined}
    return {
        f"{module}.{number}.{part}": (number, slot) for number in range(layout.experts) for part, slot in slots.items()
    }


def parts_of(model: nn.Module) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """The tensor of all experts that each tensor of an expert belongs to, by its name in the model, and what takes it from there: a view."""
    return {
        part: (key, partial(_part_of, layout, layout.tensor(name), number, slot))
        for key, (module, name, layout) in joined_names(model).items()
        for part, (number, slot) in _parts(module, name, layout).items()
    }


def _part_of(layout: Layout, joined: Joined, number: int, slot: Slot, tensor: Tensor) -> Tensor:
    return slot.of(joined.by_expert(tensor, layout.experts)[number])


def _from_all(result: ExpertTensors, key: str, module: str, name: str, layout: Layout, stored: StoredTensor) -> None:
    joined = layout.tensor(name)
    if stored.shape != joined.shape:
        result.misshapen[key] = stored.shape, joined.shape
        return
    stored = joined.stored_by_expert(stored, layout.experts)
    for part, (number, slot) in _parts(module, name, layout).items():
        result.found[part] = _piece(stored, number, slot)


def _piece(stored: StoredTensor, number: int, slot: Slot) -> StoredTensor:
    """One tensor of one expert of a joined tensor in a file; it is read alone, or with the other half of its expert."""
    one = stored.one_of(number)
    shape = one.shape
    rows = range(shape[1] if slot.transposed else shape[0])[slot.outputs]
    own = (len(rows), *((shape[0],) if slot.transposed else shape[1:]))
    if slot.transposed or rows.step != 1 or one.encoded is not None:
        arranged = Arrangement(shape, slot.transposed, rows.start, rows.stop, rows.step)
        return replace(one, shape=own, arranged=arranged)
    each = one.nbytes // shape[0]
    return replace(one, shape=own, start=one.start + rows.start * each, nbytes=prod(own) * (one.nbytes // prod(shape)))


def _one_by_one(converter: Any, pattern: str, joined: str, layout: Layout) -> str | None:
    """The linear that a stored tensor is, if the conversion only stacks experts and puts gates before up projections; None for any other."""
    tensor = layout.tensor(joined)
    if tensor.bias or tensor.in_rows or tensor.transposed or layout.interleaved:
        return None
    linears, kinds = tensor.linears, [type(operation).__name__ for operation in converter.operations]
    stacks = kinds[:1] == ["MergeModulelist"] and converter.operations[0].dim == 0
    if len(linears) == 2:
        stacks = stacks and kinds[1:] == ["Concatenate"] and converter.operations[1].dim == 1
    elif len(kinds) > 1:
        stacks = False
    sources = list(converter.source_patterns)
    return linears[sources.index(pattern)] if stacks and len(sources) == len(linears) else None
