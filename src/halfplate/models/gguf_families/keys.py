"""The metadata of a GGUF file. Every key must be read by exactly one place that knows its meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from halfplate.models.gguf_families.family import REQUIRED

LARGEST = 2**31
# Keys that only describe the file; `tokenizer.` is read by the tokenizer reader.
DESCRIPTIONS = ("general.", "tokenizer.", "split.", "quantize.", "imatrix.", "mradermacher.")


class Unreadable(ValueError):
    """A file with content that has no counterpart in the model; the message names the key or tensor."""


def shortest(value: float) -> float:
    """The shortest decimal number with the same float32 value: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


class Keys:
    """The keys of one architecture; keys that were read are remembered."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata, self.prefix = metadata, f"{architecture}."
        self.taken: set[str] = set()

    def has(self, name: str) -> bool:
        return self.prefix + name in self.metadata

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `name`: an int or float within bounds, a bool or a str; raises Unreadable if it has another type or is missing."""
        key = self.prefix + name
        self.taken.add(key)
        if key not in self.metadata:
            if default is REQUIRED:
                raise Unreadable(f"the key {key} is missing")
            return default
        value = self.metadata[key]
        # An array with one value per layer, if all are equal.
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        if kind is float and type(value) in (int, float) and math.isfinite(value):
            return shortest(value)
        if kind is int and type(value) is int and 0 <= value < LARGEST:
            return value
        if kind in (bool, str) and type(value) is kind:
            return value
        raise Unreadable(f"the key {key} is {str(value)[:60]!r}, expected one {kind.__name__} in the range of 32 bits")

    def list(self, name: str) -> Any:
        """The value of `name`, unconverted; None if it is missing."""
        self.taken.add(self.prefix + name)
        return self.metadata.get(self.prefix + name)

    def expect(self, name: str, kind: type, value: Any, why: str) -> None:
        """Raise Unreadable if the key exists with a value other than `value`."""
        if (found := self.take(name, kind, value)) != value:
            raise Unreadable(f"the key {self.prefix}{name} is {found!r}, and {why}")

    def check_all_taken(self) -> None:
        """Raise Unreadable for a key that was not read and is not merely descriptive."""
        for key in self.metadata:
            if key not in self.taken and not key.startswith(DESCRIPTIONS):
                raise Unreadable(f"the key {key} ({str(self.metadata[key])[:60]}) has no known meaning here")
