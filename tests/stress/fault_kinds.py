"""Faults that are injected for real, one function a kind; each says what the user saw and what became of the work."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from forked import OnStep, Order, Ran, run

from halfplate.compression.work_folder import WorkFolder
from halfplate.evaluation.speed import memory
from halfplate.storage.artifact import load_artifact

TOLD = ("log.jsonl", "report.html")  # of a result: these have times in them
LINUX_CAPABILITY_VERSION_3 = 0x20080522  # of linux/capability.h
MEGABYTE = 2**20
LONGEST_FILE = 24_000  # bytes: less than a finished block takes, more than the log


class NotHere(Exception):
    """A fault that cannot be injected on this machine, and why."""


@dataclass(frozen=True)
class Outcome:
    """error: in one line; as_meant: whether it is the kind of error that a user is meant to see. afterwards: what `--resume` then gave."""

    error: str
    as_meant: bool
    afterwards: str


@dataclass(frozen=True)
class Bench:
    """A place to break things in: a model, a text, and what an undisturbed run gives."""

    folder: Path
    model: Path
    text: Path
    order: Order
    whole: dict[str, str]

    def fresh(self, name: str) -> Order:
        """The order with a new OUT in a folder of its own."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return replace(self.order, out=place / "out")

    def with_copy(self, name: str) -> Bench:
        """The same with a copy of the model to change; results name their model, so its undisturbed one is another."""
        place = self.folder / f"{name}-model"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.model, place)
        return replace(self, model=place, order=replace(self.order, model=place))

    def with_whole(self) -> Bench:
        """The same with what an undisturbed run gives now."""
        order = self.fresh("undisturbed")
        run(order)
        return replace(self, whole=digests(order.out))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a result but those that tell times."""
    files = (path for path in sorted(folder.iterdir()) if path.name not in TOLD)
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


def finished_matrices(out: Path) -> set[str]:
    """The matrices of which whole parts lie in the work folder."""
    parts = (load_artifact(note.with_suffix(".safetensors")) for note in WorkFolder(out).path.glob("*/*.json"))
    return {
        name for part in parts if part is not None and part.damaged() is None for name in part.facts.get("records", {})
    }


def resumed(bench: Bench, order: Order, error: Ran, kept: int | None = None) -> Outcome:
    """Go on with the order as it was; kept: the matrices that must not be solved again, by default all that are finished."""
    finished = finished_matrices(order.out)
    ran = run(replace(order, resume=True))
    if ran.error is not None or ran.killed:
        return Outcome(error.error or "none", error.clean, f"--resume failed: {ran.error}")
    same = digests(order.out) == bench.whole
    lost = len(finished & set(ran.solved))
    told = f"--resume kept {len(finished)} matrices, solved {len(ran.solved)}" + (f", {lost} lost" if lost else "")
    return Outcome(error.error or "none", error.clean, f"{told}; the same bytes" if same else f"{told}; OTHER BYTES")


def refused(bench: Bench, order: Order, error: Ran) -> Outcome:
    """A refusal before any work leaves nothing behind."""
    left = [path.name for path in order.out.parent.iterdir() if path.name.startswith((".out", "out"))]
    return Outcome(error.error or "none", error.clean, f"left: {', '.join(left)}" if left else "nothing was written")


def at_block(block: int, act: Callable[[], None]) -> OnStep:
    """A step that acts once that block is finished."""
    return lambda phase, done, facts: act() if facts.get("event") == "block" and facts.get("block") == block else None


def broken_off(bench: Bench, name: str, **changes: Any) -> Order:
    """An order of which two blocks are finished and some matrices of the third, left by a kill."""
    order = replace(bench.fresh(name), **changes)

    def die(phase: str, done: int, facts: Mapping[str, Any]) -> None:
        if facts.get("event") == "matrix" and facts.get("block") == 2 and done >= 2 * 7 + 3:
            os.kill(os.getpid(), 9)

    ran = run(order, step=die)
    assert ran.killed, ran
    return order


# The disk.


@contextmanager
def small_disk(place: Path, nbytes: int) -> Iterator[None]:
    """A file system of so many bytes at `place`."""
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", place], check=False).returncode
    ):
        raise NotHere("mounting a small file system takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)


def disk_too_small(bench: Bench) -> Outcome:
    order = bench.fresh("small")
    with small_disk(order.out.parent, MEGABYTE):
        return refused(bench, order, run(order))


def disk_full(bench: Bench) -> Outcome:
    order = bench.fresh("full")
    filler = order.out.parent / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return  # it is full

    with small_disk(order.out.parent, 256 * MEGABYTE):
        error = run(order, step=at_block(1, fill))
        filler.unlink()
        return resumed(bench, order, error)


def file_size_limit(bench: Bench) -> Outcome:
    order = bench.fresh("limit")
    return resumed(
        bench,
        order,
        run(order, step=at_block(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST_FILE, LONGEST_FILE)))),
    )


def vanished_mount(bench: Bench) -> Outcome:
    order = bench.fresh("mount")
    place, disk = order.out.parent, bench.folder / "disk"
    disk.mkdir(exist_ok=True)
    with small_disk(disk, 256 * MEGABYTE):
        subprocess.run(["mount", "--bind", disk, place], check=True)
        error = run(order, step=at_block(1, lambda: subprocess.run(["umount", "-l", str(place)], check=True)))
        # The disk is back.
        subprocess.run(["mount", "--bind", disk, place], check=True)
        try:
            return resumed(bench, order, error)
        finally:
            subprocess.run(["umount", "-l", place], check=False)


def work_folder_removed(bench: Bench) -> Outcome:
    order = bench.fresh("removed")
    return resumed(bench, order, run(order, step=at_block(1, lambda: shutil.rmtree(WorkFolder(order.out).path))))


def read_only_folder(bench: Bench) -> Outcome:
    order = bench.fresh("readonly")
    order.out.parent.chmod(0o555)
    return refused(bench, order, run(order, before=_without_privileges))


def out_exists(bench: Bench) -> Outcome:
    order = bench.fresh("exists")
    order.out.mkdir()
    (order.out / "thesis.txt").write_text("all there is")
    error = run(replace(order, overwrite=True))
    kept = (order.out / "thesis.txt").read_text() == "all there is"
    return Outcome(error.error or "none", error.clean and kept, "the files there were not changed" if kept else "LOST")


def _without_privileges() -> None:
    """Drop what lets root read and write everything; modes of files then hold for it too.

    The user stays root, so that a Python installed in root's own folder can still import.
    """
    if os.geteuid() != 0:
        return
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


# Parts of the work folder.


def part_cut_short(bench: Bench) -> Outcome:
    order = broken_off(bench, "cut")
    path = WorkFolder(order.out).layer(1)
    os.truncate(path, path.stat().st_size - 7)
    return resumed(bench, order, Ran(killed=False, error="none: only this layer is computed again"))


def bit_flipped(bench: Bench) -> Outcome:
    order = broken_off(bench, "flip")
    _flip(WorkFolder(order.out).layer(0), -9)
    return resumed(bench, order, Ran(killed=False, error="none: only this layer is computed again"))


def hidden_states_damaged(bench: Bench) -> Outcome:
    order = broken_off(bench, "hidden")
    for path in WorkFolder(order.out).path.glob("hidden/*"):
        if path.suffix != ".sha256":
            _flip(path, 100)
    return resumed(bench, order, Ran(killed=False, error="none: they are computed again from the first layer"))


def note_damaged(bench: Bench) -> Outcome:
    order = broken_off(bench, "identity")
    _flip(WorkFolder(order.out).identity, 90)
    return resumed(bench, order, Ran(killed=False, error="none: the copy is used"))


def damaged_while_assembled(bench: Bench) -> Outcome:
    order = bench.fresh("assembled")

    def flip(phase: str, done: int, facts: Mapping[str, Any]) -> None:
        if phase == "writing" and done == 1:
            _flip(WorkFolder(order.out).layer(4), -9)

    return resumed(bench, order, run(order, step=flip))


def _weights(order: Order) -> Path:
    """The model's weight file, the last of several."""
    return max(order.model.glob("*.safetensors"))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


