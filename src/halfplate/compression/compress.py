"""The main run: plan, read, calibrate, compress layer by layer, assemble, check. It can be interrupted and resumed."""

from __future__ import annotations

import resource
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from halfplate.arguments import path_text
from halfplate.calibration.held_out import held_out_tokens
from halfplate.calibration.routed import tokens_per_expert
from halfplate.checkpoint.companions import copy_companions
from halfplate.checkpoint.config import pruning_of
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.output import check_place, check_result_folder
from halfplate.checkpoint.quantization import HalfplateConfig
from halfplate.checkpoint.read import load
from halfplate.checkpoint.write import amend_record, write_configuration, write_record
from halfplate.compression.layers import Outcome, compress_layers
from halfplate.compression.open_layer import OpenLayers
from halfplate.compression.preparation import (
    check_layers,
    check_weights,
    chosen_levels,
    fixed_threads,
    prepared_tokens,
)
from halfplate.compression.result import RECORDED, Result, assemble_weights, finished_result, identity_of
from halfplate.compression.run import Run
from halfplate.compression.self_check import self_check
from halfplate.compression.step_gains import step_losses
from halfplate.compression.tables import solve_tables
from halfplate.compression.transforming import transformed
from halfplate.compression.work_folder import WorkFolder
from halfplate.defaults import plain_defaults
from halfplate.device import check_device
from halfplate.engines import EngineChoice, open_engine
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.evaluation.perplexity import evaluate
from halfplate.formats import WeightSpec
from halfplate.limits import check_threads, check_workers, cores
from halfplate.models.experts import experts_of
from halfplate.models.licence import origin
from halfplate.models.sources import Source, load_dense, load_tokenizer, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.planning import Plan, plan_source
from halfplate.planning.room import check_room
from halfplate.precision import resolved
from halfplate.recipe import Recipe
from halfplate.recipe_values import RecipeFields
from halfplate.report import write_report
from halfplate.runtime.sampling import native_sampling
from halfplate.statistics import Statistic
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.log import run_log
from halfplate.telemetry.progress import Report, silent

MAX_KL_WINDOWS = 8
MAX_KL_SEQ_LEN = 256


@dataclass(frozen=True)
class _Order:
    """The arguments of a compression, and everything that determines its result except the text."""

    source: Source
    out: Path
    identity: dict[str, Any]
    work: WorkFolder
    overwrite: bool
    engine: EngineChoice
    check: bool


@plain_defaults()
def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path | None = None,
    overwrite: bool = False,
    report: Report = silent,
    statistics: Statistic = Statistic.NONE,
    resume: bool = False,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    benchmark: bool = True,
    check: bool = True,
    **options: Unpack[RecipeFields],
) -> dict[str, Any]:
    """Compress `model`, write the checkpoint `out` with its log and report, and return the JSON object of `halfplate compress --json`.

    - recipe: a Recipe or the path of a YAML file
    - report: called at every step (`halfplate.telemetry.progress.Report`), for progress and trackers
    - statistics: collect at least these, e.g. GRAM to measure the true output error of every method
    - resume: continue an interrupted run of the same model, recipe and text, with the same result
    - engine, workers, address: where the tasks run (`halfplate.engines.EngineChoice`); the result does not depend on them
    - benchmark: if the run is long, measure this machine for a few seconds to estimate the time
    - check: compare the result with the solved weights and with the original model before `out` is written
    - options: fields of Recipe that override `recipe`

    Raises HalfplateError, without writing anything, on bad input and if memory or disk space are too small.
    Raises RuinedResult without writing anything if the self-check fails, and after writing if the KL exceeds `max_kl`.

    ```pycon
    >>> summary = halfplate.compress("tiny", "tiny-armor", samples=4, seq_len=32, method_options={"iterations": 2})
    >>> summary["method"], len(summary["matrices"])
    ('armor', 16)

    ```
    """
    model, recipe, out = path_text("model", model), Recipe.of(recipe, **options), Path(path_text("out", out))
    choice = EngineChoice(engine, workers, address)
    if address is None:  # otherwise the limits are those of the cluster
        check_threads(recipe.threads)
        check_workers(workers)
    source = open_source(model)
    check_device(recipe.device)
    check_place(out)
    if not resume:
        check_result_folder(out, overwrite, source.path)
    plan = plan_source(source, recipe, None if benchmark else False, workers or 1, statistics)
    plan = plan if check else replace(plan, memory=plan.memory.unchecked())
    work = WorkFolder(out)
    threads = fixed_threads(recipe, work, resume)
    torch.set_num_threads(threads)
    identity = identity_of(source, plan, threads)
    found = finished_result(out, source, plan, identity, overwrite) if resume else None
    if found is not None:
        work.remove_abandoned()
        return _summary(out, found) | {"seconds": {"total": 0.0}, "peak_rss_bytes": _peak()} | _reported(out)
    check_result_folder(out, overwrite, source.path)
    check_room(plan, out, workers or 1)
    order = _Order(source, out, identity, work, overwrite, choice, check)
    try:
        # Lock the folder first, because the log of another active run must not be changed.
        with work.opened(identity, resume, overwrite), run_log(out, report, resume) as told:
            summary = _carry_out(order, plan, told)
    except RuinedResult:
        _reported(out)
        raise
    return summary | _reported(out)


