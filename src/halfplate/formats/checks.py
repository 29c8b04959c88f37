"""Whether stored tensors hold only what a writer leaves."""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfplate.dtypes import GRIDS
from halfplate.errors import HalfplateError
from halfplate.formats.packing import check_padding, check_positions
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


def _check_codes(spec: WeightSpec, codes: Tensor, name: str) -> None:
    if spec.core_dtype == "int8" and bool((codes == 0).any()):
        raise HalfplateError(f"{name} holds the code 0, expected 1 to 255; the file is damaged, write it again")
    check_padding(codes, spec.pattern.kept(spec.d_in), GRIDS[spec.core_dtype], name)
