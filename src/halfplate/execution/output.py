"""Whether a result may be written where the user asks, decided before any work is done."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfplate.checkpoint.folder import check_out
from halfplate.errors import HalfplateError

LOCK_FILE = "lock"


def check_result_folder(out: Path, overwrite: bool, source: Path) -> None:
    """Raise HalfplateError unless `check_out` allows `out`, folders can be made there, and `source` is not inside."""
    try:
        target, here = out.resolve(), Path.cwd()
        target.exists()  # fails for names that the system cannot look up
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HalfplateError(
            f"out={str(out)[:80]!r} is no place to write to ({reason}); choose another folder"
        ) from None
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
    """While inside, `folder`, which holds the unfinished work of `out`, is this process's; HalfplateError where another's."""
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HalfplateError(
                f"out={str(out)!r}: another process works in {str(folder)!r}; wait for it, or choose another name"
            ) from None
        yield
