"""Names of the element types that tensors are stored in."""

import torch

from halfplate.errors import HalfplateError

STORED: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def stored_dtype(name: str, argument: str) -> torch.dtype:
    """The torch type called `name`; raises HalfplateError naming `argument` if it is none of `STORED`."""
    if name not in STORED:
        raise HalfplateError(f"{argument}={name!r} is not one of {', '.join(STORED)}")
    return STORED[name]
