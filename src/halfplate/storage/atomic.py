"""Files that are written atomically and survive a power failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


def beside(path: Path) -> Path:
    """A hidden temporary path on the disk of `path`; unique for each process."""
    # Processes on two machines may have the same id.
    return path.with_name(f".{path.name}.{token_hex(8)}.partial")


@contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Context manager with a temporary path that becomes `path` at the end of the block, and is removed if the block raises.

    durable: the file and its name are on the disk at the end.
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
    """Make sure that a file, or the names in a folder, survive a power failure."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
