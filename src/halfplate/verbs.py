"""The public functions of `plan`, `recover` and `report`, with the names, arguments and defaults of the command line."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Unpack

from halfplate.arguments import path_text
from halfplate.errors import HalfplateError
from halfplate.planning import Plan, make_plan
from halfplate.recipe import Recipe
from halfplate.recipe_values import RecipeFields
from halfplate.recovery import job as recovery
from halfplate.recovery.settings import Recovery
from halfplate.registry import unknown
from halfplate.report import page
from halfplate.report.settings import Measuring
from halfplate.telemetry.progress import Report, silent


def plan(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    benchmark: bool = False,
    workers: int = 1,
    **options: Unpack[RecipeFields],
) -> Plan:
    """Plan the compression of `model` from its configuration, without reading weights.

    - recipe: a Recipe or the path of a YAML file
    - benchmark: measure this machine for a few seconds to estimate the time; this reads one tensor
    - workers: number of processes of the run
    - options: fields of Recipe that override `recipe`

    Raises HalfplateError on bad input.

    ```pycon
    >>> found = halfplate.plan("tiny", method="wanda", seq_len=32)
    >>> len(found.specs), f"{found.nbytes / found.dense_nbytes:.4f}"
    (14, '0.5625')

    ```
    """
    return make_plan(path_text("model", model), Recipe.of(recipe, **options), benchmark, workers)


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

    - settings: a Recovery
    - resume: continue an interrupted run from its last save
    - report: called at every step (`halfplate.telemetry.progress.Report`)
    - save_minutes: minutes between saves
    - options: fields of Recovery that override `settings`; `tokens` or `minutes` is required

    Under `accelerate launch`, only the main process returns the summary; the others return None.
    Raises HalfplateError on bad input, and RuinedResult, after writing `out`, if the held-out KL did not fall.
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
    """Write the report of the checkpoint `path`, one self-contained HTML file, and return the path of the file.

    - file: the file to write; None for `report.html` in the checkpoint
    - against: original model to compare quality, speed and answers with; the results are kept for later reports
    - report: called at every step (`halfplate.telemetry.progress.Report`)
    - options: fields of `halfplate.report.settings.Measuring`, which need `against`

    Raises HalfplateError on bad input and if the file cannot be written.
    """
    _check_options(options, [field.name for field in fields(Measuring) if field.name != "against"])
    if options and against is None:
        name, value = next(iter(options.items()))
        raise HalfplateError(f"{name}={value!r} is a measurement option; add against (--against ORIGINAL)")
    measuring = None if against is None else Measuring(path_text("against", against), **options)
    return page.write_report(path_text("path", path), file, measuring, report)


def _check_options(options: Mapping[str, Any], known: list[str]) -> None:
    for name in options.keys() - set(known):
        raise unknown("option", name, known)
