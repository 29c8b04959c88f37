"""Checking, before any work, whether a result can be written to the requested path."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfplate.arguments import check_name
from halfplate.checkpoint.folder import check_out
from halfplate.errors import HalfplateError

LOCK_FILE = "lock"


def work_place(out: Path) -> Path:
    """The work folder next to the result `out`, an absolute path; it has the longest file name that is needed there."""
    return out.parent / f".{out.name}.compress"


def check_place(out: Path) -> Path:
    """The absolute path of `out`; raises HalfplateError if the path is invalid, or if no file name can be added next to it."""
    check_name("out", out)
    try:
        target = out.resolve()
        if not target.name:
            raise ValueError("it is the root of the file system")
        for place in (target, work_place(target)):
            # Paths that do not exist are not looked up, so the lengths of their names are checked.
            above = next(parent for parent in place.parents if parent.exists())
            longest = os.pathconf(above, "PC_NAME_MAX")
            if any(len(os.fsencode(part)) > longest for part in place.relative_to(above).parts):
                raise ValueError(f"names there have at most {longest} bytes, and Halfplate appends up to ten")
            place.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HalfplateError(f"out={str(out)[:80]!r} cannot be written to ({reason}); choose another folder") from None
    return target


def check_result_folder(out: Path, overwrite: bool, source: Path) -> None:
    """Raise HalfplateError unless `check_out` allows `out`, folders can be created there, and `source` is not inside."""
    target, here = check_place(out), Path.cwd()
    if target == here or target in here.parents:
        raise HalfplateError(f"out={str(out)!r} is the current folder or holds it; choose another folder")
    if target == source.resolve() or target in source.resolve().parents:
        raise HalfplateError(f"out={str(out)!r} holds the model that is read; choose another folder")
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir():
        raise HalfplateError(
            f"out={str(out)!r} lies below {str(above)!r}, which is not a folder; choose another folder"
        )
    check_out(out, overwrite)


@contextmanager
def sole_user(folder: Path, out: Path) -> Iterator[None]:
    """Context manager that locks `folder`, the work folder of `out`; raises HalfplateError if another process holds the lock."""
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HalfplateError(
                f"out={str(out)!r}: another process works in {str(folder)!r}; wait for it, or choose another name"
            ) from None
        # Since the file was opened, the previous process may have removed the folder and another one created it again.
        try:
            stale = os.fstat(lock.fileno()).st_ino != (folder / LOCK_FILE).stat().st_ino
        except FileNotFoundError:
            stale = True
        if stale:
            raise HalfplateError(f"out={str(out)!r}: another process has just released {str(folder)!r}; try once more")
        yield
