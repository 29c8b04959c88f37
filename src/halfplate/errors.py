"""The exceptions and warnings that Halfplate raises deliberately.

Every message names the argument, the value received, what was expected and what to do, on one line.
"""


class HalfplateError(Exception):
    """Invalid input; the command line prints the message and exits with `exit_status`.

    docs: page with more explanation, as a path in the repository; the command line prints it on a second line.
    """

    exit_status = 2

    def __init__(self, message: str, docs: str | None = None) -> None:
        super().__init__(message)
        self.docs = docs


class HalfplateWarning(UserWarning):
    """Something that works, but not as expected; the command line prints it on one line."""


class RuinedResult(HalfplateError):
    """A result that is complete but worse than allowed (`--max-kl`), or that failed its self-check."""

    exit_status = 1
