"""The verbs of the command line that take a recipe or settings, with their names, arguments and defaults."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Unpack

from halfplate.arguments import path_text
from halfplate.compression import compress as compression
from halfplate.errors import HalfplateError
from halfplate.planning import Plan, make_plan
from halfplate.recipe import Recipe, RecipeFields
from halfplate.recovery import job as recovery
from halfplate.recovery.settings import Recovery
from halfplate.registry import unknown
from halfplate.report import page
from halfplate.report.settings import Measuring
from halfplate.statistics import Statistic
from halfplate.telemetry.progress import Report, silent


def plan(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    benchmark: bool = False,
    workers: int = 1,
    **options: Unpack[RecipeFields],
) -> Plan:
    """Plan the compression of `model`, reading its configuration and no weight.

    recipe: a Recipe or the path of a YAML file; options: fields of Recipe that override it, as flags do. benchmark: time this machine
    for a few seconds (one tensor is read), to estimate the time. workers: number of processes of the run.
    Raises HalfplateError on bad input.

    ```pycon
    >>> found = halfplate.plan("tiny", method="wanda", seq_len=32)
    >>> len(found.specs), f"{found.nbytes / found.dense_nbytes:.4f}"
    (14, '0.5625')

    ```
    """
    return make_plan(path_text("model", model), Recipe.of(recipe, **options), benchmark, workers)


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
    """Compress `model`, write the checkpoint `out` with its log, and return the JSON object of `halfplate compress --json`.

    recipe, options: as in `plan`. report: called at every step (`halfplate.telemetry.progress.Report`). statistics: collect at
    least these, so that methods that need less are judged by the true output error too. resume: continue an interrupted
    run of the same model, recipe and text beside `out`. engine, workers, address: where the tasks run, `local` or `ray`; the result is the same.
    benchmark: whether the plan of a long run may time this machine for a few seconds.
    check: compare the result with the solved weights and with the original model before `out` is written.
    Raises HalfplateError on bad input and if memory or disk are too small, with nothing written, RuinedResult if the
    self-check fails, with nothing written, and after writing if the KL exceeds `max_kl`.

    ```pycon
    >>> summary = halfplate.compress("tiny", "tiny-armor", samples=4, seq_len=32, method_options={"iterations": 2})
    >>> summary["method"], len(summary["matrices"])
    ('armor', 14)

    ```
    """
    return compression.compress(
        path_text("model", model),
        path_text("out", out),
        Recipe.of(recipe, **options),
        overwrite,
        report,
        statistics,
        resume,
        engine,
        workers,
        address,
        benchmark,
        check,
    )


def recover(
    model: str | Path,
    teacher: str | Path,
    out: str | Path,
    settings: Recovery | None = None,
    overwrite: bool = False,
    resume: bool = False,
    report: Report = silent,
    save_minutes: float = recovery.SAVE_MINUTES,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any] | None:
    """Train the checkpoint `model` towards the original `teacher` with fixed masks, write `out` and return the summary.

    settings, options: a Recovery, and fields that override it; tokens or minutes must be given. resume: go on from the state that
    an interrupted run left, which is saved every `save_minutes`. Under `accelerate launch` all processes but the main one
    return None. Raises HalfplateError on bad input, RuinedResult after writing if the held-out KL did not fall.
    """
    _check_options(options, [field.name for field in fields(Recovery)])
    if not isinstance(settings, Recovery | None):
        raise HalfplateError(f"settings={settings!r} is of type {type(settings).__name__}, expected a Recovery")
    settings = Recovery(**options) if settings is None else replace(settings, **options)
    model, teacher, out = path_text("model", model), path_text("teacher", teacher), path_text("out", out)
    return recovery.recover(model, teacher, out, settings, overwrite, resume, report, save_minutes, device)


def write_report(
    path: str | Path,
    file: str | Path | None = None,
    against: str | Path | None = None,
    report: Report = silent,
    **options: Any,
) -> Path:
    """Write the report of the checkpoint `path`, one self-contained HTML file, and return its path.

    file: None for `report.html` in the checkpoint. against: also measure quality, speed and answers beside this original model; the
    result stays in the log of the checkpoint for later reports. options: how to measure, fields of `halfplate.report.settings.Measuring`.
    Raises HalfplateError on bad input and if the file cannot be written.
    """
    _check_options(options, [field.name for field in fields(Measuring) if field.name != "against"])
    if options and against is None:
        option = next(iter(options))
        raise HalfplateError(f"{option} says how to measure, which needs the original model; give against")
    measuring = None if against is None else Measuring(path_text("against", against), **options)
    return page.write_report(path_text("path", path), file, measuring, report)


def _check_options(options: Mapping[str, Any], known: list[str]) -> None:
    for name in options.keys() - set(known):
        raise unknown("option", name, known)
