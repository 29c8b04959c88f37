"""Compressions in processes of their own that start at once: forked from one that has imported everything and computed nothing.

Each is a real process, which a real SIGKILL ends. Processes of `--workers` are forked too, which changes how they start and nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (so that no fork has to)

import halfplate.methods.armor  # noqa: F401
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.recipe import Recipe
from halfplate.telemetry.progress import Listener, Step

native.available()  # loaded here, for the same reason

FILE_OPERATIONS = ("pwrite", "replace", "rename", "fsync", "unlink", "mkdir")
PATIENCE = 600.0  # seconds after which a run counts as hung
OnStep = Callable[[str, int, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Order:
    """One compression. workers, engine, address: who does it; small: the recipe."""

    model: Path
    out: Path
    small: Mapping[str, Any]
    resume: bool = False
    overwrite: bool = False
    engine: str = "local"
    workers: int = 1


@dataclass
class Ran:
    """How a compression ended. killed: by a signal. error: what it was refused or stopped with, in one line, and whether that is the kind of
    error that a user is meant to see. solved: matrices that it computed. phase: the last that it told of. operations: on files."""

    killed: bool
    error: str | None = None
    clean: bool = True
    solved: list[str] = field(default_factory=list)
    phase: str = "start"
    seconds: float = 0.0
    operations: int = 0


def run(
    order: Order,
    before: Callable[[], None] | None = None,
    step: OnStep | None = None,
    kill_after: float | None = None,
    kill_at: int | None = None,
) -> Ran:
    """Carry out `order` in a process of its own and wait for its end.

    before: called in it first, e.g. to set a limit. step: called in it at each report, with the phase, the matrices solved and the
    facts. kill_after: seconds until SIGKILL comes from outside. kill_at: the file operation at which it comes, its write half done.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as told:
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _carry_out(order, Path(told.name), before, step, kill_at)
        status = _awaited(child, kill_after)
        ran = Ran(killed=os.WIFSIGNALED(status), seconds=time.monotonic() - start)
        for line in told.read().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by the kill
            ran.phase = entry.get("phase", ran.phase)
            ran.error, ran.clean = entry.get("error", ran.error), entry.get("clean", ran.clean)
            ran.operations = entry.get("operations", ran.operations)
            ran.solved += entry.get("solved", [])
    return ran


def _awaited(child: int, kill_after: float | None) -> int:
    end = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    if kill_after is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise SystemExit(f"a run did not end within {PATIENCE:.0f} s")
    # With the processes of its workers, as when a machine goes.
    os.killpg(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _carry_out(
    order: Order, told: Path, before: Callable[[], None] | None, step: OnStep | None, kill_at: int | None
) -> None:
    """What the child does; it never returns."""
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        notes = told.open("a", buffering=1)
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment,misc]
        counter = _Counter(kill_at)
        torch.set_num_threads(1)
        if before is not None:
            before()

        try:
            recipe = Recipe(**{"threads": 1, **order.small})
            options = {
                "resume": order.resume,
                "overwrite": order.overwrite,
                "engine": order.engine,
                "workers": order.workers,
            }
            compress(str(order.model), order.out, recipe, report=_Notes(notes, counter, step), **options)  # type: ignore[arg-type]
            status = 0
        except HalfplateError as error:
            notes.write(json.dumps({"error": " ".join(str(error).split()), "clean": True}) + "\n")
        except MemoryError:
            # The command line makes this line of it.
            told_so = "out of memory (); finished work is kept, run the same command with --resume to continue; docs/troubleshooting.md says how to use less memory"
            notes.write(json.dumps({"error": told_so, "clean": True}) + "\n")
        except BaseException as error:
            last = traceback.format_exc().strip().splitlines()[-1]
            notes.write(json.dumps({"error": f"{type(error).__name__}: {last}", "clean": False}) + "\n")
        notes.write(json.dumps({"operations": counter.count}) + "\n")
    finally:
        sys.stdout.flush()
        os._exit(status)


class _Notes(Listener):
    """Writes every step to a file that outlives the process, and calls `step`."""

    def __init__(self, file: TextIO, counter: _Counter, step: OnStep | None) -> None:
        self._file, self._counter, self._step = file, counter, step

    def take(self, step: Step) -> None:
        solved = [step.facts["name"]] if step.facts.get("event") == "matrix" else []
        line = {"phase": step.phase, "solved": solved, "operations": self._counter.count}
        self._file.write(json.dumps(line) + "\n")
        if self._step is not None:
            self._step(step.phase, step.done, step.facts)


class _Counter:
    """Counts operations on files, and dies at number `kill_at`."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self._kill_at = 0, kill_at
        for name in FILE_OPERATIONS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self._kill_at:
                if name == "pwrite":
                    descriptor, data, offset = arguments
                    original(descriptor, data[: len(data) // 2], offset)
                os.killpg(os.getpgrp(), signal.SIGKILL)
            return original(*arguments, **named)

        return counted
