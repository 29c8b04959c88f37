"""The one family of errors that Halfplate raises on purpose.

Every message names the argument, the value received, what was expected and what to do, on one line.
"""


class HalfplateError(Exception):
    """Input that Halfplate cannot work with; the command line prints the message and exits with `exit_status`."""

    exit_status = 2


class RuinedResult(HalfplateError):
    """A result that is complete but worse than the user allowed (`--max-kl`)."""

    exit_status = 1
