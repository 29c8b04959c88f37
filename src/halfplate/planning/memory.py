"""The peak memory of a compression in each phase, and its bound (docs/memory.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from halfplate.calibration.collect import BATCH
from halfplate.calibration.experts import ROWS
from halfplate.calibration.self_text import CACHE_BYTES, sequences_at_once
from halfplate.calibration.text import TOKEN_NBYTES
from halfplate.formats.spec import WeightSpec
from halfplate.headroom import memory
from halfplate.job import Job
from halfplate.planning.sizes import ExpertSizes, ModelSizes
from halfplate.recipe import Recipe
from halfplate.runtime.prepare import bf16_kernels
from halfplate.solvers.target import correcting_nbytes
from halfplate.statistics import Statistic

BF16, FP32, FP64 = 2, 4, 8
ALLOWANCE = 1_500_000_000  # constant of the bound: libraries, hidden states, the solver
# Memory for layers, keys and values while text is generated. It does not depend on the free memory, because the text depends (by
# rounding) on the number of parallel sequences, and must be the same everywhere.
SAMPLING_NBYTES = 700_000_000
LIBRARIES = 800_000_000  # Python with torch and transformers, if the system does not report it
CHECKING = "checking"  # name of the self-check phase
CHECKED = 128  # tokens of the self-check
REMEMBERED_NBYTES = 300_000_000  # outputs of the parts of a layer, for further passes
HEAP = 100_000_000  # freed and not given back
TABLE_TOKENS = 8192  # that the Gram matrix of the head's inputs is made of
SOLVING_ROWS = 300_000_000  # for the rows of a table that are solved at once


@dataclass(frozen=True)
class MemoryPlan:
    """The peak bytes in each phase, the bound, and the options that hold the whole model, to which the bound does not apply.

    remembered: bytes of outputs of a layer that may be kept between the passes over its stages, within the bound.
    """

    phases: dict[str, int]
    bound: int
    whole_model: tuple[str, ...]
    remembered: int = 0

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def unchecked(self) -> MemoryPlan:
        """A copy without the self-check."""
        return replace(self, phases={phase: held for phase, held in self.phases.items() if phase != CHECKING})

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=self.phases.__getitem__)


def sampling_room(sizes: ModelSizes, device: str) -> tuple[int, int]:
    """Bytes of layers and head that stay in memory while text is generated, and of keys and values.

    Small models stay in memory, in bf16 if the kernels support it. Each layer of a larger model is read again for every token, once
    for all sequences of a batch.
    """
    kernels = bf16_kernels(device) is not None
    whole = BF16 * (sum(sizes.blocks) + sizes.hidden * sizes.vocabulary) if kernels else FP32 * sum(sizes.blocks)
    resident = whole if whole <= SAMPLING_NBYTES * 2 // 3 else 0
    return resident, SAMPLING_NBYTES - resident


def memory_bound(sizes: ModelSizes, job: Job) -> int:
    """2 decoder layers in fp32, the weights outside the layers, one layer's Gram matrices and cross moments, those of one expert, and 1.5 GB."""
    grams = sum(_gram_nbytes(width, job) for width in sizes.stages) + _expert_grams(sizes, job)
    return FP32 * (2 * sizes.block + sizes.outer) + grams + ALLOWANCE


