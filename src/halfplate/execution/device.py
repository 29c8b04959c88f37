"""Whether the device asked for is there, decided before any work is done."""

import torch

from halfplate.errors import HalfplateError


def check_device(name: str) -> None:
    """Raise HalfplateError unless `name`, a torch device, is one that this machine can compute on."""
    if torch.device(name).type == "meta":
        raise HalfplateError(f"device={name!r} holds no values to compute with; try --device cpu")
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise HalfplateError(f"device={name!r} is not there (torch finds no CUDA GPU); try --device cpu")
