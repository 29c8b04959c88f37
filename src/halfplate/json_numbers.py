"""Numbers that JSON has no words for."""

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """The value with null in the place of every NaN and infinity; mappings and sequences as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
