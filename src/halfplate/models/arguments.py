"""The name of the cache of keys and values, which transformers renamed in 5.24."""

import inspect
from collections.abc import Callable
from typing import Any

OLD_CACHE_ARGUMENT = "past_key_values"  # transformers from 5.24 on still takes it, with a warning
# In the order of preference, with those of recurrent models.
CACHE_NAMES = ("cache", OLD_CACHE_ARGUMENT, "cache_params", "state")


def cache_argument(forward: Callable[..., Any]) -> str:
    """The keyword under which a model's `forward` takes its cache, which its output also has as an attribute."""
    return "cache" if "cache" in inspect.signature(forward).parameters else OLD_CACHE_ARGUMENT
