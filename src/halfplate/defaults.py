"""torch's defaults as Halfplate computes with them, whatever the process that calls it has set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, new tensors are fp32 on the processor, nothing is cast on its own, and gradients can be taken.

    Also a decorator. It undoes `torch.set_default_dtype`, `torch.set_default_device`, `torch.device` as a context, autocast,
    `torch.inference_mode` and `torch.no_grad` for the time of the call.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        # As a context it slows every call of torch down, so it is entered only if it changes something.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield
