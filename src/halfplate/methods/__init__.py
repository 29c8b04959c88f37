"""Compression methods, one file or folder each.

To add one: write its file, add a line to `METHODS`, add a row to the table in tests/methods/test_methods.py
(CONTRIBUTING.md walks through it).
"""

from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from halfplate.errors import HalfplateError
from halfplate.methods.base import Method, Solution

__all__ = ["METHODS", "Method", "Solution", "create", "method_class"]

METHODS: dict[str, str] = {
    "magnitude": "halfplate.methods.magnitude:Magnitude",
    "wanda": "halfplate.methods.wanda:Wanda",
    "ria": "halfplate.methods.ria:RIA",
    "nowag": "halfplate.methods.nowag:NoWag",
    "sparsegpt": "halfplate.methods.sparsegpt:SparseGPT",
    "armor": "halfplate.methods.armor:Armor",
    "rtn": "halfplate.methods.rtn:RoundToNearest",
    "slim": "halfplate.methods.slim:SLiM",
    "gptq": "halfplate.methods.gptq:GPTQ",
    "denoiserotator": "halfplate.methods.denoiserotator:DenoiseRotator",
}


def method_class(name: str) -> type[Method]:
    """Import the class of the method `name`; raises HalfplateError with the nearest names if there is none."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise HalfplateError(f"method={name!r} is unknown; {hint}available: {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found


def create(name: str, **options: Any) -> Method:
    """Make the method `name` with its options; raises HalfplateError on an unknown name or option."""
    found = method_class(name)
    known = [field.name for field in fields(found)]
    for option in options:
        if option not in known:
            raise HalfplateError(
                f"{option}={options[option]!r} is not an option of method {name!r}; available: {', '.join(known) or 'none'}"
            )
    return found(**options)
