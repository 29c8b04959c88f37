"""Compressing and measuring one row of a sweep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfplate.compression.compress import compress
from halfplate.compression.pruning import PruneFields, prune
from halfplate.compression.work_folder import WorkFolder
from halfplate.evaluation.bench import bench
from halfplate.evaluation.judge import evaluate
from halfplate.models.sources import Source, open_source
from halfplate.planning import plan_source
from halfplate.planning.transforming import plan_transforms
from halfplate.recipe import Recipe
from halfplate.sweeps.description import Row, Sweep
from halfplate.telemetry.machine import machine
from halfplate.telemetry.progress import Report
from halfplate.version import package_version

# Entries of the JSON object of `compress` that a record keeps besides the bytes.
KEPT = ("calibration", "block_size", "levels", "mean_relative_error", "error_kind", "without_kernel", "notes")


@dataclass(frozen=True)
class Bench:
    """The model of a sweep, and how its rows are measured.

    linear_nbytes: bytes of its linears at 2 bytes per weight.
    other_nbytes: bytes of everything else.
    """

    sweep: Sweep
    source: Source
    linear_nbytes: int
    other_nbytes: int

    @classmethod
    def of(cls, sweep: Sweep, source: Source) -> Bench:
        return cls(sweep, source, *_plain_nbytes(source))

    @property
    def original(self) -> dict[str, Any]:
        """The bytes of the row of the original model."""
        return self._sizes(self.linear_nbytes, self.linear_nbytes, self.other_nbytes)

    def planned(self, row: Row) -> dict[str, Any]:
        """The bytes that a row will have (with a budget, the most; None with a time budget); raises HalfplateError if it cannot run."""
        if row.recipe is None:
            return self.original
        if row.pruned:
            # It refuses what cannot run; the bytes are those of the written model.
            plan_transforms(self.source, row.recipe)
            return {}
        plan = plan_source(self.source, row.recipe)
        most = plan.nbytes_at_most
        return {} if most is None else self._sizes(most, plan.dense_nbytes, plan.other_nbytes)

    def compressed(self, row: Row, out: Path, kept: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """Compress the model by the recipe of a row, or resume that; returns the entries for the record.

        kept: the record so far, with the time of a compression that an earlier call finished.
        """
        continued = WorkFolder(out).finished_work()
        if row.pruned:
            return self._pruned(row.recipe, out, continued, kept, report)
        with _same_threads():
            made = compress(
                self.source.name, out, row.recipe, overwrite=True, report=report, resume=True, benchmark=False
            )
        # Without phases, the checkpoint already existed.
        found = made["seconds"].keys() == {"total"}
        facts = {key: made[key] for key in KEPT} | {"seconds": made["seconds"], "continued": continued or found}
        return {
            "compression": kept.get("compression", facts) if found else facts,
            **self._sizes(made["nbytes"], made["dense_nbytes"], made["other_nbytes"]),
        }

    def _pruned(
        self, recipe: Recipe | None, out: Path, continued: bool, kept: Mapping[str, Any], report: Report
    ) -> dict[str, Any]:
        """`compressed` for a row that stays a plain model. Linears count 2 bytes per weight, whatever the file has."""
        assert recipe is not None, "only the original has none"
        assert recipe.keep is not None, "Recipe refuses a transform that shrinks without it"
        options: Any = {name: getattr(recipe, name) for name in PruneFields.__annotations__}
        with _same_threads():
            made = prune(
                self.source.name, out, recipe.keep, overwrite=True, report=report, resume=True, check=False, **options
            )
        found = made["seconds"].keys() == {"total"}
        facts = {"told": made["pruned"]["told"], "seconds": made["seconds"], "continued": continued or found}
        linears, others = _plain_nbytes(open_source(str(out)))
        sizes = self._sizes(linears, self.linear_nbytes, others)
        return {"compression": kept.get("compression", facts) if found else facts, **sizes}

    def judged(self, row: Row, model: str, report: Report) -> dict[str, Any]:
        """The measurements of `model`, the original or the checkpoint of a row: `evaluation`, and `speed` if requested."""
        options, against = dict(self.sweep.evaluation), None if row.recipe is None else self.source.name
        if "tasks" in options and "text" not in options:
            against = None  # otherwise generated text would be scored, too
        seconds: dict[str, float] = {}
        with _same_threads():
            found = {
                "evaluation": _timed(
                    seconds,
                    "evaluation",
                    lambda: evaluate(model, against=against, activations=row.activations, report=report, **options),
                )
            }
            if self.sweep.speed is not None:
                original, speed = None if row.recipe is None else self.source.name, dict(self.sweep.speed)
                found["speed"] = _timed(
                    seconds,
                    "speed",
                    lambda: bench(model, original, activations=row.activations, progress=report, **speed),
                )
        return {**found, "seconds": seconds, "machine": machine(), "halfplate": package_version()}

    def _sizes(self, nbytes: int, dense_nbytes: int, other_nbytes: int) -> dict[str, Any]:
        """Bytes of the compressed linears and of all weights, and their shares of those of the original."""
        return {
            "nbytes": nbytes,
            "weight_nbytes": nbytes + other_nbytes,
            "linear_share": nbytes / dense_nbytes,
            "share": (nbytes + other_nbytes) / (self.linear_nbytes + self.other_nbytes),
        }


def _plain_nbytes(source: Source) -> tuple[int, int]:
    """Bytes of the linears of a plain model at 2 bytes per weight, and of everything else."""
    # Any method that includes every linear and needs no text.
    plan = plan_source(source, Recipe(method="rtn", core_dtype="int8"))
    return plan.dense_nbytes, plan.other_nbytes


def _timed(seconds: dict[str, float], name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    found = work()
    seconds[name] = time.perf_counter() - start
    return found


@contextmanager
def _same_threads() -> Iterator[None]:
    """Restore the number of threads after a row."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
