"""Terminal output: tables and JSON on standard output, progress on standard error."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from halfplate.json_numbers import finite
from halfplate.plain_text import cell
from halfplate.telemetry.progress import Listener, Report, Step, TimeLeft, silent

LOG_SECONDS = 15.0  # seconds between two lines of a phase without a terminal
PLAIN_WIDTH = 140


def silence_libraries() -> None:
    """Hide the messages and progress bars of transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def speaking_libraries() -> None:
    """Show the messages of transformers, for `--log-level debug`."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_info()


def print_json(value: Any) -> None:
    """Print one JSON document; NaN and infinity become null."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output; columns of numbers are right-aligned."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) or row[index] is None for row in rows)
        # Names are not wrapped, so that they can be searched; other long columns are.
        least = None if index or sys.stdout.isatty() else min(60, max((len(str(row[0])) for row in rows), default=0))
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    _print(table)


def print_pairs(title: str, pairs: Sequence[tuple[str, Any]]) -> None:
    """Print a table of names and values on standard output."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, cell(value))
    _print(table)


def _print(table: Table) -> None:
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(file=sys.stdout, width=width, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    print("\n".join(line for line in lines if line) + "\n")


def megabytes(nbytes: int) -> str:
    """Bytes as text, `1.23 MB`, in powers of ten."""
    return f"{nbytes / 1e6:,.2f} MB"


def whole_checkpoint(nbytes: int, dense_nbytes: int, other_nbytes: int) -> str:
    """Bytes of all weights of a checkpoint, and their share of the original's with its matrices at 2 bytes per weight."""
    whole, original = nbytes + other_nbytes, dense_nbytes + other_nbytes
    return f"{megabytes(whole)} ({whole / original:.1%} of {megabytes(original)})"


@contextmanager
def progress(args: argparse.Namespace) -> Iterator[Report]:
    """Report to standard error, as `--log-level` says: progress bars with the remaining time on a terminal, otherwise lines."""
    if args.log_level == "debug":
        speaking_libraries()
        yield _Lines(every_step=True)
    elif args.log_level != "info":
        yield silent
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _Bars(bars)
    else:
        yield _Lines()


def _bars() -> Progress:
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[steps]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    return Progress(*columns, console=Console(file=sys.stderr))


class _Bars(Listener):
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._left = TimeLeft()

    def take(self, step: Step) -> None:
        phase, left = step.phase, self._left(step.phase, step.done, step.total, step.share)
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=1.0, steps="", left="")
        elif step.done == 0 and self._bars.tasks[self._tasks[phase]].finished:
            self._bars.reset(self._tasks[phase])  # the same phase in the next row of a sweep
        share = step.share
        if share is None:
            share = step.done / step.total if step.total else 1.0
        self._bars.update(
            self._tasks[phase],
            completed=share if step.done < step.total else 1.0,
            description=f"{phase}: {step.note}" if step.note else phase,
            steps=f"{step.done}/{step.total}",
            left=f"{duration(left)} left" if left and step.done < step.total else "",
        )


class _Lines(Listener):
    def __init__(self, every_step: bool = False) -> None:
        self._every_step = every_step
        self._left = TimeLeft()
        self._phase = ""
        self._told = 0.0
        self._ended = False

    def take(self, step: Step) -> None:
        phase, done, total = step.phase, step.done, step.total
        now, seconds_left = time.monotonic(), self._left(phase, done, total, step.share)
        if phase != self._phase or done == 0:
            self._phase, self._told, self._ended = phase, now, False
        if self._every_step and step.facts:
            say(json.dumps(finite(step.facts)))
        # Steps after the last one of a phase are not printed (a layer ends after its last matrix).
        if not self._ended and (done >= total or now - self._told >= LOG_SECONDS):
            self._told, self._ended = now, done >= total
            left = f", {duration(seconds_left)} left" if seconds_left is not None and done < total else ""
            said = f", {step.note}" if step.note else ""
            say(f"{phase}: {done}/{total} ({self._left.spent:.1f} s{left}){said}")


def say(line: str) -> None:
    """Print a line of progress; a closed terminal does not stop the run."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as text: `42 s`, `7 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
