"""Running compressed models fast: choosing a kernel for each linear, and decoding without Python between the layers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfplate.runtime.continuation import greedy
    from halfplate.runtime.prepare import Acceleration, accelerate, explain, restore

__all__ = ["Acceleration", "accelerate", "explain", "greedy", "restore"]


def __getattr__(name: str) -> Any:
    # Imported lazily, because these import transformers, which backends do not need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'continuation' if name == 'greedy' else 'prepare'}"), name)
