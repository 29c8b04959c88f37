"""The disk space that a compression needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfplate.calibration.collect import BATCH, CHUNKS
from halfplate.formats.spec import WeightSpec
from halfplate.job import Job
from halfplate.planning.memory import FP32, FP64
from halfplate.planning.sizes import ModelSizes
from halfplate.statistics import Statistic

SLACK = 2_000_000  # allowance for headers, notes, tokenizer, log and report


@dataclass(frozen=True)
class DiskPlan:
    """Bytes of the result, and the most bytes that the work folder needs at the same time.

    transformed: fp32 models that transforms write first.
    parts: finished layers and matrices.
    hidden: hidden states between two layers.
    statistics: files that several processes pass to each other.
    """

    result: int
    transformed: int
    parts: int
    hidden: int
    statistics: int

    @property
    def work(self) -> int:
        return self.transformed + self.parts + self.hidden + self.statistics

    @property
    def total(self) -> int:
        return self.result + self.work


def recorded_nbytes(sizes: ModelSizes, job: Job) -> int:
    """Bytes of the recorded inputs of the experts of a layer, from which each expert reads those of its tokens; 0 without experts."""
    if sizes.experts is None or not job.runs_text:
        return 0
    streams = 2 if job.corrects else 1
    return FP32 * job.recipe.samples * job.recipe.seq_len * streams * (sizes.experts.hidden + sizes.experts.chosen)


def disk_plan(
    sizes: ModelSizes,
    specs: Sequence[WeightSpec],
    other_nbytes: int,
    job: Job,
    workers: int,
    transformed: int,
    most: int | None = None,
) -> DiskPlan:
    """The bytes that a compression writes.

    other_nbytes: of everything outside the matrices of the layers.
    transformed: of the files of its transforms.
    most: bytes of the matrices that a budget chooses formats for, if that bounds them.
    """
    recipe = job.recipe
    linears = sum(spec.nbytes for spec in specs)
    if recipe.budgeted:  # a time budget does not bound the bytes
        whole = sum(spec.dense_nbytes for spec in specs)
        linears = max(linears, whole if most is None else min(most, whole))
    result = linears + other_nbytes + SLACK
    hidden = statistics = 0
    if job.runs_text:
        # Of two neighbouring layers while one is written, and all further values per token that layers receive.
        values = 2 * job.streams * (sizes.hidden + sizes.beside) + sizes.arguments
        if job.corrects:  # the inputs of the linears of a layer in the original model
            values += sum(sizes.stages)
        hidden = FP32 * recipe.samples * recipe.seq_len * values + recorded_nbytes(sizes, job)
        if workers > 1 and job.statistic >= Statistic.GRAM:
            kinds = 2 if job.corrects else 1
            chunks = min(CHUNKS, -(-recipe.samples // BATCH))
            statistics = FP64 * max(sizes.stages, default=0) ** 2 * kinds * (chunks + 1)
    # Matrices are kept until their layer is complete, so those of one layer are stored twice.
    twice = FP32 * sizes.block
    return DiskPlan(result, transformed, result + twice, hidden, statistics)
