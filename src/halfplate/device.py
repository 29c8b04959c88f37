"""Whether the device asked for is there, decided before any work is done."""

from typing import Any

import torch

from halfplate.errors import HalfplateError


def device_kind(name: Any) -> str:
    """`cpu`, `cuda` and the like, of the torch device `name`; raises HalfplateError if torch knows no such device."""
    try:
        return torch.device(name).type
    except (RuntimeError, TypeError):
        raise HalfplateError(f"device={name!r} is not a torch device; try cpu or cuda") from None


def check_device(name: Any) -> None:
    """Raise HalfplateError unless `name`, a torch device, is one that this machine can compute on."""
    kind = device_kind(name)
    if kind == "meta":
        raise HalfplateError(f"device={name!r} stores no values; try --device cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise HalfplateError(f"device={name!r} is not available (torch finds no CUDA GPU); try --device cpu")
