"""What the verbs check of arguments that the command line can only give as text."""

from pathlib import Path
from typing import Any

from halfplate.errors import HalfplateError


def path_text(argument: str, value: Any) -> str:
    """A path or a name as text; raises HalfplateError for what is neither a `str` nor a `Path`."""
    if not isinstance(value, str | Path):
        raise HalfplateError(
            f"{argument}={value!r} is of type {type(value).__name__}, expected a path or a name as text"
        )
    return str(value)
