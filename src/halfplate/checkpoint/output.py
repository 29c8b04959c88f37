"""Whether a result may be written where the user asks, decided before any work is done."""

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
    """The folder beside the result `out`, an absolute path, in which it is made; the longest name that is needed there."""
    return out.parent / f".{out.name}.compress"


def check_place(out: Path) -> Path:
    """The absolute path of `out`; raises HalfplateError if the system knows no such place, or has no name left beside it."""
    check_name("out", out)
    try:
        target = out.resolve()
        if not target.name:
            raise ValueError("it is the root of the file system")
        for place in (target, work_place(target)):
            # What does not exist yet is not looked up, so its names are measured.
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
    """Raise HalfplateError unless `check_out` allows `out`, folders can be made there, and `source` is not inside."""
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
    """While inside, `folder`, which holds the unfinished work of `out`, is this process's; HalfplateError if it is another's."""
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HalfplateError(
                f"out={str(out)!r}: another process works in {str(folder)!r}; wait for it, or choose another name"
            ) from None
        # The one before may have removed the folder, and another process may have made it anew, since we opened the file.
        try:
            stale = os.fstat(lock.fileno()).st_ino != (folder / LOCK_FILE).stat().st_ino
        except FileNotFoundError:
            stale = True
        if stale:
            raise HalfplateError(f"out={str(out)!r}: another process has just released {str(folder)!r}; try once more")
        yield
