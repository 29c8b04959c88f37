"""The recipes that come with Halfplate: commented YAML files for the usual wishes."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def shipped(name: str) -> Path | None:
    """The file of the recipe `name`; None if there is no such recipe."""
    return FOLDER / f"{name}.yaml" if name in names() else None
