"""Versions of installed packages."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The version in the package's metadata, or `unknown` when running from a source folder."""
    return installed_version("halfplate") or "unknown"


def installed_version(library: str) -> str | None:
    """The version in the metadata of a library; None if there is no readable metadata."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def versions_of(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of Halfplate and of `libraries`, by name; `unknown` if there is none."""
    return {"halfplate": package_version()} | {name: installed_version(name) or "unknown" for name in libraries}
