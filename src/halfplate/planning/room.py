"""Checking, before any work, whether this machine has the memory and disk that a plan needs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from halfplate.allocation.asked import CONTEXT
from halfplate.checkpoint.output import work_place
from halfplate.errors import HalfplateError
from halfplate.headroom import available_memory, spoken
from halfplate.planning.memory import CHECKING, memory_plan
from halfplate.planning.plan import Plan
from halfplate.statistics import Statistic

# Options that reduce the memory of a run, in the order in which they are suggested.
CURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--workers 1", {"workers": 1}),
    ("leave out --max-kl", {"max_kl": None}),
    ("leave out --budget", {"budget": None, "search": "knapsack"}),
    ("leave out --fit", {"fit": None, "search": "knapsack"}),
    ("leave out --fit-ram", {"fit_ram": None, "context": CONTEXT, "search": "knapsack"}),
    ("leave out --time-budget", {"time_budget": None, "search": "knapsack"}),
    ("--ratios uniform", {"ratios": "uniform"}),
    ("--tune-block 0", {"tune_block": 0}),
    ("--calibration FILE (sampling holds keys and values)", {"calibration": "text.txt"}),
    ("--inputs compressed", {"inputs": "compressed"}),
    ("--cross-damping none", {"cross_damping": "none"}),
    ("--samples 64", {"samples": 64}),
    ("--seq-len 128", {"seq_len": 128}),
    ("--no-check", {"check": False}),
)


def refusal(plan: Plan, out: Path | None, workers: int = 1) -> str | None:
    """Why this machine cannot run the plan, in one line with a cure; None if it can.

    out: folder of the result; None checks only the memory.
    """
    return _memory_refusal(plan, workers) or (None if out is None else _disk_refusal(plan, out))


def check_room(plan: Plan, out: Path, workers: int) -> None:
    """Raise HalfplateError if `refusal` returns a reason."""
    if (reason := refusal(plan, out, workers)) is not None:
        raise HalfplateError(reason)


def _memory_refusal(plan: Plan, workers: int) -> str | None:
    available = available_memory()
    # GPU memory is not counted.
    if available is None or plan.memory.peak <= available or torch.device(plan.recipe.device).type != "cpu":
        return None
    return (
        f"memory: {plan.memory.largest} needs {spoken(plan.memory.peak)}, this process can use {spoken(available)}; "
        f"{_cure(plan, workers, available)}"
    )


def _cure(plan: Plan, workers: int, available: int) -> str:
    """The first option with which the plan would fit, or else the shortest list of options from the first on."""
    specs, tables = list(plan.layer_specs.values()), list(plan.table_specs.values())
    checked = CHECKING in plan.memory.phases

    def fits(changes: dict[str, Any]) -> bool:
        others = {name: value for name, value in changes.items() if name not in ("workers", "check")}
        job = replace(plan.job, recipe=replace(plan.recipe, **others))
        held = memory_plan(plan.sizes, specs, job, changes.get("workers", workers), plan.transforming, tables)
        return (held if changes.get("check", checked) else held.unchecked()).peak <= available

    def now(name: str) -> Any:
        return {"workers": workers, "check": checked}.get(name, getattr(plan.recipe, name, None))

    def changing(changes: dict[str, Any]) -> bool:
        return any(value != now(name) for name, value in changes.items()) and not (
            "calibration" in changes and not plan.recipe.sampled
        )

    def allowed(changes: dict[str, Any]) -> bool:
        try:
            return fits(changes)
        except HalfplateError:
            # Options that exclude each other.
            return False

    useful = [(text, changes) for text, changes in CURES if changing(changes)]
    useful = [
        (text, changes)
        for text, changes in useful
        if not any(name in changes and getattr(plan.recipe, name) <= changes[name] for name in ("samples", "seq_len"))
    ]
    for text, changes in useful:
        if allowed(changes):
            return f"try {text}"
    together: dict[str, Any] = {}
    for number, (_, changes) in enumerate(useful, start=1):
        together |= changes
        if allowed(together):
            return f"try {', '.join(text for text, _ in useful[:number])} together"
    grams = "--method wanda, which needs no Gram matrices, or " if plan.job.statistic >= Statistic.GRAM else ""
    return f"no option of compress lowers it enough; use {grams}a machine with more memory"


def _disk_refusal(plan: Plan, out: Path) -> str | None:
    free = free_for(out)
    if free is None or plan.disk.total <= free:
        return None
    parts = [("result", plan.disk.result), ("finished artifacts", plan.disk.parts), ("hidden states", plan.disk.hidden)]
    parts += [
        ("transformed model in fp32", plan.disk.transformed),
        ("statistics for workers", plan.disk.statistics),
    ]
    listed = ", ".join(f"{name} {spoken(nbytes)}" for name, nbytes in parts if nbytes)
    fewer = "use fewer --samples or " if 2 * plan.disk.hidden > plan.disk.total else ""
    return (
        f"out={str(out)!r}: {spoken(plan.disk.total)} of disk space needed ({listed}), but only {spoken(free)} free; "
        f"{fewer}free some space, or choose an OUT on another disk"
    )


def free_for(out: Path) -> int | None:
    """Bytes of the disk that a result in `out` may take, those of an earlier run of it included; None if the system does not tell."""
    try:
        target = out.resolve()
        above = next((parent for parent in target.parents if parent.exists()), target)
        free = shutil.disk_usage(above).free
    except OSError:
        return None
    return free + _nbytes(work_place(target))


def _nbytes(folder: Path) -> int:
    """Bytes of files of an earlier run, which need not be written again."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0
