"""Compression methods, one file or folder each.

To add one: write its file, add a line to `METHODS`, add a row to the table in tests/methods/test_methods.py
(CONTRIBUTING.md walks through it). Other packages add theirs by an entry point (docs/extending.md).
"""

from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

from halfplate import plugins
from halfplate.errors import HalfplateError
from halfplate.methods.base import Method, Solution

__all__ = ["METHODS", "Method", "Solution", "create", "method_class", "method_names"]

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


def method_names() -> list[str]:
    """The names of all methods: Halfplate's own, then those of other installed packages, whether they work or not."""
    return [*METHODS, *(name for name in plugins.installed(plugins.METHODS) if name not in METHODS)]


def method_class(name: str) -> type[Method]:
    """Import the class of the method `name`.

    Raises HalfplateError with the nearest names if there is none, and where two packages claim the name or the class of
    another package is broken.
    """
    point = plugins.find(plugins.METHODS, name, "method", own=name in METHODS)
    if point is not None:
        return _foreign(point)
    if name not in METHODS:
        raise plugins.unknown("method", name, method_names())
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found


def _foreign(point: EntryPoint) -> type[Method]:
    found = plugins.load(point, "method")
    if not (isinstance(found, type) and issubclass(found, Method) and is_dataclass(found)):
        raise plugins.broken(point, "method", "is no dataclass derived from halfplate.methods.Method")
    if getattr(found, "name", None) != point.name:
        raise plugins.broken(point, "method", f"calls itself {getattr(found, 'name', None)!r}")
    missing = found.__abstractmethods__ | ({"summary"} if not hasattr(found, "summary") else set())
    if missing:
        raise plugins.broken(point, "method", f"lacks {', '.join(sorted(missing))}")
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
