"""Checking that stored tensors hold only valid values."""

from collections.abc import Mapping

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec


def check_stored(spec: WeightSpec, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise HalfplateError unless every tensor of the matrix `name` holds values that the format allows.

    Positions must increase, permutations be complete, codes be in range, padding be 0, scales be 0 or more, and all numbers be
    finite. Tensors on the meta device are not checked.

    tensors: by name below the module, in the shapes and types of `spec.layout()`, with or without a bias.
    """
    for part, tensor in tensors.items():
        if not tensor.is_meta:
            check_tensor(spec, part, tensor, f"{name}.{part}")


def check_tensor(spec: WeightSpec, tensor: str, values: Tensor, name: str) -> None:
    """`check_stored` for one tensor `tensor`, whose full name is `name`."""
    if values.is_floating_point():
        if not bool(values.isfinite().all()):
            raise HalfplateError(f"{name} holds NaN or inf, expected finite values; copy or write the checkpoint again")
        if tensor.endswith(("_scales", "_super_minima")) and bool((values < 0).any()):
            raise HalfplateError(
                f"{name} holds {values.min().item():.3g}, expected scales of 0 or more; the file is damaged, write it again"
            )
    for part in spec.classes:
        if tensor in part.layout(spec):
            part.check(spec, tensor, values, name)