# Another run than the one that began.


def other_model(bench: Bench) -> Outcome:
    bench = bench.with_copy("other").with_whole()
    order = broken_off(bench, "model")
    weights = _weights(order)
    before = weights.read_bytes()
    weights.write_bytes(before[:-400] + bytes(40) + before[-360:])
    error = run(replace(order, resume=True))
    weights.write_bytes(before)
    return resumed(bench, order, error)


def other_recipe(bench: Bench) -> Outcome:
    return _changed(bench, "recipe", {"core_dtype": "fp16"})


def other_seed(bench: Bench) -> Outcome:
    return _changed(bench, "seed", {"seed": 1})


def other_threads(bench: Bench) -> Outcome:
    return _changed(bench, "threads", {"threads": 2})


def _changed(bench: Bench, name: str, changes: dict[str, Any]) -> Outcome:
    order = broken_off(bench, name)
    error = run(replace(order, resume=True, small={**order.small, **changes}))
    return resumed(bench, order, error)


def other_text(bench: Bench) -> Outcome:
    order = broken_off(bench, "text")
    before = bench.text.read_text()
    bench.text.write_text(before.replace("bird", "fish"))
    error = run(replace(order, resume=True))
    bench.text.write_text(before)
    return resumed(bench, order, error)


def no_resume(bench: Bench) -> Outcome:
    order = broken_off(bench, "again")
    return resumed(bench, order, run(order))


