"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The version in the package's metadata, or `unknown` where it runs from a source folder."""
    try:
        return version("halfplate")
    except PackageNotFoundError:
        return "unknown"
