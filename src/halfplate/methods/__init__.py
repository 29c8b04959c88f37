"""Compression methods, one file or folder each.

To add one: write its file, add a line to `METHODS`, and add a row to the table in tests/methods/test_methods.py (see
CONTRIBUTING.md). Other packages add theirs through an entry point (docs/extending.md).
"""

from dataclasses import fields, is_dataclass
from typing import Any

from halfplate.errors import HalfplateError
from halfplate.methods.base import Method, Solution
from halfplate.registry import Registry

__all__ = ["METHODS", "Method", "Solution", "create"]


def _fault(found: Any, name: str) -> str | None:
    if not (isinstance(found, type) and issubclass(found, Method) and is_dataclass(found)):
        return "is not a dataclass derived from halfplate.methods.Method"
    if getattr(found, "name", None) != name:
        return f"calls itself {getattr(found, 'name', None)!r}"
    missing = found.__abstractmethods__ | ({"summary"} if not hasattr(found, "summary") else set())
    return f"lacks {', '.join(sorted(missing))}" if missing else None


METHODS: Registry[type[Method]] = Registry(
    "method",
    "halfplate.methods",
    {
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
        "svd": "halfplate.methods.svd:WeightedSVD",
        "bitstack": "halfplate.methods.bitstack:BitStackMethod",
        "rocket": "halfplate.methods.rocket:Rocket",
        "cospadi": "halfplate.methods.cospadi:CoSpaDi",
        "monarch": "halfplate.methods.monarch:MonarchMethod",
        "gqsa": "halfplate.methods.gqsa:GQSA",
    },
    _fault,
)


def create(name: str, **options: Any) -> Method:
    """The method `name` with its options; raises HalfplateError for an unknown name or option."""
    found = METHODS.get(name)
    known = [field.name for field in fields(found)]
    for option in options:
        if option not in known:
            raise HalfplateError(
                f"{option}={options[option]!r} is not an option of method {name!r}; available: {', '.join(known) or 'none'}"
            )
    return found(**options)
