"""The result of a sweep: one JSON object, and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfplate.checkpoint.folder import replace_file
from halfplate.json_numbers import finite
from halfplate.plain_text import cell
from halfplate.sweeps.description import Row
from halfplate.sweeps.measuring import Bench
from halfplate.sweeps.picture import picture
from halfplate.sweeps.records import DONE, FAILED, Standing

VERSION = 1
RESULTS_FILE, TABLE_FILE, PICTURE_FILE = "results.json", "table.md", "picture.svg"
PICTURES = {"bytes": PICTURE_FILE, "speed": "speed.svg"}  # by what the loss is drawn against


def results_of(
    bench: Bench,
    found: Mapping[str, Standing],
    chosen: Sequence[Row],
    planned: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The content of `results.json`: every row in the order of the sweep file, with its state and measurements.

    failed: names of the chosen rows that failed.
    planned: bytes or error of the rows to measure, for a dry run.
    """
    rows = []
    for row in bench.sweep.rows:
        stood = found[row.name]
        told = {} if stood.status != DONE else {key: stood.record[key] for key in stood.record if key != "version"}
        entry = {"name": row.name, "status": stood.status, "why": stood.why} | told | {"status": stood.status}
        if planned is not None and row.name in planned:
            entry["planned"] = planned[row.name]
        rows.append(entry)
    result: dict[str, Any] = finite(
        {
            "version": VERSION,
            "model": bench.sweep.model,
            "eval": dict(bench.sweep.evaluation),
            "speed": None if bench.sweep.speed is None else dict(bench.sweep.speed),
            "original_weight_nbytes": bench.original["weight_nbytes"],
            "original_linear_nbytes": bench.linear_nbytes,
            "rows": rows,
            "failed": [row.name for row in chosen if found[row.name].status == FAILED],
        }
    )
    return result


def write_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `results.json`, `table.md`, and the pictures of what was measured: `picture.svg` and `speed.svg`."""
    replace_file(folder / RESULTS_FILE, json.dumps(result, indent=1, allow_nan=False) + "\n")
    replace_file(folder / TABLE_FILE, markdown(result))
    for against, name in PICTURES.items():
        drawn = picture(result, against)
        if drawn is None:
            (folder / name).unlink(missing_ok=True)
        else:
            replace_file(folder / name, drawn)


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The columns of the table, and the values of each row; None if a value is not measured or does not apply."""
    done = [row for row in result["rows"] if row["status"] == DONE]
    texts = list(dict.fromkeys(text for row in done for text in row["evaluation"].get("texts", {})))
    tasks = {task: _score(scores) for row in done for task, scores in row["evaluation"].get("tasks", {}).items()}
    timed = any("speed" in row for row in done)
    columns = ["row", "weights, MB", "of original", "linears, of original"]
    for text in texts or ([""] if any("perplexity" in row["evaluation"] for row in done) else []):
        columns += [f"{text}: perplexity", "KL", "top-1"] if text else ["perplexity", "KL", "top-1"]
    columns += [f"{task}: {score.replace('_', ' ')}" for task, score in tasks.items()]
    columns += ["decode, tokens/s", "decode, × original"] if timed else []
    columns += ["compression, s"]
    unknown = [None] * (len(columns) - 1)
    return columns, [
        [row["name"], *(_values(row, texts, tasks, timed) if row["status"] == DONE else unknown)]
        for row in result["rows"]
    ]


def _values(row: Mapping[str, Any], texts: list[str], tasks: Mapping[str, str], timed: bool) -> list[Any]:
    evaluation, speed = row["evaluation"], row.get("speed", {})
    values: list[Any] = [megabytes(row["weight_nbytes"]), row["share"], row["linear_share"]]
    for scores in [evaluation["texts"][text] for text in texts] or [evaluation] * ("perplexity" in evaluation):
        values += [scores.get(key) for key in ("perplexity", "kl", "top1_agreement")]
    values += [evaluation["tasks"][task].get(score) for task, score in tasks.items()]
    values += [speed.get("decode_tokens_per_s"), speed.get("decode_speedup")] if timed else []
    compression = row.get("compression")
    spent = None if compression is None else round(compression["seconds"]["total"], 1)
    # If an earlier call began the compression, only the last part was timed.
    return [*values, f"> {cell(spent)}" if compression is not None and compression["continued"] else spent]


def _score(scores: Mapping[str, float]) -> str:
    """The score of a task that tables show: the length-normalised accuracy if there is one."""
    return next((name for name in ("acc_norm", "acc") if name in scores), next(iter(scores)))


def megabytes(nbytes: int | None) -> float | int | None:
    """Bytes as MB, in powers of ten."""
    if nbytes is None:
        return None
    return nbytes / 1e6 if nbytes < 1e9 else round(nbytes / 1e6)


def markdown(result: Mapping[str, Any]) -> str:
    """The table in Markdown, names left-aligned and numbers right-aligned; below it, why rows have no figures."""
    columns, rows = table(result)
    lines = [
        columns,
        ["---"] + ["---:"] * (len(columns) - 1),
        *[[_escaped(cell(value)) for value in row] for row in rows],
    ]
    missing = [f"- {_escaped(line)}" for line in without_figures(result)]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + [""] * bool(missing) + missing) + "\n"


def without_figures(result: Mapping[str, Any]) -> list[str]:
    """A line for every failed row, and one for all rows that are not measured yet."""
    lines = [f"{row['name']}: {row['status']}, {row['why']}" for row in result["rows"] if row["status"] == FAILED]
    left = sum(row["status"] not in (DONE, FAILED) for row in result["rows"])
    return [*lines, f"{left} of {len(result['rows'])} rows are not measured yet"] if left else lines


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
