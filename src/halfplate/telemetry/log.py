"""The log of a run, `log.jsonl` in the result folder: one JSON object per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from halfplate.headroom import memory
from halfplate.json_numbers import finite
from halfplate.telemetry.machine import machine
from halfplate.telemetry.progress import Listener, Report, Step, TimeLeft, together
from halfplate.version import versions_of

LOG_FILE = "log.jsonl"
LOG_VERSION = 1
WORK = ("matrix", "step")  # events after which the log of a failed run is kept
LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")


@contextmanager
def run_log(out: Path, report: Report, resume: bool = False) -> Iterator[Report]:
    """Context manager with a report that calls `report` and writes the log; an exception inside is written as an `error`.

    During the run, and after a failure, the log is next to `out` as `NAME.log.jsonl`; if `out` was written, it moves there. The log of
    a run that failed before its first matrix or step is removed. If the log cannot be written, the run continues.

    resume: append to the log of an earlier run.
    """
    target = out.resolve()
    log = RunLog(target.with_name(f"{target.name}.{LOG_FILE}"), resume)
    before = _identity(target)
    try:
        log.write({"event": "start", "log_version": LOG_VERSION, **environment()})
        yield together(report, log)
    except BaseException as error:
        log.write({"event": "error", "kind": type(error).__name__, "message": " ".join(str(error).split())})
        raise
    finally:
        log.close()
        written = target.is_dir() and _identity(target) != before
        log.settle(target / LOG_FILE if written else None)


def environment() -> dict[str, Any]:
    """Versions and machine, for the first line of a log."""
    from halfplate.kernels import native

    return {"versions": versions_of(LIBRARIES), "machine": machine(), "kernels": native.isa(), "process": os.getpid()}


class RunLog(Listener):
    """A report that writes every step with facts, and the begin and end of every phase, as a line of `path`."""

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self._left = TimeLeft()
        self._worked = False
        self._file: TextIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A refused attempt to resume must not change the log of the earlier run.
            self._worked = resume and _whole_lines(path)
            self._file = path.open("a" if resume else "w", encoding="utf-8")
        except OSError:
            return

    def take(self, step: Step) -> None:
        left = self._left(step.phase, step.done, step.total, step.share)
        if not step.facts and 0 < step.done < step.total:
            return
        line = {"event": "phase", "phase": step.phase, "done": step.done, "total": step.total, **step.facts}
        if step.note:
            line["note"] = step.note
        if left is not None:
            line["seconds_left"] = round(left, 3)
        line["phase_seconds"] = round(self._left.spent, 3)
        self._worked = self._worked or line["event"] in WORK
        self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, with the time and the memory of the process; NaN and infinity become null."""
        if self._file is None:
            return
        memories = {"rss_bytes": memory("VmRSS"), "peak_rss_bytes": memory("VmHWM")}
        stamped = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line, **memories}
        try:
            self._file.write(json.dumps(finite(stamped), allow_nan=False) + "\n")
            self._file.flush()
        except OSError:
            self.close()

    def close(self) -> None:
        """Stop writing."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return

    def settle(self, place: Path | None) -> None:
        """Move the finished log to `place`; without a place, remove it unless it is worth keeping."""
        try:
            if place is not None:
                self.path.replace(place)
            elif not self._worked:
                self.path.unlink(missing_ok=True)
        except OSError:
            return


def append(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a line to the log in `folder`; does nothing if the folder cannot be written."""
    stamped = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}
    try:
        with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(stamped), allow_nan=False) + "\n")
    except OSError:
        return


def _whole_lines(path: Path) -> bool:
    """Remove an incomplete last line, left by a full disk or a killed process; returns whether any line is left."""
    if not path.exists():
        return False
    with path.open("rb+") as file:
        end = 0
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
        file.truncate(end)
    return end > 0


def _identity(folder: Path) -> tuple[int, int] | None:
    """The identity of the folder, which changes when a new result replaces it."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
