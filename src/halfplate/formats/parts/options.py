"""Checking the options of parts, which files of strangers may hold."""

from typing import TYPE_CHECKING

from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec


def whole_numbers(spec: "WeightSpec", part: str, **most: int) -> tuple[int, ...]:
    """The options of a part, all whole numbers from 1 to a largest value; raises HalfplateError for others, and for unknown or missing ones."""
    options = spec.options(part)
    if options.keys() != most.keys():
        raise HalfplateError(
            f"parts: {part} has the options {', '.join(sorted(options)) or 'none'}, expected {', '.join(most)}"
        )
    for name, limit in most.items():
        value = options[name]
        if type(value) is not int or not 1 <= value <= limit:
            raise HalfplateError(
                f"{name}={value!r} of a matrix {spec.d_out}×{spec.d_in} must be a whole number from 1 to {limit}"
            )
    return tuple(int(options[name]) for name in most)
