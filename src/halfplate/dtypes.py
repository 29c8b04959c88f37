"""Names of the element types that tensors are stored in."""

from collections.abc import Iterable

import torch

from halfplate.errors import HalfplateError

STORED: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WRAPPER_DTYPES = (*STORED, "int8")


def check_dtype(name: str, argument: str, known: Iterable[str]) -> None:
    """Raise HalfplateError naming `argument` unless `name` is one of `known`."""
    if name not in known:
        raise HalfplateError(f"{argument}={name!r} is not one of {', '.join(known)}")


def stored_dtype(name: str, argument: str) -> torch.dtype:
    """The floating-point type `name`; raises HalfplateError naming `argument` if it is not one of `STORED`."""
    check_dtype(name, argument, STORED)
    return STORED[name]
