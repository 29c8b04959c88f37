"""Text of strangers, shown."""

from typing import Any


def visible(value: Any) -> Any:
    """Text with the characters that steer a terminal or the direction of writing spelt out; anything else as it is.

    They could make a name look like another. Line ends and tabs stay.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(sign if sign.isprintable() or sign in "\n\t" else f"\\u{ord(sign):04x}" for sign in value)