def _reported(out: Path) -> dict[str, str | None]:
    """Write the report. Returns its file, or None and the reason if it failed; a failure does not affect the checkpoint."""
    try:
        return {"report": str(write_report(out))}
    except HalfplateError as error:
        return {"report": None, "report_error": str(error)}


def _carry_out(order: _Order, plan: Plan, report: Report) -> dict[str, Any]:
    recipe, clock = plan.recipe, Clock()
    report("reading", 0, 1, facts=_plan_facts(plan, order.out))
    if (threads := order.identity["threads"]) > cores():
        note = f"{threads} as at the start of the run; this machine has {cores()} cores, so it is slower (the bytes stay the same)"
        report("threads", 1, 1, note)
    result = _compressed(order, plan, report, clock)
    summary = _summary(order.out, result)
    if recipe.max_kl is not None:
        with clock("evaluating"):
            summary["held_out"] = _check_kl(order.source.name, recipe, order.out, report)
    spent = {"seconds": clock.seconds, "peak_rss_bytes": _peak()}
    held_out = {"held_out": summary["held_out"]} if "held_out" in summary else {}
    report("finishing", 1, 1, facts={"event": "end", **spent, **held_out})
    return summary | spent


def _compressed(order: _Order, plan: Plan, report: Report, clock: Clock) -> Result:
    """Do the unfinished work, and move the result to `out`."""
    recipe, work, source = plan.recipe, order.work, order.source
    with ExitStack() as stack:
        with clock("reading"):
            original, readable = transformed(
                source,
                plan.transforms,
                recipe,
                work,
                report,
                lambda untouched: prepared_tokens(untouched, recipe, work, report),
            )
        streamed = StreamedModel(readable, recipe.device, recipe.precision)
        layers = OpenLayers(streamed, str(work.path))
        threads = order.identity["threads"]
        engine = stack.enter_context(open_engine(order.engine, layers, threads, work.path))
        check_weights(streamed, work, clock, report)
        with clock("calibration text"):
            # A measured transform has already read it, with the original model.
            text = prepared_tokens(streamed, recipe, work, report, plan.sizes) if plan.job.reads_text else None
        tokens = text if plan.job.runs_text else None
        if tokens is not None:
            check_layers(streamed, plan, tokens, work, clock, report)
        plan, told = chosen_levels(readable, plan, tokens, work, report, clock)
        tables = solve_tables(streamed, plan, tokens, work, report, clock)
        run = Run(streamed.source, plan, threads, tokens, work, engine, layers, report, clock, tables)
        outcome = compress_layers(run)
        layers.close()
        result = Result(plan, outcome, None if text is None else text.protocol(), told)
        with clock("ordering"):
            losses = step_losses(readable, plan, work, None if tokens is None else tokens.ids, outcome.records, report)
        with clock("writing"), new_folder(order.out, order.overwrite, work.result) as folder:
            checksums = assemble_weights(streamed, plan, work, folder, partial(report, "writing"), losses)
            quantization = HalfplateConfig.from_specs(plan.specs, bool(experts_of(streamed.model)))
            write_configuration(streamed.model, load_tokenizer(source), folder, source.other_dtype, quantization)
            copy_companions(source.path, folder)
            identity = {key: order.identity[key] for key in RECORDED if key in order.identity}
            if order.check:
                report("checking the result", 0, 1)
                with clock("checking"):
                    result = replace(result, check=self_check(streamed, run, folder, original).to_json())
                report("checking the result", 1, 1)
            record = origin(order.source) | _checkpoint_record(result) | {"identity": identity, "tensors": checksums}
            if (pruned := pruning_of(source.path)) is not None:
                record["pruned"] = pruned
            write_record(folder, record)
    with suppress(OSError):
        work.clear()
    return result


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plan_facts(plan: Plan, out: Path) -> dict[str, Any]:
    whole = plan.to_json()
    return {"event": "plan", "verb": "compress", "out": str(out)} | {
        key: value for key, value in whole.items() if key != "matrices"
    }


