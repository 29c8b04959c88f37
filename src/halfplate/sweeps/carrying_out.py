"""Running a sweep row by row. Each row is recorded as soon as it is measured, so that a killed sweep can continue."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from halfplate.arguments import path_text
from halfplate.calibration.documents import Text
from halfplate.checkpoint.output import check_place, sole_user
from halfplate.errors import HalfplateError
from halfplate.models.sources import open_source
from halfplate.sweeps.description import Row, Sweep, read_sweep
from halfplate.sweeps.measuring import Bench
from halfplate.sweeps.records import COMPRESSED, DONE, FAILED, Standing, made_of, save, standing
from halfplate.sweeps.results import results_of, write_results
from halfplate.telemetry.progress import Report, silent

EVENT = "row"
LONGEST_ERROR = 2000  # characters


@dataclass(frozen=True)
class Folder:
    """The folder of a sweep."""

    path: Path

    @property
    def rows(self) -> Path:
        return self.path / "rows"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def record(self, row: Row) -> Path:
        return self.rows / f"{row.name}.json"

    def checkpoint(self, row: Row) -> Path:
        return self.checkpoints / row.name

    def check(self) -> None:
        """Raise HalfplateError unless the folder is that of a sweep, empty, or does not exist."""
        check_place(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise HalfplateError(f"out={str(self.path)!r} is a file, expected a folder; choose another name")
        if self.path.is_dir() and not self.rows.is_dir() and any(self.path.iterdir()):
            raise HalfplateError(
                f"out={str(self.path)!r} holds files and is not the folder of a sweep; choose a new or empty folder"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context manager that prevents other sweeps from using the folder."""
        try:
            self.rows.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise HalfplateError(f"out={str(self.path)!r} cannot be written ({error}); choose another folder") from None
        with sole_user(self.rows, self.path):
            yield
        with suppress(OSError):
            self.checkpoints.rmdir()  # only removed if it is empty


def sweep(
    description: str | Path | Mapping[str, Any],
    out: str | Path,
    only: Sequence[str] | None = None,
    keep: bool = False,
    dry_run: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Compress one model by many recipes, measure every result, and return the content of `results.json`.

    - description: the path of a sweep file (docs/sweeps.md), or a mapping with its content
    - out: the folder of records and tables; recorded rows that have not changed are not measured again
    - only: names of the rows to measure
    - keep: keep the checkpoints in `out`
    - dry_run: measure and write nothing; rows to measure get the bytes of their plan
    - report: called at every step

    A failed row is recorded with its error, and the next call tries it again. Raises HalfplateError on bad input.
    """
    asked, folder = read_sweep(description), Folder(Path(path_text("out", out)))
    chosen = asked.chosen([only] if isinstance(only, str) else None if only is None else list(only))
    folder.check()
    _check_evaluation(asked)
    source = open_source(asked.model)
    bench, model = Bench.of(asked, source), source.sha256()
    made = {row.name: made_of(asked, row, model) for row in asked.rows}

    def standings() -> dict[str, Standing]:
        return {row.name: standing(folder.record(row), made[row.name]) for row in asked.rows}

    def written() -> dict[str, Any]:
        result = results_of(bench, standings(), chosen)
        write_results(folder.path, result)
        return result

    if dry_run:
        found = standings()
        planned = {row.name: _planned(bench, row) for row in chosen if found[row.name].status != DONE}
        return results_of(bench, found, chosen, planned)
    with folder.locked():
        for number, row in enumerate(chosen):
            stood = standing(folder.record(row), made[row.name])
            if stood.status == DONE:
                _tell(report, number + 1, len(chosen), row, "done before", stood)
                continue
            _tell(report, number, len(chosen), row, "begun", stood)
            record = _measured(bench, row, folder, {**stood.record, "name": row.name, "made": made[row.name]}, report)
            if record["status"] == DONE and not keep:
                shutil.rmtree(folder.checkpoint(row), ignore_errors=True)
            _tell(report, number + 1, len(chosen), row, "ended", standing(folder.record(row), made[row.name]))
            written()  # write the table so far, however the sweep ends
        return written()


def _measured(bench: Bench, row: Row, folder: Folder, record: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measure a row and write its record after every step; an error becomes the record of a failed row."""
    file, out = folder.record(row), folder.checkpoint(row)
    record.pop("error", None)
    try:
        if row.recipe is None:
            model = bench.source.name
            record |= bench.original
        else:
            model = str(out)
            record |= bench.compressed(row, out, record, report) | {"status": COMPRESSED}
            save(file, record)
        record |= bench.judged(row, model, report) | {"status": DONE}
    # A failing row must not stop the sweep.
    except Exception as error:
        kind = "" if isinstance(error, HalfplateError) else f"{type(error).__name__}: "
        record |= {"status": FAILED, "error": " ".join(f"{kind}{error}".split())[:LONGEST_ERROR]}
    record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    save(file, record)
    return record


def _planned(bench: Bench, row: Row) -> dict[str, Any]:
    """The bytes of a row by its plan, or the error that would stop it."""
    try:
        return bench.planned(row)
    except HalfplateError as error:
        return {"error": str(error)}


def _check_evaluation(asked: Sweep) -> None:
    """Raise HalfplateError for a missing text or library, without which no row could be measured."""
    for text in asked.evaluation.get("text", ()):
        Text(text, "eval: text")
    if "tasks" in asked.evaluation:
        from halfplate.evaluation.tasks import check_available

        check_available()


def _tell(report: Report, done: int, total: int, row: Row, step: str, stood: Standing) -> None:
    """Report a step of a row: `begun`, `ended` or `done before`."""
    evaluation = stood.record.get("evaluation", {})
    figures = {"share": stood.record.get("share")} | {key: evaluation.get(key) for key in ("kl", "perplexity")}
    facts = {"event": EVENT, "step": step, "name": row.name, "status": stood.status, "why": stood.why}
    report("rows", done, total, row.name, facts={**facts, **figures})
