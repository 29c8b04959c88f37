"""Text of strangers, shown."""

from typing import Any


def visible(value: Any) -> Any:
    """Text with the characters that steer a terminal or the direction of writing spelt out; anything else as it is.

    They could make a name look like another. Line ends and tabs stay.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(sign if sign.isprintable() or sign in "\n\t" else f"\\u{ord(sign):04x}" for sign in value)


def cell(value: Any) -> str:
    """A value as a table shows it: `-` for None, four digits of a float, thousands set apart."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(visible(str(value)))
