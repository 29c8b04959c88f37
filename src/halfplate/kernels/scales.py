"""Scales under super-scales, as the fp16 scales of each group that kernels multiply with."""

from collections.abc import Mapping

from torch import Tensor

from halfplate.formats.quantizers import Quantizer, quantizer_of, storage_of
from halfplate.formats.spec import WeightSpec

SCALES = "weight_scales"


def plain_scales(spec: WeightSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weight_scales`, fp16 (d_out, groups), of the stored tensors of a matrix; empty if its core is not quantised."""
    quantizer = quantizer_of(spec.core_dtype)
    if quantizer is None:
        return {}
    stored = tuple(tensors[name] for name in _names(quantizer))
    (scales,) = storage_of(quantizer, spec.group).parameters(quantizer.stored, stored, -(-spec.d_in // spec.group))
    return {SCALES: scales.contiguous()}


def with_stored_scales(spec: WeightSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the stored form of its `weight_scales`: undoes `plain_scales`."""
    quantizer, found = quantizer_of(spec.core_dtype), dict(tensors)
    if quantizer is not None:
        stored = storage_of(quantizer, spec.group).stored(quantizer.stored, (found.pop(SCALES),))
        found |= dict(zip(_names(quantizer), stored, strict=True))
    return found


def _names(quantizer: Quantizer) -> list[str]:
    return [f"weight_{name}" for name in storage_of(quantizer).layout(quantizer.stored, 1)]
