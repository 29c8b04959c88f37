"""Everything that the report shows, collected from a checkpoint and its log.

Both are untrusted files. A value of the wrong type counts as not recorded, and the page escapes all text.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from halfplate.calibration.routed import tokens_per_expert
from halfplate.checkpoint.config import RECORD_FILE, read_record
from halfplate.checkpoint.read import inspect_checkpoint, read_checked_headers
from halfplate.formats.spec import WeightSpec
from halfplate.recipe import Recipe
from halfplate.report.command import compress_command
from halfplate.telemetry.log import LOG_FILE

LARGEST_LOG = 256 * 2**20
WORST = 10
# In the order in which a layer runs them; others follow by name.
USUAL = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
KINDS = ("kept values", "positions", "scales", "wrappers")  # in the order of the table; others follow


@dataclass(frozen=True)
class Matrix:
    """One compressed matrix.

    block: its layer number, None if its name has none.
    kind: the last part of its name.
    tokens: calibration tokens that were routed to its expert, None outside experts.
    """

    name: str
    block: int | None
    kind: str
    level: str
    shape: str
    nbytes: int
    dense_nbytes: int
    relative_error: float | None
    losses: tuple[float, ...]
    seconds: float | None
    tokens: float | None = None

    @property
    def alarm(self) -> str | None:
        """The fault of the matrix, if it has one."""
        if self.relative_error is not None and self.relative_error >= 1:
            return "its output error is larger than that of a zero matrix"
        # Rounding to few bits in between may lift the loss above its beginning; from there it falls again.
        if self.losses and self.losses[-1] > self.losses[0] and self.losses[-1] == max(self.losses):
            return "its solver diverged"
        if self.losses and min(self.losses) < 0:
            return "its solver diverged"
        return None


@dataclass(frozen=True)
class Findings:
    """Everything known about a checkpoint. Measurements are in the JSON form of the commands; empty means not measured."""

    folder: str
    model: str | None
    method: str | None
    recipe: Recipe | None
    matrices: tuple[Matrix, ...]
    error_kind: str | None
    nbytes: int
    dense_nbytes: int
    other_nbytes: int
    source_nbytes: int | None
    parts: dict[str, int]
    skipped: dict[str, str]
    calibration: dict[str, Any]
    fingerprint: str | None
    versions: dict[str, str]
    machine: str | None
    kernels: str | None
    command: str | None
    began: str | None
    seconds: dict[str, float]
    peak_rss_bytes: float | None
    recoveries: int
    check: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    answers: tuple[dict[str, str], ...] = ()
    against: str | None = None

    def with_measures(self, measures: dict[str, Any]) -> Findings:
        """A copy with new measurements."""
        return replace(
            self,
            quality=mapping(measures.get("quality")) or self.quality,
            speed=mapping(measures.get("speed")),
            answers=_answers(measures.get("answers")),
            against=text(measures.get("against")),
        )

    @property
    def routed(self) -> dict[str, float]:
        """The calibration tokens of experts (`tokens_per_expert`); empty without experts."""
        return tokens_per_expert({matrix.name: matrix.tokens for matrix in self.matrices})

    @property
    def mean_error(self) -> float | None:
        errors = [matrix.relative_error for matrix in self.matrices if matrix.relative_error is not None]
        return math.fsum(errors) / len(errors) if errors else None

    @property
    def median_error(self) -> float | None:
        errors = [matrix.relative_error for matrix in self.matrices if matrix.relative_error is not None]
        return median(errors) if errors else None

    @property
    def alarms(self) -> list[tuple[str, str]]:
        """The matrices with a fault: (name, fault)."""
        return [(matrix.name, matrix.alarm) for matrix in self.matrices if matrix.alarm is not None]

    @property
    def worst(self) -> list[Matrix]:
        """The matrices with the largest errors, largest first."""
        judged = [matrix for matrix in self.matrices if matrix.relative_error is not None]
        return sorted(judged, key=lambda matrix: -(matrix.relative_error or 0))[:WORST]

    @property
    def kinds(self) -> list[str]:
        """The linears of a layer, in the order of the model."""
        return list(dict.fromkeys(matrix.kind for matrix in self.matrices))

    def total(self, attribute: str) -> dict[str, float]:
        """The sum of an attribute over the matrices of each kind, if it is known."""
        sums: Counter[str] = Counter()
        for matrix in self.matrices:
            sums[matrix.kind] += getattr(matrix, attribute) or 0
        return dict(sums)


def gather(folder: Path) -> Findings:
    """Read the checkpoint in `folder` and its log; raises HalfplateError if the checkpoint is incomplete."""
    found = inspect_checkpoint(folder)
    specs, _ = read_checked_headers(folder)
    record = read_record(folder) if (folder / RECORD_FILE).is_file() else {}
    log = read_log(folder / LOG_FILE)
    plan, end, start = (_last(log, event) for event in ("plan", "end", "start"))
    measures = _last(log, "measures")
    recipe = Recipe.from_record(plan.get("recipe")) or Recipe.from_record(record.get("recipe"))
    model = text(plan.get("model")) or text(record.get("model"))
    out = text(plan.get("out")) or str(folder)
    kept = mapping(record.get("matrices"))
    seconds = {str(line.get("name")): number(line.get("seconds")) for line in log if line.get("event") == "matrix"}
    matrices = [
        _matrix(entry, mapping(kept.get(entry["name"])), seconds) for entry in found["matrices"] if entry["nbytes"]
    ]
    kinds = Counter(filter(None, (text(mapping(entry).get("error_kind")) for entry in kept.values())))
    return Findings(
        folder=str(folder),
        model=model,
        method=recipe.method if recipe else None,
        recipe=recipe,
        matrices=tuple(sorted(matrices, key=_in_order)),
        error_kind=next(iter(kinds)) if len(kinds) == 1 else None,
        nbytes=found["nbytes"],
        dense_nbytes=found["dense_nbytes"],
        other_nbytes=found["other_nbytes"],
        source_nbytes=_whole(plan.get("source_nbytes")),
        parts=_parts(specs.values()),
        skipped={str(name): text(reason) or "" for name, reason in mapping(record.get("skipped")).items()},
        calibration=mapping(record.get("calibration")),
        fingerprint=text(record.get("fingerprint")),
        versions={
            name: value
            for name, value in (mapping(record.get("versions")) | mapping(start.get("versions"))).items()
            if isinstance(value, str)
        },
        machine=text(start.get("machine")),
        kernels=text(start.get("kernels")),
        command=compress_command(model, out, recipe) if model and recipe else None,
        began=text(start.get("time")),
        seconds=numbers(end.get("seconds")),
        peak_rss_bytes=number(end.get("peak_rss_bytes")),
        recoveries=len(record["recoveries"]) if isinstance(record.get("recoveries"), list) else 0,
        check=mapping(record.get("check")),
        quality=mapping(end.get("held_out")),
    ).with_measures(measures)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are JSON objects; none if there is no log or it is too large."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_LOG:
            return []
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in content.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def text(value: Any) -> str | None:
    """`value` if it is text."""
    return value if isinstance(value, str) else None


def number(value: Any) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a JSON object."""
    found = {str(key): number(item) for key, item in mapping(value).items()}
    return {key: item for key, item in found.items() if item is not None}


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _last(log: list[dict[str, Any]], event: str) -> dict[str, Any]:
    return next((line for line in reversed(log) if line.get("event") == event), {})


