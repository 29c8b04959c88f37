"""Compress a model by many recipes, and compare bytes, loss and speed in one table."""

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from halfplate.cli.parser import add_output_arguments

if TYPE_CHECKING:
    from halfplate.telemetry.progress import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "description",
        metavar="SWEEP.yaml",
        help="YAML file with the model, the rows and the evaluation (docs/sweeps.md)",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FOLDER",
        required=True,
        help="folder of the results; finished rows in it are not measured again",
    )
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", action="extend", help="measure only the rows with these names"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the compressed checkpoints (default: delete each one after it is measured)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only list the finished rows, the rows to measure and their expected size",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from halfplate import sweep
    from halfplate.cli.console import print_json, progress, silence_libraries

    silence_libraries()
    try:
        with progress(args) as steps:
            told = _with_rows(steps) if args.log_level in ("debug", "info") else steps
            result = sweep(args.description, args.out, args.only, args.keep, args.dry_run, told)
    except KeyboardInterrupt:
        print("halfplate: interrupted; finished work is kept, run the same command to continue", file=sys.stderr)
        return 1
    if args.json:
        print_json(result)
    elif args.dry_run:
        _print_plan(result)
    else:
        _print(args.out, result)
    return 0 if args.dry_run or not result["failed"] else 1


def _with_rows(steps: "Report") -> "Report":
    """A report that also prints a line at the beginning and the end of every row."""
    from halfplate.cli.console import say
    from halfplate.plain_text import visible
    from halfplate.telemetry.progress import Listener, Step

    class Rows(Listener):
        def take(self, step: Step) -> None:
            if step.facts.get("event") == "row":
                say(visible(_row_line(step.done, step.total, step.facts)))
            else:
                steps(step.phase, step.done, step.total, step.note, step.share, step.facts)

    return Rows()


def _row_line(done: int, total: int, facts: Mapping[str, Any]) -> str:
    from halfplate.plain_text import cell

    if facts["step"] == "begun":
        before = "failed before: " if facts["status"] == "failed" else ""
        return f"row {done + 1} of {total}, {facts['name']}: begins ({before}{facts['why']})"
    if facts["status"] != "done":
        return f"row {done} of {total}, {facts['name']}: {facts['status']}, {facts['why']}"
    figures = [f"{facts['share']:.1%} of the bytes"]
    figures += [
        f"{said} {cell(facts[key])}" for key, said in (("kl", "KL"), ("perplexity", "perplexity")) if facts[key]
    ]
    before = " before" if facts["step"] == "done before" else ""
    return f"row {done} of {total}, {facts['name']}: done{before}, {', '.join(figures)}"


def _print(out: str, result: dict[str, Any]) -> None:
    from pathlib import Path

    from halfplate.cli.console import print_table
    from halfplate.plain_text import visible
    from halfplate.sweeps.results import PICTURE_FILE, RESULTS_FILE, TABLE_FILE, table, without_figures

    print_table(f"{result['model']}: {len(result['rows'])} rows", *table(result))
    for line in without_figures(result):
        print(visible(line))
    files = [Path(out) / name for name in (TABLE_FILE, RESULTS_FILE, PICTURE_FILE)]
    print("written: " + ", ".join(str(file) for file in files if file.exists()))


def _print_plan(result: dict[str, Any]) -> None:
    from halfplate.cli.console import print_table
    from halfplate.sweeps.results import megabytes

    rows = []
    for row in result["rows"]:
        sizes = row.get("planned", row)
        why = f"cannot run: {sizes['error']}" if "error" in sizes else row["why"]
        rows.append((row["name"], row["status"], megabytes(sizes.get("weight_nbytes")), sizes.get("share"), why))
    print_table(f"{result['model']}: {len(rows)} rows", ("row", "status", "weights, MB", "of original", "why"), rows)
    left = sum("planned" in row for row in result["rows"])
    print(f"{left} of {len(rows)} rows to measure")
