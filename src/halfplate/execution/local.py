"""Compression in one process, decoder block by decoder block."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfplate.calibration import CalibrationTokens, calibration_tokens, collect_block
from halfplate.checkpoint.write import write_checkpoint
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.evaluation.perplexity import evaluate
from halfplate.execution.held_out import held_out_tokens
from halfplate.execution.output import check_result_folder
from halfplate.execution.progress import Report, silent
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.methods.base import Method
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.linears import replace_linear
from halfplate.models.sources import LoadedModel, load_dense, open_source
from halfplate.planning import Plan, plan_source
from halfplate.recipe import Recipe
from halfplate.statistics import InputStatistics, Statistic

BATCH = 8  # samples that run through a block at once
MAX_KL_WINDOWS = 8
MAX_KL_SEQ_LEN = 256


@dataclass(frozen=True)
class MatrixRecord:
    """What became of one matrix.

    relative_error: squared error of the outputs over that of a zero matrix, weighted as `error_kind` says: by the `gram`
    (the true output error), by its `diagonal`, or by nothing (`weight`). losses: the solver's objective by iteration.
    """

    name: str
    relative_error: float
    error_kind: str
    losses: tuple[float, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What the checkpoint keeps; times would make equal runs unequal."""
        return {"relative_error": self.relative_error, "error_kind": self.error_kind, "losses": list(self.losses)}


