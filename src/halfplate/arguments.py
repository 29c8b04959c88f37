"""Checking arguments of users (flags, files or calls) and converting them to their declared types."""

import os
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from halfplate.errors import HalfplateError

# Options of the command line that are not called as the fields of a recipe.
FLAGS = {"target": "--for"}
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def size_in_bytes(argument: str, value: Any) -> Any:
    """Text such as `600MB` or `1.5 GiB` as bytes; other values as they are. Raises HalfplateError for a unit that is not known."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", value)
    unit = None if match is None else UNITS.get(match[2].upper() or "B")
    if match is None or unit is None:
        raise HalfplateError(
            f"{argument}={value!r} is not a size; expected a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 600MB"
        )
    return int(float(match[1]) * unit)


def path_text(argument: str, value: Any) -> str:
    """A path or a name as text; raises HalfplateError unless it is a `str` or a `Path`."""
    if not isinstance(value, str | Path):
        raise HalfplateError(
            f"{argument}={value!r} is of type {type(value).__name__}, expected a path or a name as text"
        )
    return str(value)


def check_name(argument: str, path: str | Path) -> None:
    """Raise HalfplateError for a file name that is not UTF-8 to the system, because safetensors, tokenizers and the record need UTF-8."""
    try:
        if os.fsencode(path) == str(path).encode("utf-8"):
            return
    except UnicodeEncodeError:
        pass
    raise HalfplateError(
        f"{argument}={str(path)[:80]!r} cannot be read as UTF-8 by this process; set LC_ALL=C.UTF-8, or choose another name"
    )


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, parsed if it is text; raises HalfplateError naming `name`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise HalfplateError(f"{name}={value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, UnionType):
        for choice in sorted(arguments, key=lambda choice: choice is str):
            try:
                return typed(name, value, choice)
            except HalfplateError:
                continue
    elif origin is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif hint is NoneType:
        if value is None:
            return None
    elif hint is bool:
        known = {True: True, False: False, "true": True, "false": False}
        if isinstance(value, bool | str) and value in known:
            return known[value]
    elif hint in (int, float):
        # YAML 1.1 parses 1e-3 as text.
        if not isinstance(value, bool) and isinstance(value, int | str if hint is int else int | float | str):
            try:
                return hint(value)
            except ValueError:
                pass
    elif isinstance(value, hint):
        return value
    raise HalfplateError(f"{name}={value!r} is not of the right type; expected {_spoken(hint)}")


def _spoken(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_spoken(choice) for choice in arguments if choice is not NoneType)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return "a list of texts"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, str(hint))
