"""The name of the argument for the key-value cache, which transformers renamed in 5.24."""

import inspect
from collections.abc import Callable
from typing import Any

OLD_CACHE_ARGUMENT = "past_key_values"  # transformers 5.24 and later accept it with a warning
# In order of preference, including those of recurrent models.
CACHE_NAMES = ("cache", OLD_CACHE_ARGUMENT, "cache_params", "state")


def cache_argument(forward: Callable[..., Any]) -> str:
    """The keyword of the cache in a model's `forward`; the output has an attribute of the same name."""
    return "cache" if "cache" in inspect.signature(forward).parameters else OLD_CACHE_ARGUMENT
