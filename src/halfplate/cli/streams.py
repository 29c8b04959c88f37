"""Standard output and error in any locale: characters that the encoding lacks are replaced and never raise an error."""

import codecs
import sys

# ASCII replacements of the non-ASCII characters that Halfplate prints; others are escaped as in Python, e.g. \u4e2d.
IN_ASCII = {"×": "x", "·": "*", "…": "...", "–": "-", "—": "-", "→": "->", "‖": "||", "≤": "<=", "≥": ">=", "≈": "~"}
HANDLER = "halfplate.in_ascii"


def print_in_any_locale() -> None:
    """Let both streams replace characters that they cannot print."""
    codecs.register_error(HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        # A replaced stream may not have an encoding.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    spelt = (IN_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode("ascii") for sign in signs)
    return "".join(spelt), error.end
