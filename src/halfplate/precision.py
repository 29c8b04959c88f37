"""The precision of matrix products while text runs through the layers."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from halfplate.errors import HalfplateError

PRECISIONS = ("auto", "bf16", "fp32")


def resolved(precision: str, device: str) -> str:
    """`bf16` or `fp32`; `auto` is bf16 if the device multiplies it faster. Raises HalfplateError for anything else."""
    if precision not in PRECISIONS:
        raise HalfplateError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return "bf16" if _multiplies_bf16(device) else "fp32"
    return precision


def products(precision: str, device: str) -> AbstractContextManager[Any]:
    """The context in which matrix products run in `precision`; other operations are not changed."""
    if resolved(precision, device) == "fp32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)


def _multiplies_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
