"""torch's default settings for Halfplate's own computations, whatever the calling process has set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Context manager in which new tensors are fp32 on the CPU, without autocast, and with gradients enabled.

    It is also a decorator. It temporarily undoes `torch.set_default_dtype`, `torch.set_default_device`, `torch.device` as a context,
    autocast, `torch.inference_mode` and `torch.no_grad`.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        # This context slows down every torch call, so it is only entered if it changes something.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield
