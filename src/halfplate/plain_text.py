"""Displaying untrusted text."""

from typing import Any


def visible(value: Any) -> Any:
    """Text in which characters that control a terminal or the writing direction are escaped.

    They could make one name look like another. Line ends and tabs are kept.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(sign if sign.isprintable() or sign in "\n\t" else f"\\u{ord(sign):04x}" for sign in value)


def cell(value: Any) -> str:
    """A value in a table: `-` for None, four digits of a float, thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(visible(str(value)))
