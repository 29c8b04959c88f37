"""The classes of a plan: each matrix, and the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from halfplate.formats.spec import WeightSpec
from halfplate.job import Job
from halfplate.planning.disk import DiskPlan, recorded_nbytes
from halfplate.planning.fitting import Limit
from halfplate.planning.memory import MemoryPlan
from halfplate.planning.sizes import ModelSizes
from halfplate.planning.speed import Speed
from halfplate.planning.transforming import TransformPlan
from halfplate.recipe import Recipe
from halfplate.runtime.backends import without_kernel
from halfplate.statistics import Statistic

LEAST_SHARE = 0.5  # share of the decoder parameters below which a plan warns


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix of the model: its format, or why it is not compressed.

    shape: (d_out, d_in), or None if a skipped module is not a single matrix. block: index of its layer, None if it is the embedding or the head. spec: None if it is skipped. flops: operations of
    solving it; memory: bytes held meanwhile beside the process itself; seconds: None if this machine was not measured.
    """

    name: str
    shape: tuple[int, ...] | None
    block: int | None
    method: str
    spec: WeightSpec | None
    reason: str | None = None
    flops: float = 0.0
    memory: int = 0
    seconds: float | None = None
    free: bool = False

    @property
    def skipped(self) -> bool:
        return self.spec is None

    def to_json(self) -> dict[str, Any]:
        """The entry of this matrix in `plan --json`."""
        spec = self.spec
        return {
            "name": self.name,
            "format": spec.format if spec else "dense",
            "pattern": str(spec.pattern) if spec else None,
            "core_dtype": spec.core_dtype if spec else None,
            "shape": list(self.shape) if self.shape else None,
            "nbytes": spec.nbytes if spec else None,
            "dense_nbytes": spec.dense_nbytes if spec else None,
            "method": None if self.skipped else self.method,
            "skipped": self.skipped,
            "reason": self.reason,
            "flops": None if self.skipped else self.flops,
            "memory_bytes": None if self.skipped else self.memory,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Plan:
    """Every matrix, the bytes before and after, the required resources, and a fingerprint of everything that determines the result.

    other_nbytes: stored bytes of everything that is not compressed (embeddings, norms, biases, lm_head, skipped matrices).
    source_nbytes: bytes of the weight files.
    memory: held by a run with the planned number of workers.
    speed: measured speed of this machine, or None.
    seconds: estimate for each phase in one process.
    notes: one sentence for each entry of the source that is ignored (`Source.notes`).
    untraced: why the model could not be traced to find the weights that its code reads, or None.
    transforms: applied to the model first; everything else in the plan describes the transformed model.
    limit: the bytes within which a budget chooses; None without a budget in bytes.
    """

    model: str
    job: Job
    matrices: tuple[MatrixPlan, ...]
    block_size: int
    parameters: int
    other_nbytes: int
    source_nbytes: int
    fingerprint: str
    sizes: ModelSizes
    memory: MemoryPlan
    disk: DiskPlan
    speed: Speed | None
    seconds: Mapping[str, float] | None
    notes: tuple[str, ...] = ()
    untraced: str | None = None
    transforms: tuple[TransformPlan, ...] = ()
    limit: Limit | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the job."""
        return self.job.recipe

    @cached_property
    def specs(self) -> Mapping[str, WeightSpec]:
        """The matrices that will be compressed, by name."""
        return {matrix.name: matrix.spec for matrix in self.matrices if matrix.spec is not None}

    @cached_property
    def layer_specs(self) -> Mapping[str, WeightSpec]:
        """Those of the decoder layers, each that several layers share once."""
        return {
            m.name: m.spec
            for m in self.matrices
            if m.spec is not None and m.block is not None and m.spec.same_as is None
        }

    @cached_property
    def borrowed(self) -> Mapping[str, MatrixPlan]:
        """Those of the decoder layers whose weight is that of an earlier layer."""
        return {
            m.name: m
            for m in self.matrices
            if m.spec is not None and m.block is not None and m.spec.same_as is not None
        }

    @property
    def table_specs(self) -> Mapping[str, WeightSpec]:
        """Those of the embedding and the head."""
        return {m.name: m.spec for m in self.matrices if m.spec is not None and m.block is None}

    def with_specs(self, specs: Mapping[str, WeightSpec]) -> Plan:
        """A copy in which the matrices in `specs`, and those that borrow from them, have the given formats."""
        given = tuple(replace(m, spec=specs.get(m.name, m.spec)) for m in self.matrices)
        return replace(self, matrices=given).following()

    def without(self, names: Collection[str]) -> Plan:
        """A copy that leaves the matrices `names`, and those that borrow from them, as they are."""
        left = tuple(replace(m, spec=None) if m.name in names else m for m in self.matrices)
        return replace(self, matrices=left).following()

    def following(self) -> Plan:
        """A copy in which each matrix of the layers that borrows its weight has the format of its owner, or none if that has none."""
        by_name = {matrix.name: matrix.spec for matrix in self.matrices}

        def followed(matrix: MatrixPlan) -> MatrixPlan:
            if matrix.name not in self.borrowed or matrix.spec is None or matrix.spec.same_as is None:
                return matrix
            lent = by_name[matrix.spec.same_as]
            return replace(matrix, spec=None if lent is None else replace(lent, same_as=matrix.spec.same_as))

        return replace(self, matrices=tuple(map(followed, self.matrices))) if self.borrowed else self

    @property
    def without_kernel(self) -> str | None:
        """Which matrices no kernel runs, and the nearest settings that have one; None if all have."""
        return without_kernel(self.layer_specs.values())

    @property
    def transforming(self) -> int:
        """Peak bytes while the model is transformed, in addition to the process itself."""
        return max((step.memory for step in self.transforms), default=0)

    @cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def nbytes_at_most(self) -> int | None:
        """The most bytes that the matrices can take: `nbytes`, unless the run chooses formats; None with a time budget."""
        if not self.recipe.budgeted:
            return self.nbytes
        return None if self.limit is None else self.limit.matrices

    @cached_property
    def dense_nbytes(self) -> int:
        return sum(spec.dense_nbytes for spec in self.specs.values())

    @property
    def wrapper_share(self) -> float:
        return wrapper_share(Counter(self.layer_specs.values()))

    @property
    def experts(self) -> dict[str, int] | None:
        """How experts are solved: their number, and the bytes and passes that their statistics take. None without experts."""
        sizes = self.sizes.experts
        if sizes is None:
            return None
        grams = 0 if self.job.statistic < Statistic.GRAM else 8 * (sizes.hidden**2 + sizes.inner**2)
        return {
            "layers": sizes.layers,
            "per_layer": sizes.experts,
            "per_token": sizes.chosen,
            "at_once": 1,
            "passes": sizes.experts if self.job.runs_text else 0,
            "recorded_bytes": recorded_nbytes(self.sizes, self.job),
            "gram_bytes": grams * (2 if self.job.corrects else 1),
        }

    @property
    def decoder_share(self) -> float:
        """Parameters of the matrices to compress over those of all decoder layers."""
        return sum(spec.d_out * spec.d_in for spec in self.layer_specs.values()) / sum(self.sizes.blocks)

    @property
    def warnings(self) -> list[str]:
        """One sentence for each property of the plan that is probably unwanted."""
        found = []
        if self.decoder_share < LEAST_SHARE:
            found.append(
                f"only {self.decoder_share:.1%} of the decoder's parameters will be compressed; the column `why skipped` says why the others are not compressed"
            )
        if self.untraced is not None:
            found.append(
                f"the model cannot be traced ({self.untraced}), so weights that its code reads as data were found only by reading its source code"
            )
        return found

    @property
    def flops(self) -> float:
        """Operations of solving all matrices."""
        return sum(matrix.flops for matrix in self.matrices)

    def to_json(self) -> dict[str, Any]:
        """The keys of `plan --json`."""
        seconds = None if self.seconds is None else {name: round(value, 1) for name, value in self.seconds.items()}
        return {
            "model": self.model,
            "recipe": self.recipe.to_json(),
            "transforms": [step.to_json() for step in self.transforms],
            "fingerprint": self.fingerprint,
            "matrices": [matrix.to_json() for matrix in self.matrices],
            "nbytes": self.nbytes,
            "nbytes_at_most": self.nbytes_at_most,
            "limit": None if self.limit is None else self.limit.to_json(),
            "dense_nbytes": self.dense_nbytes,
            "other_nbytes": self.other_nbytes,
            "source_nbytes": self.source_nbytes,
            "parameters": self.parameters,
            "block_size": self.block_size,
            "wrapper_share": self.wrapper_share,
            "without_kernel": self.without_kernel,
            "decoder_share": self.decoder_share,
            "experts": self.experts,
            "warnings": self.warnings,
            "flops": self.flops,
            "seconds": seconds,
            "seconds_estimate": None if seconds is None else round(sum(seconds.values()), 1),
            "memory_bytes": self.memory.phases,
            "peak_memory_bytes_estimate": self.memory.peak,
            "memory_bound_bytes": self.memory.bound,
            "whole_model_held_by": list(self.memory.whole_model),
            "disk_bytes": self.disk.total,
            "work_folder_bytes": self.disk.work,
            "notes": list(self.notes),
        }


def wrapper_share(specs: Mapping[WeightSpec, int]) -> float:
    """Parameters outside the cores, relative to those of the original; specs: each with its number of matrices."""
    beside = sum(count * spec.numbers_beside_core for spec, count in specs.items())
    return beside / sum(count * spec.d_out * spec.d_in for spec, count in specs.items())
