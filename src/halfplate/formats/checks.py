"""Whether stored tensors hold only what a writer leaves."""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.packing import check_padding, check_positions, unpack
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec


def check_stored(spec: WeightSpec, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise HalfplateError unless every tensor of the matrix `name` holds values that the format allows.

    tensors: by name below the module, in the shapes and types of `spec.layout()`, a bias among them or not; those on the
    meta device pass. Positions rise, permutations are some, codes are in range, padding is 0, scales are 0 or more, and all numbers are finite.
    """
    for part, tensor in tensors.items():
        if not tensor.is_meta:
            check_part(spec, part, tensor, f"{name}.{part}")


def check_part(spec: WeightSpec, part: str, tensor: Tensor, name: str) -> None:
    """`check_stored` of the one tensor `part`, whose full name is `name`."""
    if tensor.is_floating_point():
        if not bool(tensor.isfinite().all()):
            raise HalfplateError(f"{name} holds NaN or inf, expected finite values; copy or write the checkpoint again")
        if part.endswith("_scales") and bool((tensor < 0).any()):
            raise HalfplateError(
                f"{name} holds {tensor.min().item():.3g}, expected scales of 0 or more; the file is damaged, write it again"
            )
    elif part == "weight_index":
        check_positions(tensor, spec.pattern.kept(spec.d_in), spec.pattern, name)
    elif part == "weight":
        _check_codes(spec, tensor.reshape(spec.d_out, -1), name)
    elif part == "weight_permutation":
        if not torch.equal(
            tensor.long().sort().values, torch.arange(spec.d_in, dtype=torch.int64, device=tensor.device)
        ):
            raise HalfplateError(
                f"{name} is not a permutation of 0 to {spec.d_in - 1}; the file is damaged, write it again"
            )
    elif tensor.dtype == torch.int8 and bool((tensor == -128).any()):
        raise HalfplateError(f"{name} holds -128, expected -127 to 127; the file is damaged, write it again")


def _check_codes(spec: WeightSpec, packed: Tensor, name: str) -> None:
    quantizer, kept = QUANTIZERS.get(spec.core_dtype), spec.pattern.kept(spec.d_in)
    least, greatest = (number + (1 << quantizer.bits - 1) for number in quantizer.range)
    if (least, greatest) != (0, (1 << quantizer.bits) - 1):
        codes = unpack(packed, kept, quantizer.bits)
        outside = (codes < least) | (codes > greatest)
        if bool(outside.any()):
            raise HalfplateError(
                f"{name} holds the code {int(codes[outside][0])}, expected {least} to {greatest}; the file is damaged, write it again"
            )
    check_padding(packed, kept, quantizer.bits, name)
