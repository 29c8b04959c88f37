"""The interface of tasks that engines run."""

from typing import Any, ClassVar, Protocol

from halfplate.engines.needs import Needs


class Task(Protocol):
    """A piece of work that reads its input from files and gives the same result in any process.

    keeps: the class of the object that a process keeps open between such tasks; created without arguments, and closed by `close`.
    """

    keeps: ClassVar[type[Any]]

    @property
    def cost(self) -> float:
        """Relative cost; the most expensive task runs first."""

    @property
    def needs(self) -> Needs:
        """The resources that it needs."""

    def run(self, kept: Any) -> object:
        """Run the task with the object that this process keeps, an instance of `keeps`."""