def two_at_once(bench: Bench) -> Outcome:
    order = bench.fresh("two")
    second: list[Ran] = []
    error = run(order, step=at_block(1, lambda: second.append(_inside(order))))
    told = json.loads((order.out.parent / "second.json").read_text())
    same = not error.error and digests(order.out) == bench.whole
    return Outcome(told["error"], told["clean"], "the first run was not affected" if same else "THE FIRST RUN SUFFERED")


def _inside(order: Order) -> Ran:
    """The same order once more, from within the first."""
    ran = run(replace(order, resume=True))
    (order.out.parent / "second.json").write_text(json.dumps({"error": ran.error, "clean": ran.clean}))
    return ran


# The model's files.


def shard_gone(bench: Bench) -> Outcome:
    bench = bench.with_copy("gone").with_whole()
    order = bench.fresh("gone")
    weights = _weights(order)
    error = run(order, step=at_block(1, lambda: weights.rename(weights.with_suffix(".away"))))
    weights.with_suffix(".away").rename(weights)
    return resumed(bench, order, error)


def shard_unreadable(bench: Bench) -> Outcome:
    order = bench.with_copy("unreadable").fresh("unreadable")
    _weights(order).chmod(0)
    order.out.parent.chmod(0o777)
    return refused(bench, order, run(order, before=_without_privileges))


def shard_cut_short(bench: Bench) -> Outcome:
    order = bench.with_copy("short").fresh("short")
    path = _weights(order)
    os.truncate(path, path.stat().st_size - 1000)
    return refused(bench, order, run(order))


def wrong_dtype(bench: Bench) -> Outcome:
    order = bench.with_copy("dtype").fresh("dtype")
    path = _weights(order)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(b'"F32"', b'"I32"').replace(b'"BF16"', b'"I16" ').replace(b'"F16"', b'"I16"')
    path.write_bytes(data[:8] + header + data[8 + length :])
    return refused(bench, order, run(order))


def not_finite(bench: Bench) -> Outcome:
    order = bench.with_copy("nan").fresh("nan")
    path = _weights(order)
    data = bytearray(path.read_bytes())
    data[-64:] = b"\xff" * 64  # NaN in any float type
    path.write_bytes(data)
    return refused(bench, order, run(order))


# Memory and processes.


def no_memory(bench: Bench) -> Outcome:
    def little() -> None:
        most = (memory("VmSize") or 0) + 16 * MEGABYTE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    order = bench.fresh("memory")
    return refused(bench, order, run(order, before=little))


def memory_runs_out(bench: Bench) -> Outcome:
    order = bench.fresh("runs-out")

    def none_left() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTE, MEGABYTE))
        bytearray(64 * MEGABYTE)

    return resumed(bench, order, run(order, step=at_block(1, none_left)))


def worker_killed(bench: Bench) -> Outcome:
    import multiprocessing

    order = replace(bench.fresh("worker"), workers=2)
    error = run(order, step=at_block(1, lambda: multiprocessing.active_children()[0].kill()))
    same = not error.error and digests(order.out) == bench.whole
    return Outcome(error.error or "none: its task runs again", error.clean, "the same bytes" if same else "OTHER BYTES")


FAULTS: dict[str, Callable[[Bench], Outcome]] = {
    "disk too small": disk_too_small,
    "disk full during the run": disk_full,
    "file size limit during the run": file_size_limit,
    "mount removed during the run": vanished_mount,
    "work folder removed during the run": work_folder_removed,
    "read-only folder": read_only_folder,
    "OUT holds other files": out_exists,
    "artifact truncated": part_cut_short,
    "bit flipped in an artifact": bit_flipped,
    "bit flipped in the hidden states": hidden_states_damaged,
    "bit flipped in the identity": note_damaged,
    "bit flipped while the result is assembled": damaged_while_assembled,
    "another model": other_model,
    "another recipe": other_recipe,
    "another seed": other_seed,
    "another number of threads": other_threads,
    "another text": other_text,
    "same command without --resume": no_resume,
    "same command twice at the same time": two_at_once,
    "weight file removed during the run": shard_gone,
    "weight file without read permission": shard_unreadable,
    "weight file truncated": shard_cut_short,
    "weights of the wrong type": wrong_dtype,
    "NaN in the last tensor": not_finite,
    "too little memory": no_memory,
    "out of memory during the run": memory_runs_out,
    "worker process killed": worker_killed,
}