def memory_plan(
    sizes: ModelSizes,
    specs: Sequence[WeightSpec],
    job: Job,
    workers: int,
    transforming: int = 0,
    tables: Sequence[WeightSpec] = (),
) -> MemoryPlan:
    """The memory plan of a compression.

    specs: of the matrices in the layers. tables: of the embedding and the head. transforming: bytes that the transforms hold.
    """
    recipe, runs = job.recipe, job.runs_text
    base = (memory("VmRSS") or LIBRARIES) + HEAP
    block, reading = FP32 * sizes.block, (FP32 + 2) * sizes.largest
    blocks = block * (job.streams if runs else 1)
    phases = {"reading": base + reading, "writing": base + 2 * block + (2 * FP32 + 1) * sizes.largest}
    if transforming:
        phases["transforming"] = base + transforming
    if runs:
        # The arguments of the first batch are kept, to compare those of other batches with them.
        batch = BATCH * recipe.seq_len * FP32
        hidden = batch * (6 * sizes.hidden + 3 * sizes.ffn + 3 * sizes.beside + sizes.arguments)
        tokens = TOKEN_NBYTES * recipe.samples * recipe.seq_len
        phases["embedding"] = (
            base + tokens + FP32 * (sizes.outer - sizes.head) + block + reading + hidden + batch * sizes.arguments
        )
        if recipe.sampled:
            held, _ = sampling_room(sizes, recipe.device)
            sampling = _sampling(sizes, recipe)
            # Layers that stay are read before the first token, the others at every token.
            most = max(held + block + reading, sampling) if held else sampling + block + reading
            phases["calibration text"] = base + tokens + FP32 * sizes.outer + most
        # While text runs through a layer, its finished matrices are held both stored and multiplied out.
        phases["statistics"] = base + blocks + block + hidden + _stage(sizes, job, collecting=True)
    if tables:
        most = max(spec.d_out * spec.d_in for spec in tables)
        states = 2 * TABLE_TOKENS * FP32 * (sizes.hidden + sizes.beside + sizes.arguments)
        collecting = FP32 * sizes.outer + 2 * block + states if runs else 0
        phases["embedding and head"] = base + max(collecting, (2 * FP32 + 2) * most + SOLVING_ROWS)
    solve = max(solving_memory(job, spec) for spec in set(specs))
    phases["solving"] = base + blocks + _stage(sizes, job) + solve
    if sizes.experts is not None and runs:
        phases["experts"] = base + blocks + _expert_task(sizes.experts, job) + _expert_grams(sizes, job) + solve
    remembered = _remember(sizes, job, phases) if runs else 0
    if recipe.tune_block:
        phases["tuning"] = base + 7 * block + BATCH * recipe.seq_len * FP32 * (20 * sizes.hidden + 8 * sizes.ffn)
    if workers > 1:
        # Each worker has its task, and the caller the sums of a stage and of one batch.
        each = max(phases["solving"], phases.get("statistics", 0), phases.get("experts", 0))
        phases["workers"] = phases["solving"] - solve + workers * each
    loaded = [*specs, *tables]
    checking = _loaded(sizes, loaded) if check_loads_whole(sizes, loaded, job) else 0
    chain = FP32 * sizes.outer + 2 * block + reading + sizes.vocabulary * CHECKED * (3 * FP32 + FP64)
    phases[CHECKING] = base + max(checking, chain)
    ordered = any(spec.steps() for spec in specs)
    phases |= _whole(sizes, specs, job, base)
    return MemoryPlan(phases, memory_bound(sizes, job), _holds(recipe, ordered), remembered)


def _remember(sizes: ModelSizes, job: Job, phases: dict[str, int]) -> int:
    """The bytes of remembered outputs, which are added to the phases that hold them; as many as the bound leaves."""
    recipe, held = job.recipe, [phase for phase in ("statistics", "solving", "experts") if phase in phases]
    outputs = recipe.samples * recipe.seq_len * FP32 * (5 * sizes.hidden + 2 * sizes.ffn + sizes.beside)
    free = memory_bound(sizes, job) - max(phases[phase] for phase in held)
    remembered = max(0, min(REMEMBERED_NBYTES, outputs, free))
    for phase in held:
        phases[phase] += remembered
    return remembered


def check_loads_whole(sizes: ModelSizes, specs: Sequence[WeightSpec], job: Job) -> bool:
    """Whether the self-check can load the whole result within the bound; a larger result is read layer by layer."""
    return _loaded(sizes, specs) + LIBRARIES <= memory_bound(sizes, job)


def _loaded(sizes: ModelSizes, specs: Sequence[WeightSpec]) -> int:
    """Bytes while the result is loaded: compressed matrices in the mapped file and packed, the rest in the file, in fp32 and packed."""
    compressed = sum(spec.d_out * spec.d_in for spec in specs if spec.same_as is None)
    stored = sum(spec.nbytes for spec in specs if spec.same_as is None)
    return (FP32 + 2 * BF16) * (sizes.parameters - compressed) + stored * 9 // 4


