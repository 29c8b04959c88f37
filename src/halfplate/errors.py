"""The one family of errors that Halfplate raises on purpose.

Every message names the argument, the value received, what was expected and what to do, on one line.
"""


class HalfplateError(Exception):
    """Input that Halfplate cannot work with; the command line prints the message and exits with `exit_status`.

    docs: the page that says more, as a path in the repository, where one line cannot; the command line prints it as a
    second line.
    """

    exit_status = 2

    def __init__(self, message: str, docs: str | None = None) -> None:
        super().__init__(message)
        self.docs = docs


class HalfplateWarning(UserWarning):
    """What works, but not as one would expect; the command line prints it as one line."""


class RuinedResult(HalfplateError):
    """A result that is complete but worse than the user allowed (`--max-kl`)."""

    exit_status = 1
