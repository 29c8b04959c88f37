"""The precision of matrix products while text runs through the layers."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from halfplate.errors import HalfplateError
from halfplate.processor import processor_facts

PRECISIONS = ("auto", "bf16", "fp32")


def resolved(precision: str, device: str) -> str:
    """`bf16` or `fp32`; `auto` is bf16 if the device multiplies it faster. Raises HalfplateError for anything else."""
    if precision not in PRECISIONS:
        raise HalfplateError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return precision


def products(precision: str, device: str) -> AbstractContextManager[Any]:
    """The context in which matrix products run in `precision`; other operations are not changed."""
    if resolved(precision, device) == "fp32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)


def has_tiles() -> bool:
    """Whether torch multiplies bf16 in the tiles of this processor (AMX), several times as fast as vectors do."""
    return bool(_capabilities().get("amx_bf16"))


@cache
def _capabilities() -> dict[str, bool]:
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


@cache
def multiplies_bf16(device: str) -> bool:
    """Whether a kind of device multiplies matrices in bf16 faster than in fp32; a rule and not a timing, so that `--resume` finds the same."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = _capabilities()
    if has_tiles() or bool(found.get("bf16")):  # the latter on ARM
        return True
    # Of AVX-512 without AMX: AMD's processors multiply twice as many numbers in bf16 as in fp32, Intel's fewer.
    return bool(found.get("avx512_bf16")) and processor_facts().get("vendor_id") == "AuthenticAMD"
