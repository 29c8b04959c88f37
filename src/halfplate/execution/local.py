"""The main job in one process: read, calibrate, compress, write, judge."""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halfplate.calibration import CalibrationTokens, calibration_tokens
from halfplate.checkpoint.write import write_checkpoint
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.evaluation.perplexity import evaluate
from halfplate.execution.allocate import allocate_plan
from halfplate.execution.blocks import Outcome, compress_blocks
from halfplate.execution.clock import Clock
from halfplate.execution.held_out import held_out_tokens
from halfplate.execution.log import run_log
from halfplate.execution.output import check_result_folder
from halfplate.execution.progress import Report, silent
from halfplate.execution.ratios import BlockRatio, ratio_plan
from halfplate.formats import WeightSpec
from halfplate.models.sources import LoadedModel, Source, load_dense, open_source
from halfplate.planning import Plan, plan_source
from halfplate.precision import resolved
from halfplate.recipe import Recipe
from halfplate.report import write_report
from halfplate.statistics import Statistic

MAX_KL_WINDOWS = 8
MAX_KL_SEQ_LEN = 256


def compress(
    model: str,
    out: str | Path,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    report: Report = silent,
    statistics: Statistic = Statistic.NONE,
) -> dict[str, Any]:
    """Compress `model` by `recipe`, write the checkpoint `out` with its log and its report, and return the summary.

    report: told of every step (`halfplate.execution.progress.Report`), for progress and trackers. statistics: collect at
    least these, e.g. GRAM so that every method is judged by its true output error. Raises HalfplateError on bad input with nothing written, RuinedResult after writing where the KL exceeds `recipe.max_kl`.
    """
    recipe, out = recipe or Recipe(), Path(out)
    source = open_source(model)
    check_result_folder(out, overwrite, source.path)
    _check_device(recipe.device)
    plan = plan_source(source, recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        with run_log(out, report) as told:
            summary = _carry_out(source, plan, out, overwrite, told, statistics)
    except RuinedResult:
        _write_report(out)
        raise
    return summary | {"report": _write_report(out)}


def _write_report(out: Path) -> str | None:
    """Where the report stands; None where it could not be written, which takes nothing from the checkpoint."""
    try:
        return str(write_report(out))
    except HalfplateError:
        return None


def _carry_out(
    source: Source, plan: Plan, out: Path, overwrite: bool, report: Report, statistics: Statistic
) -> dict[str, Any]:
    recipe, clock = plan.recipe, Clock()
    with clock("reading"):
        report("reading", 0, 1, facts=_plan_facts(plan, out))
        loaded = load_dense(source, recipe.device)
        report("reading", 1, 1)
    method = recipe.create_method()
    needed = max(statistics, method.requires)
    with clock("calibration text"):
        tokens = _calibration(loaded, recipe, report) if recipe.runs_text(needed) else None
    search = None
    if recipe.budgeted:
        assert tokens is not None
        plan, search = allocate_plan(loaded, plan, tokens, report, clock)
    ratios: list[BlockRatio] = []
    if recipe.ratios != "uniform":
        assert tokens is not None
        plan, ratios = ratio_plan(loaded, plan, tokens, report, clock)
    outcome = compress_blocks(loaded, plan, needed, tokens, report, clock)
    with clock("writing"):
        report("writing", 0, 1)
        record = _checkpoint_record(plan, tokens, outcome) | _spoken(ratios)
        record |= {} if search is None else {"search": search}
        write_checkpoint(loaded.model.cpu(), loaded.tokenizer, out, plan.specs, record, source.other_dtype, overwrite)
        report("writing", 1, 1)

    summary = _summary(plan, out, outcome, tokens) | _spoken(ratios) | {"search": search}
    if recipe.max_kl is not None:
        with clock("evaluating"):
            summary["held_out"] = _check_kl(source.name, loaded, recipe, out, report)
    spent = {
        "seconds": clock.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    held_out = {"held_out": summary["held_out"]} if "held_out" in summary else {}
    report("finishing", 1, 1, facts={"event": "end", **spent, **held_out})
    return summary | spent


def _plan_facts(plan: Plan, out: Path) -> dict[str, Any]:
    whole = plan.to_json()
    return {"event": "plan", "verb": "compress", "out": str(out)} | {
        key: value for key, value in whole.items() if key != "matrices"
    }


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


def _checkpoint_record(plan: Plan, tokens: CalibrationTokens | None, outcome: Outcome) -> dict[str, Any]:
    return {
        "model": plan.model,
        "recipe": plan.recipe.fingerprint_json(),
        "fingerprint": plan.fingerprint,
        "calibration": tokens.protocol() if tokens is not None else None,
        "matrices": {record.name: record.to_json() for record in outcome.records},
        "precision": resolved(plan.recipe.precision, torch.device(plan.recipe.device).type),
        "tuned_blocks": _tuned(outcome),
        "skipped": {matrix.name: matrix.reason for matrix in plan.matrices if matrix.skipped},
    }


def _spoken(ratios: list[BlockRatio]) -> dict[str, Any]:
    """What was chosen for each block, where it was."""
    return {"ratios": [ratio.to_json() for ratio in ratios]} if ratios else {}


def _tuned(outcome: Outcome) -> dict[str, Any]:
    return {str(block): asdict(tuned) for block, tuned in outcome.tuned.items()}


def _summary(plan: Plan, out: Path, outcome: Outcome, tokens: CalibrationTokens | None) -> dict[str, Any]:
    errors = [record.relative_error for record in outcome.records]
    return {
        "out": str(out),
        "model": plan.model,
        "method": plan.recipe.method,
        "recipe": plan.recipe.to_json(),
        "fingerprint": plan.fingerprint,
        "calibration": tokens.protocol() if tokens is not None else None,
        "matrices": [
            {"name": record.name, **record.to_json(), "seconds": round(record.seconds, 3)} for record in outcome.records
        ],
        "skipped": [{"name": matrix.name, "reason": matrix.reason} for matrix in plan.matrices if matrix.skipped],
        "block_size": plan.block_size,
        "nbytes": plan.nbytes,
        "dense_nbytes": plan.dense_nbytes,
        "other_nbytes": plan.other_nbytes,
        "source_nbytes": plan.source_nbytes,
        "mean_relative_error": sum(errors) / len(errors),
        "error_kind": outcome.records[0].error_kind,
        "tuned_blocks": _tuned(outcome),
        "levels": _levels(plan) if plan.recipe.budgeted else None,
    }


def _levels(plan: Plan) -> dict[str, int]:
    """How many matrices have each level, the commonest first."""

    def spoken(spec: WeightSpec) -> str:
        sizes = dict.fromkeys((spec.out_block, spec.in_block))
        wrappers = f", blocks of {' and '.join(map(str, sizes))}" if any(sizes) else ""
        return f"{spec.pattern} {spec.core_dtype}{wrappers}"

    return dict(Counter(spoken(spec) for spec in plan.specs.values()).most_common())


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