def _checkpoint_record(result: Result) -> dict[str, Any]:
    plan, outcome = result.plan, result.outcome
    return {
        "model": plan.model,
        "recipe": plan.recipe.fingerprint_json(),
        "fingerprint": plan.fingerprint,
        "calibration": result.calibration,
        "matrices": {record.name: record.to_json() for record in outcome.records},
        "precision": resolved(plan.recipe.precision, torch.device(plan.recipe.device).type),
        "tuned_blocks": _tuned(outcome),
        "skipped": {matrix.name: matrix.reason for matrix in plan.matrices if matrix.skipped},
        **({} if result.check is None else {"check": result.check}),
        "notes": list(plan.notes),
        **result.told,
    }


def _tuned(outcome: Outcome) -> dict[str, Any]:
    return {str(layer): asdict(tuned) for layer, tuned in outcome.tuned.items()}


def _summary(out: Path, result: Result) -> dict[str, Any]:
    plan, outcome = result.plan, result.outcome
    errors = [record.relative_error for record in outcome.records if plan.specs[record.name].same_as is None]
    return {
        "out": str(out),
        "model": plan.model,
        "method": plan.recipe.method,
        "recipe": plan.recipe.to_json(),
        "fingerprint": plan.fingerprint,
        "calibration": result.calibration,
        "matrices": [
            {"name": record.name, **record.to_json(), "seconds": round(record.seconds, 3)} for record in outcome.records
        ],
        "skipped": [{"name": matrix.name, "reason": matrix.reason} for matrix in plan.matrices if matrix.skipped],
        "notes": list(plan.notes),
        "block_size": plan.block_size,
        "nbytes": plan.nbytes,
        "dense_nbytes": plan.dense_nbytes,
        "other_nbytes": plan.other_nbytes,
        "source_nbytes": plan.source_nbytes,
        "mean_relative_error": sum(errors) / len(errors),
        "error_kind": outcome.records[0].error_kind,
        "tokens_per_expert": tokens_per_expert({record.name: record.tokens for record in outcome.records}) or None,
        "tuned_blocks": _tuned(outcome),
        "without_kernel": plan.without_kernel,
        "levels": _levels(plan) if plan.recipe.budgeted else None,
        "fit": _fit(plan),
        "search": None,
        "check": result.check,
        **result.told,
    }


def _fit(plan: Plan) -> dict[str, Any] | None:
    """The size that was asked for and the one of the chosen formats, by the same count; None if none was asked for."""
    if plan.limit is None or not plan.recipe.asks_size:
        return None
    return plan.limit.to_json() | {"spent_bytes": plan.limit.spent(plan.specs.values()), "spoken": plan.limit.spoken}


def _levels(plan: Plan) -> dict[str, int]:
    """The number of matrices with each format, most frequent first."""

    def spoken(spec: WeightSpec) -> str:
        sizes = dict.fromkeys((spec.out_block, spec.in_block))
        wrappers = f", blocks of {' and '.join(map(str, sizes))}" if any(sizes) else ""
        return f"{spec.pattern} {spec.core_dtype}{wrappers}"

    return dict(Counter(spoken(spec) for spec in plan.specs.values()).most_common())


def _check_kl(name: str, recipe: Recipe, out: Path, report: Report) -> dict[str, Any]:
    """Measure the compressed model on held-out text, with both models in memory; raises RuinedResult if its KL exceeds `recipe.max_kl`."""
    assert recipe.max_kl is not None
    dense = load_dense(name, recipe.device)
    compressed = load(out, device=recipe.device, kernels=False)
    seq_len = min(MAX_KL_SEQ_LEN, recipe.seq_len)
    held_out = held_out_tokens(
        dense.model, dense.tokenizer, recipe.seed, MAX_KL_WINDOWS, seq_len, report, native_sampling
    )
    measures: dict[str, Any] = evaluate(
        compressed, held_out.ids, dense.model, lambda done, total: report("evaluating", done, total)
    )
    measures |= {"protocol": held_out.protocol()}
    amend_record(out, {"held_out": measures})
    if not measures["kl"] <= recipe.max_kl:
        raise RuinedResult(
            f"max_kl={recipe.max_kl}: KL {measures['kl']:.4g} nats per token on held-out text exceeds it; "
            f"the checkpoint is kept at {str(out)!r}; try method armor, larger blocks or more samples"
        )
    return measures
