"""A source of calibration text: every text file below a folder."""

from collections.abc import Iterator
from pathlib import Path

from halfplate.errors import HalfplateError

SUFFIXES = {".md", ".py", ".rst", ".txt"}


def read_folder(what: str) -> Iterator[str]:
    """The documents of `--calibration folder:PATH`, sorted by path, so that every run reads the same text."""
    folder = Path(what).expanduser()
    if not what or not folder.is_dir():
        raise HalfplateError(f"calibration='folder:{what}' is not a folder; try folder:docs")
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise HalfplateError(
            f"calibration='folder:{what}' holds no {', '.join(sorted(SUFFIXES))} file; try another folder"
        )
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")
