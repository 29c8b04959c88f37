"""Files that appear whole or not at all, and outlive a power failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


def beside(path: Path) -> Path:
    """A hidden place on the disk of `path` for what is not finished; no two processes get one name."""
    # Processes of two machines may have one number.
    return path.with_name(f".{path.name}.{token_hex(8)}.partial")


@contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """The place to write a file to, which becomes `path` when the block ends, and goes if the block raises.

    durable: the file and its name are on the disk then.
    """
    partial = beside(path)
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, outlive a power failure."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
