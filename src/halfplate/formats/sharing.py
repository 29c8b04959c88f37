"""Matrices that share their input wrapper: solved as one and stored separately, with the wrapper in the first one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import lcm

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats.chain import Chain
from halfplate.formats.linear import CompressedMatrix
from halfplate.formats.spec import WeightSpec


def check_shared(specs: Mapping[str, WeightSpec]) -> None:
    """Raise HalfplateError unless every `in_shared` and `same_as` names a matrix that stores what is shared, and that fits."""
    for name, spec in specs.items():
        if spec.same_as is not None and replace(specs.get(spec.same_as, spec), same_as=spec.same_as) != spec:
            raise HalfplateError(
                f"quantization_config.modules[{name!r}].same_as={spec.same_as!r} names no compressed module of this form; copy or write the checkpoint again"
            )
        if spec.in_shared is None:
            continue
        entry = f"quantization_config.modules[{name!r}].in_shared={spec.in_shared!r}"
        lender = specs.get(spec.in_shared)
        if lender is None:
            raise HalfplateError(f"{entry} names no compressed module; copy or write the checkpoint again")
        if lender.in_shared is not None:
            raise HalfplateError(
                f"{entry} names a module that stores no input wrapper of its own; write the checkpoint again"
            )
        for field in ("d_in", "in_block", "wrapper_dtype"):
            if getattr(lender, field) != getattr(spec, field):
                raise HalfplateError(
                    f"{entry}: {field} is {getattr(lender, field)} there and {getattr(spec, field)} here, expected the same; write the checkpoint again"
                )


def connect(model: nn.Module) -> None:
    """Let every compressed module of `model` that borrows tensors find the module that stores them; names are relative to `model`."""
    for module in model.modules():
        if isinstance(module, CompressedMatrix) and module.spec.lender is not None:
            lender = model.get_submodule(module.spec.lender)
            module.lend(lender if isinstance(lender, CompressedMatrix) else None)


def share(specs: Mapping[str, WeightSpec], groups: Iterable[Sequence[str]]) -> dict[str, WeightSpec]:
    """`specs` with one input wrapper for each of `groups`, stored by the first name; without groups, nothing changes."""
    shared = dict(specs)
    for first, *others in groups:
        for name in others:
            shared[name] = replace(specs[name], in_shared=first if specs[name].in_block else None)
    return shared


def sharing_groups(specs: Mapping[str, WeightSpec]) -> list[list[str]]:
    """The names of `specs` in groups that share a wrapper; a matrix that shares none is a group of its own."""
    groups: dict[str, list[str]] = {name: [name] for name, spec in specs.items() if spec.in_shared is None}
    for name, spec in specs.items():
        if spec.in_shared is not None:
            groups.setdefault(spec.in_shared, []).append(name)
    return list(groups.values())


def stacked_spec(specs: Sequence[WeightSpec]) -> WeightSpec:
    """The specification of all `specs` stacked, each padded so that no block of A straddles two.

    Raises HalfplateError unless they differ only in d_out.
    """
    first = specs[0].alone
    for spec in specs:
        if replace(spec.alone, d_out=first.d_out) != first:
            raise HalfplateError(
                f"in_shared={spec.in_shared!r}: {spec} and {first} are solved as one matrix and may differ only in d_out"
            )
    return first if len(specs) == 1 else replace(first, d_out=sum(_padded(spec) for spec in specs))


def stacked(weights: Sequence[Tensor], specs: Sequence[WeightSpec]) -> Tensor:
    """`weights` (d_out, d_in) stacked with rows of zeros between them, as in `stacked_spec`."""
    if len(weights) == 1:
        return weights[0]
    padded = [
        functional.pad(weight, (0, 0, 0, _padded(spec) - spec.d_out))
        for weight, spec in zip(weights, specs, strict=True)
    ]
    return torch.cat(padded)


def split(matrix: Chain, specs: Sequence[WeightSpec]) -> list[Chain]:
    """The matrices of `specs` from the stacked matrix, exactly; all have its input wrapper."""
    if len(specs) == 1:
        return [matrix]
    matrices, start = [], 0
    for spec in specs:
        outer = tuple(part.rows(spec, start) for part in matrix.outer)
        matrices.append(Chain(spec, matrix.core.rows(spec, start), outer))
        start += _padded(spec)
    return matrices


def _padded(spec: WeightSpec) -> int:
    """Number of rows including padding before the next matrix, so that nothing straddles two."""
    together = lcm(*(part.rows_together(spec) for part in spec.classes))
    return -(-spec.d_out // together) * together
