"""Running a model on the meta device, which gives shapes and the order of calls, but no values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from halfplate.models.experts.module import experts_of, without_experts

# The only way to run experts in which shapes do not depend on the chosen experts.
EXPERTS = "batched_mm"


@contextmanager
def run_without_values(model: nn.Module, each_expert: bool = False) -> Iterator[None]:
    """Context manager in which `model`, on the meta device, runs as long as it needs no values. Failures raise without printing.

    each_expert: run every expert that is made of linears; there may be hundreds in a layer, so by default none of them runs.
    """
    # torch logs a traceback before it raises.
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch._subclasses.fake_utils")]
    told = [logger.level for logger in loggers]
    experts: dict[int, Any] = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = [(config, getattr(config, "_experts_implementation_internal", None)) for config in experts.values()]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        for config, chosen in before:
            if chosen is not None:
                config._experts_implementation_internal = EXPERTS
        idle = [] if each_expert else list(experts_of(model).values())
        with FakeTensorMode(allow_non_fake_inputs=True), without_experts(idle):
            yield
    finally:
        for logger, level in zip(loggers, told, strict=True):
            logger.setLevel(level)
        for config, chosen in before:
            if chosen is not None:
                config._experts_implementation_internal = chosen
