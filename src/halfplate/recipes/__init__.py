"""The built-in recipes: commented YAML files."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def shipped(name: str) -> Path | None:
    """The file of the built-in recipe `name`; None if there is none."""
    return FOLDER / f"{name}.yaml" if name in names() else None