def solving_memory(job: Job, spec: WeightSpec) -> int:
    """Bytes held while one matrix is corrected and solved, without its layer and the statistics."""
    correcting = correcting_nbytes(spec.d_out * spec.d_in, spec.d_in) if job.corrects else 0
    return max(correcting, job.method.solving_nbytes(spec))


def _gram_nbytes(width: int, job: Job) -> int:
    if job.statistic < Statistic.GRAM:
        return 0
    return FP64 * width**2 * (2 if job.corrects else 1)


def _stage(sizes: ModelSizes, job: Job, collecting: bool = False) -> int:
    """The Gram matrices held at once, and during collection also the sums of a chunk and the products of a batch."""
    grams = [_gram_nbytes(width, job) for width in sizes.stages]
    largest = max(grams, default=0)
    held = sum(grams) if job.recipe.inputs == "dense" else largest
    return held + (held + largest // 2 if collecting else 0)


def _expert_grams(sizes: ModelSizes, job: Job) -> int:
    """The Gram matrices of one expert at a time: of all tokens, of its own, and those of its down projection."""
    if sizes.experts is None:
        return 0
    return 2 * _gram_nbytes(sizes.experts.hidden, job) + 2 * _gram_nbytes(sizes.experts.inner, job)


def _expert_task(experts: ExpertSizes, job: Job) -> int:
    """The weights of one expert, original and multiplied out, and the rows whose products are added at once."""
    rows = 2 * ROWS * (2 * experts.hidden + 4 * experts.inner) * (2 if job.corrects else 1)
    return FP32 * (3 * experts.values + rows)


def _sampling(sizes: ModelSizes, recipe: Recipe, room: int | None = None) -> int:
    resident, cache = sampling_room(sizes, recipe.device) if room is None else (0, room)
    sequences = min(recipe.sampled or recipe.samples, sequences_at_once(sizes.cache_nbytes, recipe.seq_len, cache))
    # Logits, their softmax, and its cumulative sums in fp64.
    return resident + sequences * (sizes.cache_nbytes * recipe.seq_len + (2 * FP32 + 2 * FP64) * sizes.vocabulary)


PROBE_SAMPLES, PROBE_LENGTH = 2, 128  # through the model at once, to order steps of size


def _holds(recipe: Recipe, ordered: bool) -> tuple[str, ...]:
    """The options of a recipe that hold the whole model. ordered: whether its steps of size are put in order."""
    options = {
        "--budget": recipe.budget is not None,
        "--fit": recipe.fit is not None,
        "--fit-ram": recipe.fit_ram is not None,
        "--time-budget": recipe.time_budget is not None,
        f"--ratios {recipe.ratios}": recipe.ratios != "uniform",
        "--max-kl": recipe.max_kl is not None,
        f"--method {recipe.method}": ordered,
    }
    return tuple(option for option, given in options.items() if given)


def _whole(sizes: ModelSizes, specs: Sequence[WeightSpec], job: Job, base: int) -> dict[str, int]:
    """The phases that hold the whole model."""
    phases, recipe = {}, job.recipe
    whole = base + FP32 * sizes.parameters
    hidden = recipe.samples * recipe.seq_len * FP32 * (sizes.hidden + sizes.beside + sizes.arguments)
    if recipe.budgeted:
        grams = FP64 * sum(width**2 for width in sizes.stages)
        solve = max(job.method.solving_nbytes(spec) for spec in specs)
        logits = 3 * recipe.seq_len * FP32 * sizes.vocabulary
        phases["choosing levels"] = whole + 2 * hidden + grams + solve + logits
    if recipe.ratios != "uniform":
        phases["choosing ratios"] = whole + 2 * hidden + FP32 * sizes.block
    if any(spec.steps() for spec in specs):
        phases["ordering"] = whole + 2 * PROBE_SAMPLES * PROBE_LENGTH * FP32 * sizes.vocabulary
    if recipe.max_kl is not None:
        compressed = FP32 * sizes.outer + sum(spec.nbytes for spec in specs)
        phases["judging"] = whole + compressed + _sampling(sizes, recipe, CACHE_BYTES)
    return phases