def compress(
    model: str,
    out: str | Path,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    report: Report = silent,
    statistics: Statistic = Statistic.NONE,
) -> dict[str, Any]:
    """Compress `model` by `recipe`, write the checkpoint `out` and return the summary.

    statistics: collect at least these, e.g. GRAM so that every method is judged by its true output error. Raises
    HalfplateError on bad input with nothing written, RuinedResult after writing where the KL exceeds `recipe.max_kl`.
    """
    recipe, out = recipe or Recipe(), Path(out)
    clock = Clock()
    source = open_source(model)
    check_result_folder(out, overwrite, source.path)
    _check_device(recipe.device)
    plan = plan_source(source, recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)

    with clock("reading"):
        report("reading", 0, 1)
        loaded = load_dense(source, recipe.device)
        report("reading", 1, 1)
    method = recipe.create_method()
    needed = max(statistics, method.requires)
    with clock("calibration text"):
        tokens = _calibration(loaded, recipe, report) if needed > Statistic.NONE else None
    records = _compress_blocks(loaded, plan, method, needed, tokens, report, clock)
    with clock("writing"):
        report("writing", 0, 1)
        record = _checkpoint_record(plan, tokens, records)
        write_checkpoint(loaded.model.cpu(), loaded.tokenizer, out, plan.specs, record, source.other_dtype, overwrite)
        report("writing", 1, 1)

    summary = _summary(plan, out, records, tokens)
    if recipe.max_kl is not None:
        with clock("evaluating"):
            summary["held_out"] = _check_kl(model, loaded, recipe, out, report)
    return summary | {
        "seconds": clock.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class Clock:
    """Wall time of each phase in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        phases = {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
        return phases | {"total": round(sum(self._seconds.values()), 3)}


def _check_device(name: str) -> None:
    if torch.device(name).type == "meta":
        raise HalfplateError(f"device={name!r} holds no values to compute with; try --device cpu")
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise HalfplateError(f"device={name!r} is not there (torch finds no CUDA GPU); try --device cpu")


def _calibration(loaded: LoadedModel, recipe: Recipe, report: Report) -> CalibrationTokens:
    return calibration_tokens(
        recipe.calibration,
        loaded.model,
        loaded.tokenizer,
        recipe.samples,
        recipe.seq_len,
        recipe.seed,
        lambda done, total: report("calibration text", done, total),
    )


@torch.no_grad()
def _compress_blocks(
    loaded: LoadedModel,
    plan: Plan,
    method: Method,
    needed: Statistic,
    tokens: CalibrationTokens | None,
    report: Report,
    clock: Clock,
) -> list[MatrixRecord]:
    """Replace every planned linear of the model in place; hidden states pass through the blocks while these are dense."""
    names: dict[int, list[str]] = defaultdict(list)
    for matrix in plan.matrices:
        if matrix.spec is not None and matrix.block is not None:
            names[matrix.block].append(matrix.name)
    total, records = len(plan.specs), []
    report("compressing", 0, total)
    blockwise, inputs = None, []
    if tokens is not None:
        with clock("statistics"):
            blockwise = BlockwiseModel(loaded.model)
            inputs = [blockwise.embed(batch) for batch in tokens.ids.to(loaded.model.device).split(BATCH)]
    for block in range(max(names) + 1):
        collected: dict[str, InputStatistics] = {}
        if blockwise is not None:
            with clock("statistics"):
                collected, inputs = _collect(blockwise, block, inputs, names[block], needed)
        with clock("solving"):
            for name in names[block]:
                found = collected.pop(name, InputStatistics())
                records.append(_compress_matrix(loaded.model, name, method, found, plan.specs[name]))
                report("compressing", len(records), total)
    return records


def _collect(
    blockwise: BlockwiseModel, block: int, inputs: list[BlockInputs], names: list[str], needed: Statistic
) -> tuple[dict[str, InputStatistics], list[BlockInputs]]:
    if names:
        return collect_block(blockwise, block, inputs, names, needed)
    return {}, [blockwise.run_block(block, batch) for batch in inputs]


def _compress_matrix(
    model: nn.Module, name: str, method: Method, statistics: InputStatistics, spec: WeightSpec
) -> MatrixRecord:
    start = time.perf_counter()
    linear = cast(nn.Linear, model.get_submodule(name))
    weight = linear.weight.detach().float()
    try:
        solution = method.compress(weight, statistics, spec)
    except HalfplateError as refusal:
        # A method does not know which matrix it works on.
        raise HalfplateError(f"{name}: {refusal}") from None
    dense = solution.weight.dense()
    if not bool(dense.isfinite().all()):
        raise HalfplateError(
            f"{name}: method={method.name!r} gave values that core_dtype={spec.core_dtype!r}, wrapper_dtype={spec.wrapper_dtype!r} cannot hold; "
            "try --core-dtype fp32 --wrapper-dtype fp32, another method, or --exclude it"
        )
    replace_linear(model, name, CompressedLinear.from_weight(solution.weight, spec, linear.bias))
    error, kind = relative_error(weight, dense, statistics)
    return MatrixRecord(name, error, kind, tuple(solution.losses), time.perf_counter() - start)


def relative_error(weight: Tensor, dense: Tensor, statistics: InputStatistics) -> tuple[float, str]:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with D = W - `dense`, both (d_out, d_in), and what stood for H.

    H is the Gram matrix, else its diagonal, else the identity. It is 0 where both traces are.
    """

    def weighted(matrix: Tensor) -> float:
        if statistics.gram is not None:
            gram = statistics.gram.to(matrix.dtype)
            return float(((matrix @ gram) * matrix).sum(dtype=torch.float64))
        squares = matrix.square()
        if statistics.diagonal is not None:
            squares = squares * statistics.diagonal
        return float(squares.sum(dtype=torch.float64))

    # Squares of large weights would leave the range of fp32; the ratio does not know their scale.
    largest = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    weight, dense = weight / largest, dense / largest
    kind = "gram" if statistics.gram is not None else "diagonal" if statistics.diagonal is not None else "weight"
    # Round-off can take the trace of a near-singular Gram just below zero.
    error, whole = max(weighted(weight - dense), 0.0), weighted(weight)
    return (error / whole if whole > 0 else 0.0), kind


def _checkpoint_record(plan: Plan, tokens: CalibrationTokens | None, records: list[MatrixRecord]) -> dict[str, Any]:
    return {
        "model": plan.model,
        "recipe": plan.recipe.fingerprint_json(),
        "fingerprint": plan.fingerprint,
        "calibration": tokens.protocol() if tokens is not None else None,
        "matrices": {record.name: record.to_json() for record in records},
        "skipped": {matrix.name: matrix.reason for matrix in plan.matrices if matrix.skipped},
    }


def _summary(plan: Plan, out: Path, records: list[MatrixRecord], tokens: CalibrationTokens | None) -> dict[str, Any]:
    errors = [record.relative_error for record in records]
    return {
        "out": str(out),
        "model": plan.model,
        "method": plan.recipe.method,
        "recipe": plan.recipe.to_json(),
        "fingerprint": plan.fingerprint,
        "calibration": tokens.protocol() if tokens is not None else None,
        "matrices": [
            {"name": record.name, **record.to_json(), "seconds": round(record.seconds, 3)} for record in records
        ],
        "skipped": [{"name": matrix.name, "reason": matrix.reason} for matrix in plan.matrices if matrix.skipped],
        "block_size": plan.block_size,
        "nbytes": plan.nbytes,
        "dense_nbytes": plan.dense_nbytes,
        "other_nbytes": plan.other_nbytes,
        "source_nbytes": plan.source_nbytes,
        "mean_relative_error": sum(errors) / len(errors),
        "error_kind": records[0].error_kind,
    }


def _check_kl(name: str, compressed: LoadedModel, recipe: Recipe, out: Path, report: Report) -> dict[str, Any]:
    """Judge the compressed model on held-out text; raises RuinedResult where its KL exceeds `recipe.max_kl`."""
    assert recipe.max_kl is not None
    dense = load_dense(name, recipe.device)
    compressed.model.to(torch.device(recipe.device))  # type: ignore[arg-type]
    seq_len = min(MAX_KL_SEQ_LEN, recipe.seq_len)
    held_out = held_out_tokens(dense.model, dense.tokenizer, recipe.seed, MAX_KL_WINDOWS, seq_len, report)
    measures = evaluate(
        compressed.model, held_out.ids, dense.model, lambda done, total: report("evaluating", done, total)
    )
    if not measures["kl"] <= recipe.max_kl:
        raise RuinedResult(
            f"max_kl={recipe.max_kl}: the result is ruined, its KL to the dense model is {measures['kl']:.4g} nats a token on held-out text; "
            f"it stays in {str(out)!r}; try method armor, larger blocks or more samples"
        )
    return measures | {"protocol": held_out.protocol()}
