"""Checking, before any work, whether the requested device is available."""

from typing import Any

import torch

from halfplate.errors import HalfplateError


def device_kind(name: Any) -> str:
    """The type (`cpu`, `cuda`, ...) of the torch device `name`; raises HalfplateError if torch does not know it."""
    try:
        return torch.device(name).type
    except (RuntimeError, TypeError):
        raise HalfplateError(f"device={name!r} is not a torch device; try cpu or cuda") from None


def check_device(name: Any) -> None:
    """Raise HalfplateError unless this machine can compute on the torch device `name`."""
    kind = device_kind(name)
    if kind == "meta":
        raise HalfplateError(f"device={name!r} stores no values; try --device cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise HalfplateError(f"device={name!r} is not available (torch finds no CUDA GPU); try --device cpu")
