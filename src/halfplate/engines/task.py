"""What an engine runs."""

from typing import Any, ClassVar, Protocol

from halfplate.engines.needs import Needs


class Task(Protocol):
    """A piece of work, which reads what it needs from files and gives the same result in any process.

    keeps: the class of what a process keeps open between such tasks; made without arguments, closed by `close`.
    """

    keeps: ClassVar[type[Any]]

    @property
    def cost(self) -> float:
        """For deciding what goes first."""

    @property
    def needs(self) -> Needs:
        """What it takes of a machine."""

    def run(self, kept: Any) -> object:
        """Do it, with what this process has open, an object of `keeps`."""
