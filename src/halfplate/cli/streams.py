"""Standard output and error in any locale: what a stream's encoding does not have is replaced, never an error."""

import codecs
import sys

# What Halfplate itself prints beyond ASCII, in ASCII; anything else is spelt as Python spells it, such as \u4e2d.
IN_ASCII = {"×": "x", "·": "*", "…": "...", "–": "-", "—": "-", "→": "->", "‖": "||", "≤": "<=", "≥": ">=", "≈": "~"}
HANDLER = "halfplate.in_ascii"


def print_in_any_locale() -> None:
    """Let both streams replace what they cannot print."""
    codecs.register_error(HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        # A stream that a caller put in their place may have no encoding of its own.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    spelt = (IN_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode("ascii") for sign in signs)
    return "".join(spelt), error.end
