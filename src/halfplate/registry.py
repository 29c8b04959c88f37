"""Registries of named objects: Halfplate's own, and those of other installed packages, found by entry points (docs/extending.md)."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from halfplate.errors import HalfplateError

T = TypeVar("T")


class Registry(Generic[T]):
    """The objects that a user chooses by name. Nothing is imported before it is requested.

    argument: name of the argument in error messages.
    group: entry point group through which other packages add objects; empty if they cannot.
    own: `module:attribute` by name.
    fault: returns what is wrong with an object of another package, None if nothing is.
    """

    def __init__(
        self,
        argument: str,
        group: str,
        own: dict[str, str],
        fault: Callable[[Any, str], str | None] = lambda found, name: None,
    ) -> None:
        self.argument, self.group, self.own, self._fault = argument, group, own, fault

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """Halfplate's own names, then those of other packages, including broken ones."""
        return [*self.own, *(name for name in installed(self.group) if name not in self.own)]

    def get(self, name: str) -> T:
        """The object with that name; raises HalfplateError with the nearest name if there is none, and for a broken package."""
        point = self.check(name)
        if point is not None:
            return self.load(point)
        module, _, attribute = self.own[name].partition(":")
        found: T = getattr(import_module(module), attribute)
        return found

    def check(self, name: str) -> EntryPoint | None:
        """Raise HalfplateError, with the nearest name, if nothing is registered under `name`; imports nothing."""
        point = self.point(name)
        if point is None and name not in self.own:
            raise unknown(self.argument, name, self.names())
        return point

    def point(self, name: str, argument: str | None = None) -> EntryPoint | None:
        """The entry point of another package, None if there is none.

        argument: as in the class.
        Raises HalfplateError for a name that is claimed twice, because the choice would be arbitrary.
        """
        points = installed(self.group).get(name, ())
        claims = ["halfplate itself"] * (name in self.own) + [origin(point) for point in points]
        if len(claims) > 1:
            raise HalfplateError(
                f"{argument or self.argument}={name!r} is claimed by {' and by '.join(claims)}; uninstall one of them",
                docs="docs/extending.md",
            )
        return points[0] if points else None

    def load(self, point: EntryPoint, argument: str | None = None) -> T:
        """Import the object of an entry point; raises HalfplateError if anything fails."""
        argument = argument or self.argument
        try:
            found: T = point.load()
        # The code of another package can raise any exception.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise broken(point, argument, f"cannot be imported ({reason})") from error
        fault = self._fault(found, point.name)
        if fault is not None:
            raise broken(point, argument, fault)
        return found

    def package(self, name: str) -> str | None:
        """The other package that `name` comes from, with its version; None if it is Halfplate's own or unknown."""
        points = installed(self.group).get(name, ())
        return origin(points[0]) if points else None


@cache
def installed(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of `group` by name, without importing them; several if packages claim the same name."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, origin(point))):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def origin(point: EntryPoint) -> str:
    """The package of an entry point, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def broken(point: EntryPoint, argument: str, fault: str) -> HalfplateError:
    """The error for an invalid object of another package."""
    return HalfplateError(
        f"{argument}={point.name!r} of {origin(point)} {fault}; update or uninstall that package",
        docs="docs/extending.md",
    )


def unknown(argument: str, name: str, known: list[str]) -> HalfplateError:
    """The error for an unknown name, with the nearest known one."""
    return HalfplateError(f"{argument}={name!r} is unknown; {available(name, known)}")


def available(name: str, known: list[str]) -> str:
    """The end of an error message: the nearest of the known names, and all of them."""
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}available: {', '.join(known)}"
