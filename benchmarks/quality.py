"""Every row of the quality tables: bytes, layer error, perplexity, KL, agreement, tasks and decoding, resumable.

    python benchmarks/quality.py --model smollm2 --tags main                  quality of the main rows
    python benchmarks/quality.py --model smollm2 --stage fit --only 'armor*'    layer error on the calibration text itself
    python benchmarks/quality.py --model smollm2 --stage tasks --tags main    zero-shot accuracy, slow
    python benchmarks/quality.py --model smollm2 --stage decode --tags main   tokens a second, on a quiet machine
    python benchmarks/quality.py --list                                       what there is and what is measured
    python benchmarks/quality.py --report                                     RESULTS.md from the files, without a model

Rows stand in quality_rows.py, in the order in which they are measured. What is measured is kept row by row and stage by
stage in benchmarks/results/quality_MODEL.json; a row that is there and has not changed is left alone. Checkpoints lie in
benchmarks/cache/checkpoints (HALFPLATE_BENCH_CACHE names another cache). Data is looked for as benchmarks/common.py says
(HALFPLATE_SHARED names another folder). llama.cpp's rows need llama-cpp-python; where decoding with it ends in an illegal
instruction, build it without AMX:

    CMAKE_ARGS="-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8' -DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8'" \\
        pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import sys
import traceback
from typing import Any

from quality_results import FOLDER, Results, without_paths
from quality_rows import Row, described, rows, select
from quality_subjects import SUBJECTS, Subject

STAGES = ("quality", "fit", "tasks", "decode")


def results_of(subject: Subject) -> Results:
    return Results(FOLDER / f"quality_{subject.name}.json")


def measure(subject: Subject, options: argparse.Namespace) -> int:
    """Measure the rows that are asked for; returns how many failed, refused ones aside."""
    import torch
    from quality_measure import Bench

    from halfplate.cli.console import silence_libraries

    silence_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    table = {row.label: row for row in rows(subject.block, subject.recovery_minutes)}
    made = {label: described(row, table) for label, row in table.items()}
    bench = Bench(subject, table, made, results_of(subject))
    chosen = select(list(table.values()), options.tags, options.only)
    failed = 0
    for number, row in enumerate(chosen):
        print(f"{subject.name}, {row.label} ({number + 1} of {len(chosen)})", flush=True)
        try:
            failed += not one_row(bench, row, made[row.label], options)
        finally:
            if options.drop:
                needed = {label for later in chosen[number + 1 :] for label in lineage(later, table)}
                for label in set(lineage(row, table)) - needed:
                    bench.drop(table[label])
    return failed


def one_row(bench: Any, row: Row, made: dict[str, Any], options: argparse.Namespace) -> bool:
    """Measure the stages of a row that are missing; False where one failed."""
    from halfplate.errors import HalfplateError

    results = results_of(bench.subject)
    protocols = {
        "quality": bench.quality_protocol(),
        "fit": bench.fit_protocol(),
        "tasks": bench.tasks_protocol(options.task_limit),
        "decode": bench.decode_protocol(),
    }
    missing = [
        stage
        for stage in options.stage
        if options.fresh or results.stage(row.label, stage, made, protocols[stage]) is None
    ]
    if not missing:
        return True
    try:
        path = bench.make(row)
        for stage in missing:
            arguments = (options.task_limit,) if stage == "tasks" else ()
            measures = getattr(bench, stage)(row, path, *arguments)
            results.save(row.label, stage, made, measures, protocols[stage])
            print(f"  {stage}: {measures}", flush=True)
    except (HalfplateError, ImportError) as refusal:
        reason = without_paths(str(refusal))
        results.save(row.label, "refused", made, {"reason": reason}, {"version": 1})
        print(f"  refused: {reason}", flush=True)
    # One row that breaks must not end a night of measuring.
    except Exception:
        traceback.print_exc()
        return False
    return True


def lineage(row: Row, table: dict[str, Row]) -> list[str]:
    """Labels of the row, its parent, its parent's parent and so on."""
    return [row.label, *(lineage(table[row.parent], table) if row.parent is not None else [])]


def listing(subject: Subject, options: argparse.Namespace) -> None:
    """Which stages of the chosen rows are measured."""
    table = {row.label: row for row in rows(subject.block, subject.recovery_minutes)}
    results = results_of(subject)
    for row in select(list(table.values()), options.tags, options.only):
        made = described(row, table)
        there = [stage for stage in (*STAGES, "refused") if results.stage(row.label, stage, made) is not None]
        print(f"{subject.name:12} {row.label:48} {', '.join(row.tags):32} {', '.join(there) or '-'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="rows with one of these; see --list")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="rows whose label fits, as in a shell")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=["quality"])
    parser.add_argument("--task-limit", type=int, default=1000, metavar="N", help="first rows of each task")
    parser.add_argument("--threads", type=int, metavar="T")
    parser.add_argument(
        "--drop", action="store_true", help="delete each checkpoint when no chosen row needs it any more"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--list", action="store_true", help="show the rows and what is measured")
    parser.add_argument("--report", action="store_true", help="write RESULTS.md and the pictures from what is measured")
    options = parser.parse_args()
    subjects = [SUBJECTS[name] for name in options.model]
    if options.list:
        for subject in subjects:
            listing(subject, options)
    elif options.report:
        import quality_report

        for subject in subjects:
            quality_report.write(subject, results_of(subject))
    else:
        sys.exit(1 if sum(measure(subject, options) for subject in subjects) else 0)


if __name__ == "__main__":
    main()
