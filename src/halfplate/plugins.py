"""What other installed packages add to Halfplate: entry points, read when they are first asked for (docs/extending.md)."""

from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from halfplate.errors import HalfplateError

METHODS = "halfplate.methods"
CALIBRATION = "halfplate.calibration"


@cache
def installed(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of `group` by name, nothing of them imported; more than one where packages claim one name."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, origin(point))):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def origin(point: EntryPoint) -> str:
    """The package that an entry point comes from, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def find(group: str, name: str, argument: str, own: bool = False) -> EntryPoint | None:
    """The entry point `name` of `group`, None where there is none.

    argument: what error messages call it. own: whether Halfplate has the name itself. Raises HalfplateError where a name
    is claimed twice: which of the two a result came from would be left to chance.
    """
    points = installed(group).get(name, ())
    claims = ["halfplate itself"] * own + [origin(point) for point in points]
    if len(claims) > 1:
        raise HalfplateError(
            f"{argument}={name!r} is claimed by {' and by '.join(claims)}; uninstall one of them",
            docs="docs/extending.md",
        )
    return points[0] if points else None


def load(point: EntryPoint, argument: str) -> Any:
    """Import what an entry point names; raises HalfplateError, whatever goes wrong inside it."""
    try:
        return point.load()
    # The code of another package fails in ways of its own.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise broken(point, argument, f"cannot be imported ({reason})") from error


def broken(point: EntryPoint, argument: str, fault: str) -> HalfplateError:
    """The error for a plugin that is not what its group asks for."""
    return HalfplateError(
        f"{argument}={point.name!r} of {origin(point)} {fault}; update or uninstall that package",
        docs="docs/extending.md",
    )


def unknown(argument: str, name: str, known: list[str]) -> HalfplateError:
    """The error for a name that nobody registers, with the nearest one."""
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return HalfplateError(f"{argument}={name!r} is unknown; {hint}available: {', '.join(known)}")