def _matrix(entry: dict[str, Any], kept: dict[str, Any], seconds: dict[str, float | None]) -> Matrix:
    name = entry["name"]
    losses = kept.get("losses")
    finite = [number(loss) for loss in losses] if isinstance(losses, list) else []
    return Matrix(
        name=name,
        block=_block(name),
        kind=name.rpartition(".")[2],
        level=f"{entry['pattern']} {entry['core_dtype']}",
        shape="×".join(map(str, entry["shape"])),
        nbytes=entry["nbytes"],
        dense_nbytes=entry["dense_nbytes"],
        relative_error=number(entry["relative_error"]),
        losses=tuple(loss for loss in finite if loss is not None),
        seconds=seconds.get(name),
        tokens=number(entry.get("tokens")),
    )


def _block(name: str) -> int | None:
    """The first number in a module's name: `model.layers.12.mlp.up_proj` is in layer 12."""
    digits = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", name)
    return int(digits[1]) if digits else None


def _in_order(matrix: Matrix) -> tuple[int, int, str]:
    usual = USUAL.index(matrix.kind) if matrix.kind in USUAL else len(USUAL)
    return -1 if matrix.block is None else matrix.block, usual, matrix.name


def _parts(specs: Iterable[WeightSpec]) -> dict[str, int]:
    """Bytes by kind of stored tensor."""
    stored: Counter[str] = Counter()
    for spec in specs:
        kinds = spec.kinds()
        for name, (shape, dtype) in spec.layout().items():
            stored[kinds[name]] += prod(shape) * dtype.itemsize
    return {what: stored[what] for what in [*KINDS, *stored] if stored[what]}


def _answers(value: Any) -> tuple[dict[str, str], ...]:
    """Prompts with the answers of both models."""
    keys = ("prompt", "compressed", "dense")
    entries = value if isinstance(value, list) else []
    return tuple(
        {key: entry[key] for key in keys}
        for entry in entries
        if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys)
    )
