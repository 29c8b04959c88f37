"""The work folder of an unfinished compression: its artifacts, and the identity of the run that they belong to."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from halfplate.checkpoint.output import LOCK_FILE, sole_user, work_place
from halfplate.errors import HalfplateError
from halfplate.storage.artifact import note, read_json, write_json

IDENTITY_FILE = "identity.json"


class WorkFolder:
    """The hidden folder next to `out` for one compression; at most one process works in it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = work_place(out.resolve())

    def layer(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:05d}.safetensors"

    def matrix(self, name: str) -> Path:
        return self.path / "matrices" / f"{name}.safetensors"

    def experts(self, module: str) -> Path:
        """The folder of the recorded inputs of an experts module."""
        return self.path / "experts" / module

    def remove_hidden(self) -> None:
        """Delete the hidden states between two layers, which can be computed again."""
        shutil.rmtree(self.path / "hidden", ignore_errors=True)

    @property
    def arguments(self) -> Path:
        return self.path / "arguments"

    def hidden(self, stream: str, index: int) -> Path:
        return self.path / "hidden" / f"{stream}-{index:05d}"

    @property
    def identity(self) -> Path:
        return self.path / IDENTITY_FILE

    @property
    def tokens(self) -> Path:
        return self.path / "tokens.safetensors"

    @property
    def levels(self) -> Path:
        return self.path / "levels.json"

    @property
    def outer(self) -> Path:
        return self.path / "outer.safetensors"

    def transformed(self, transform: int, piece: int) -> Path:
        """The file of one piece of the transform with this number."""
        return self.path / "transforms" / str(transform) / f"{piece:05d}.safetensors"

    def measured(self, transform: int, layer: int) -> Path:
        """The statistics of a layer that the transform with this number depends on."""
        return self.path / "transforms" / f"{transform}-statistics" / f"{layer:05d}.safetensors"

    def measuring(self, transform: int, layer: int) -> Path:
        """The hidden states before a layer, while the transform with this number is measured."""
        return self.path / "transforms" / f"{transform}-hidden" / f"{layer:05d}"

    @property
    def result(self) -> Path:
        return self.path / "result.partial"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def clear(self) -> None:
        """Remove everything in the folder; the lock stays."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()

    def remove_abandoned(self) -> None:
        """Remove the files of an earlier run, unless a process works there."""
        with suppress(OSError, HalfplateError), sole_user(self.path, self.out):
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def identity_copy(self) -> Path:
        """The second copy of the identity. Without the identity, all finished artifacts would be useless."""
        return self.path / "identity.copy.json"

    def begun(self) -> dict[str, Any] | None:
        """The identity of the work in the folder; None if there is none, or both copies are damaged."""
        return read_json(self.identity) or read_json(self.identity_copy)

    def finished_work(self) -> bool:
        """Whether the folder contains finished work."""
        kinds = ("blocks", "matrices", "transforms/*")
        return (
            self.levels.exists()
            or note(self.outer).exists()
            or any(any(self.path.glob(f"{kind}/*.json")) for kind in kinds)
        )

    @contextmanager
    def opened(self, identity: dict[str, Any], resume: bool, overwrite: bool) -> Iterator[None]:
        """Context manager that creates and locks the folder. It is removed at the end of the `with` block, unless the block raises and there is finished work.

        Raises HalfplateError if another process works there, if there is finished work and neither `resume` nor `overwrite` is
        given, without `overwrite` if the work has a different `identity` (naming the difference), and if the system refuses an
        operation.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with sole_user(self.path, self.out):
                self._begin(identity, resume, overwrite)
                try:
                    yield
                except BaseException:
                    if not self.finished_work():
                        shutil.rmtree(self.path, ignore_errors=True)
                    raise
                shutil.rmtree(self.path, ignore_errors=True)
        except OSError as error:
            raise HalfplateError(self._refused(error)) from error

    def _begin(self, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
        begun = self.begun()
        if begun is not None and resume:
            try:
                check_same(begun, identity, f"the compression in {str(self.path)!r} began")
            except HalfplateError:
                if not overwrite:
                    raise
            else:
                return
        if begun is None and resume and self.finished_work() and not overwrite:
            raise HalfplateError(
                f"--resume: {str(self.identity)!r} and its copy are damaged or missing, so it is unknown which run the finished files belong to; "
                "pass --overwrite to start over"
            )
        if begun is not None and self.finished_work() and not overwrite:
            raise HalfplateError(
                f"out={str(self.out)!r}: an interrupted compression left its finished files in {str(self.path)!r}; pass --resume to continue"
                ", or --overwrite to start over"
            )
        self.clear()
        for file in (self.identity, self.identity_copy):
            write_json(file, identity, durable=False)

    def _refused(self, error: OSError) -> str:
        text = " ".join(str(error).split())
        kept = "finished work is kept, continue with --resume"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"out={str(self.out)!r}: the disk is full ({text}); free some space; {kept}"
        return f"out={str(self.out)!r}: {str(self.path)!r} cannot be used ({text}); check that the folder exists and can be written; {kept}"


def check_same(begun: Mapping[str, Any], now: Mapping[str, Any], when: str) -> None:
    """Raise HalfplateError naming the first entry in which two identities differ."""
    # Differences of the recipe are more informative than those of packages, so they come first.
    for name in sorted(begun.keys() | now.keys(), key=lambda name: (name == "plugins", name)):
        if begun.get(name) != now.get(name):
            raise HalfplateError(
                f"--resume: {name} was {_short(begun.get(name))} when {when} and is {_short(now.get(name))} now; give the same again, "
                "or pass --overwrite to start over"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
