"""Writing folders atomically."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from halfplate.arguments import check_name
from halfplate.checkpoint.config import CONFIG_FILE, METHOD, RECORD_FILE, read_json
from halfplate.errors import HalfplateError
from halfplate.storage.atomic import beside, sync, whole_file


def check_out(out: Path, overwrite: bool) -> None:
    """Raise HalfplateError unless a folder may be written to `out`.

    An existing folder is only replaced with `overwrite`, and only if Halfplate wrote it. An empty folder is always replaced.
    """
    check_name("out", out)
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir():
        raise HalfplateError(f"out={str(out)!r} exists and is not a folder; choose another name")
    if not any(out.iterdir()):
        return
    if not _is_ours(out):
        raise HalfplateError(
            f"out={str(out)!r} holds files that Halfplate did not write, which --overwrite does not delete; choose another name"
        )
    if not overwrite:
        raise HalfplateError(f"out={str(out)!r} exists; choose another name, or pass --overwrite to replace it")


def _is_ours(folder: Path) -> bool:
    if (folder / RECORD_FILE).is_file():
        return True
    try:
        quantization = read_json(folder / CONFIG_FILE).get("quantization_config")
    except HalfplateError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


@contextmanager
def new_folder(out: Path, overwrite: bool, partial: Path | None = None) -> Iterator[Path]:
    """Context manager with a temporary folder that becomes `out` at the end of the block, and is removed if the block raises.

    Files are on disk before the folder is renamed.

    partial: path of the temporary folder, on the disk of `out`; the remains of a killed process there are removed.
    Raises HalfplateError if `check_out` does or if writing fails, for example on a full disk. In this case, and on Ctrl-C, `out`
    is not changed.
    """
    target = out.resolve()
    check_out(target, overwrite)
    if partial is None:
        partial = beside(target)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        replace_folder(partial, target)
    except Exception as error:
        # tokenizers reports errors of the system as a bare Exception.
        if isinstance(error, (OSError, SafetensorError)) or "(os error " in str(error):
            raise HalfplateError(_reason(out, error)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _reason(out: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        f"os error {code}" in text for code in (errno.ENOSPC, errno.EDQUOT)
    )
    cure = "the disk is full, free some space" if full else "check that the folder exists and can be written"
    return f"out={str(out)!r} could not be written ({text}): {cure} or choose another place; nothing was left there"


def _flush(folder: Path) -> None:
    """Give every file the usual permissions (safetensors writes files that only their owner can read) and write all to disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)
        sync(path)
    sync(folder)


def replace_folder(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; the old content is only removed after that."""
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
    else:
        old = partial.with_suffix(".old")
        try:
            target.rename(old)
            partial.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def replace_file(file: Path, content: str) -> None:
    """Write a text file atomically, replacing an existing one; raises HalfplateError if that fails."""
    try:
        with whole_file(file) as partial:
            partial.write_text(content, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HalfplateError(
            f"file={str(file)!r} could not be written ({getattr(error, 'strerror', None) or error}); choose another place"
        ) from None
