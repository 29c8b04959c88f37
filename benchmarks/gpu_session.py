"""The sections of `gpu.py`: each with a time of its own, none able to stop the others."""

import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from gpu_record import Record

GRACE = 10.0  # seconds after the end at which a section that hangs in the driver is given up


class OutOfTime(BaseException):
    """The time of a section is over; no `except Exception` on the way may swallow it."""


class Absent(Exception):
    """What a section needs is not there; its text says what."""


@dataclass(frozen=True)
class Section:
    """name: on the command line. least, most: seconds without which it does not begin, and after which it is ended."""

    name: str
    run: Callable[["Session"], None]
    least: float
    most: float


@dataclass
class Session:
    """What every section is given. end: when the whole run is over, on the monotonic clock. tiny: shapes for a test."""

    record: Record
    device: torch.device
    tiny: bool
    end: float
    section_end: float = 0.0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that the section which runs now has left."""
        return min(self.section_end, self.end) - time.monotonic()

    def size(self, full: int, tiny: int) -> int:
        """A dimension: that of the figures, or that of the test."""
        return tiny if self.tiny else full

    def free(self) -> None:
        """Give the memory of what is no longer held back to the device."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One of several independent parts of a section: an error in it is a failed check, and the next part runs."""
        try:
            yield
        except Absent as absent:
            self.record.absent(name, str(absent))
        except Exception as error:
            self.record.check(name, False, _spoken(error))
            _check_context(self, error)
        self.free()


class LostContext(Exception):
    """The CUDA context is broken: nothing more can run in this process."""


def run_sections(session: Session, sections: Sequence[Section]) -> str | None:
    """Run the sections in turn, as long as there is time; returns the name of the one that broke CUDA, if one did."""
    give_up = threading.Timer(max(session.end - time.monotonic(), 0.0) + GRACE, _give_up, (session.record,))
    give_up.daemon = True
    give_up.start()
    try:
        for section in sections:
            try:
                run_section(session, section)
            except LostContext:
                return section.name
    finally:
        give_up.cancel()
    return None


def run_section(session: Session, section: Section) -> None:
    """Run one section; how it ended is an entry of the record."""
    record, record.section = session.record, section.name
    whole = session.end - time.monotonic()
    if whole < section.least and not session.tiny:
        record.write(
            "section", f"{section.name}: skipped, {whole:.0f} s left, needs {section.least:g}", state="skipped"
        )
        return
    allowed = min(section.most, whole)
    begin = time.monotonic()
    session.section_end = begin + allowed
    state, said = "done", ""
    lost: LostContext | None = None
    try:
        with _alarm(allowed):
            section.run(session)
    except OutOfTime:
        state, said = "cut off", f" after {allowed:.0f} s; what it wrote counts"
    except Absent as absent:
        state, said = "absent", f": {absent}"
    except LostContext as error:
        state, said, lost = "error", f": {error}", error
    except Exception as error:
        state, said = "error", f": {_spoken(error)}"
        record.say(traceback.format_exc())
        try:
            _check_context(session, error)
        except LostContext as broken:
            lost = broken
    seconds = time.monotonic() - begin
    record.write("section", f"{section.name}: {state}{said} [{seconds:.1f} s]", state=state, seconds=round(seconds, 2))
    if lost is not None:
        raise lost
    session.free()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body once it has run for so long."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _give_up(record: Record) -> None:
    record.write("section", f"{record.section}: hangs, the run is ended", state="error")
    record.say(record.summary())
    os._exit(3)


def _spoken(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _check_context(session: Session, error: BaseException) -> None:
    """Raise LostContext where CUDA does not answer any more: an illegal access breaks all that follows."""
    if not session.cuda:
        return
    try:
        torch.cuda.synchronize()
    except Exception as broken:
        raise LostContext(f"{_spoken(error)}; CUDA is broken after it ({_spoken(broken)})") from error


def versions(names: Sequence[str]) -> dict[str, Any]:
    """The installed version of each package, None where it is missing."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
