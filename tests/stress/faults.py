"""kill -9 at random moments, and every other fault that can be injected for real: what is lost, what differs, what the user reads.

    python tests/stress/faults.py                      # 52 kills by engine local with 1 worker, 52 with 2, and all kinds of faults
    python tests/stress/faults.py --engine ray --kills 60 --faults
    python tests/stress/faults.py --resume-cost        # what --resume costs where nothing is left to do, and how right the plan is; needs a quiet machine

Half of the kills come after a random time, half at a random operation on a file, a write of which is left half done. After each, `--resume` must give the bytes
of a run that nobody disturbed, and solve nothing that was finished. Runs on stories260K, or on a model made for it where that is not there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESULTS, SHARED, machine, table, write_section
from fault_kinds import FAULTS, Bench, NotHere, digests, finished_matrices
from forked import Order, run

TEXT = "One day a small bird sat in a big tree. The bird saw a red ball near the house, and it wanted to play. "
SMALL: Mapping[str, Any] = {"samples": 10, "seq_len": 12, "block_size": 8, "method_options": {"iterations": 1}}
RESUME_RUNS = 3


@dataclass
class Kills:
    """What became of a number of kills. phases: in which they fell. lost: finished matrices solved again."""

    phases: Counter[str]
    at_files: int = 0
    lost: int = 0
    differing: int = 0
    failed: int = 0


def kill_at_random(order: Order, whole: dict[str, str], kills: int, chance: random.Random) -> Kills:
    """Kill the order that often, resume after each, compare and count. order: with an OUT whose folder may be used."""
    undisturbed = run(replace(order, out=order.out.with_name("measured")))
    assert not undisturbed.error, undisturbed.error
    found, tried = Kills(Counter()), 0
    while found.phases.total() < kills and tried < 2 * kills:
        tried += 1
        again = replace(order, out=order.out.with_name(f"out{tried}"))
        if tried % 2:
            ran = run(again, kill_after=chance.uniform(0.0, 0.98 * undisturbed.seconds))
        else:
            ran = run(again, kill_at=chance.randint(1, max(1, undisturbed.operations - 1)))
        if not ran.killed:
            continue  # it was faster this time
        found.phases[ran.phase] += 1
        found.at_files += 1 - tried % 2
        # Before --resume, OUT is absent or whole.
        if again.out.exists() and digests(again.out) != whole:
            found.differing += 1
        finished = finished_matrices(again.out)
        after = run(replace(again, resume=True))
        if after.error or after.killed:
            print(f"--resume failed: {after.error}", flush=True)
            found.failed += 1
            continue
        found.lost += len(finished & set(after.solved))
        now = digests(again.out)
        found.differing += sum(now.get(name) != whole.get(name) for name in now.keys() | whole.keys())
        print(f"{tried}: {ran.phase}, {len(finished)} kept, {len(after.solved)} solved", flush=True)
    return found


def make_model(folder: Path) -> Path:
    """stories260K, or a Llama of random weights with five blocks where that is not there."""
    real = SHARED / "models" / "stories260K"
    if (real / "config.json").is_file():
        return real
    import memory as made

    folder.mkdir()
    made.write_model(folder, replace(made.SHAPES["tiny"], blocks=5))
    return folder


def make_bench(folder: Path, options: argparse.Namespace) -> Bench:
    """The model, the text and an undisturbed run on it."""
    text = folder / "text.txt"
    text.write_text(TEXT * 60)
    model = options.model or make_model(folder / "model")
    order = Order(model, folder / "whole" / "out", {**SMALL, "calibration": str(text)})
    order.out.parent.mkdir()
    ran = run(order)
    if ran.error is not None:
        raise SystemExit(f"the undisturbed run failed: {ran.error}")
    folder.chmod(0o755)
    return Bench(folder, model, text, order, digests(order.out))


def kill_tables(bench: Bench, options: argparse.Namespace) -> tuple[str, int]:
    """Kills by engine and number of workers, and how many were not as they should be."""
    rows, bad = [], 0
    own = replace(bench.order, small={**bench.order.small, "calibration": "self"})
    for number, workers in enumerate(options.workers):
        order = replace(own, engine=options.engine, workers=workers, out=bench.folder / f"kills{number}" / "out")
        order.out.parent.mkdir()
        alone = replace(own, out=order.out.with_name("whole"))
        run(alone)
        found = kill_at_random(order, digests(alone.out), options.kills, random.Random(options.seed + number))
        phases = ", ".join(f"{phase} {count}" for phase, count in found.phases.most_common())
        bad += found.lost + found.differing + found.failed
        rows.append(
            [
                f"{options.engine}, {workers} worker{'s' * (workers > 1)}",
                *map(str, (found.phases.total(), found.at_files, found.lost, found.differing, found.failed)),
                phases,
            ]
        )
    header = [
        "engine",
        "kills",
        "during a file operation",
        "finished matrices lost",
        "files that differ",
        "resumes that failed",
    ]
    return table([*header, "phase of the kills"], rows), bad


def fault_table(bench: Bench, names: Sequence[str]) -> tuple[str, int]:
    """One row a fault, and how many were not as they should be."""
    rows, bad = [], 0
    for name in names:
        try:
            outcome = FAULTS[name](bench)
        except NotHere as reason:
            rows.append([name, f"not injected: {reason}", ""])
            continue
        sound = outcome.as_meant and not any(word.isupper() and len(word) > 3 for word in outcome.afterwards.split())
        bad += not sound or "failed" in outcome.afterwards
        error = outcome.error.replace(str(bench.folder), "…").replace("|", "/")
        rows.append([name, error if outcome.as_meant else f"NOT AS MEANT: {error}", outcome.afterwards])
        print(f"{name}: {error} -> {outcome.afterwards}", flush=True)
    return "\n".join(
        ["| fault | error | afterwards |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    ), bad


def resume_cost(model: Path) -> str:
    """Seconds that the plan says and that a whole run takes, and of `--resume` on its result, each in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"

        def halfplate(*words: str) -> tuple[float, str]:
            start = time.perf_counter()
            run = subprocess.run(
                [sys.executable, "-m", "halfplate", *words], check=True, stdout=subprocess.PIPE, text=True
            )
            return time.perf_counter() - start, run.stdout

        planned = json.loads(halfplate("plan", str(model), "--json")[1])["seconds_estimate"]
        compress = ["compress", str(model), "-o", str(out), "--quiet", "--no-benchmark"]
        whole, _ = halfplate(*compress)
        least, most = time_left_said(out / "log.jsonl")
        again = statistics.median(halfplate(*compress, "--resume")[0] for _ in range(RESUME_RUNS))
    row = [f"{planned:.0f}", f"{whole:.0f}", f"{whole / planned:.2f}", f"{least:.2f} to {most:.2f}"]
    header = [
        "time in the plan, s",
        "whole run, s",
        "whole run, relative to the plan",
        "remaining time shown after the first layer, relative to the actual",
    ]
    return table([*header, "--resume with nothing left, s", "share"], [[*row, f"{again:.1f}", f"{again / whole:.1%}"]])


def time_left_said(log: Path) -> tuple[float, float]:
    """The least and the most of what was said over what was left of the blocks, from the second block on to 20 s before their end."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    matrices = [event for event in events if event["event"] == "matrix"]
    end = max(event["phase_seconds"] for event in matrices)
    ratios = [
        event["seconds_left"] / (end - event["phase_seconds"])
        for event in matrices
        if event["block"] and end - event["phase_seconds"] > 20
    ]
    return min(ratios, default=float("nan")), max(ratios, default=float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=52, help="for each number of workers")
    parser.add_argument("--engine", default="local")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), help="their names; none for no faults")
    parser.add_argument("--model", type=Path, help="another model than stories260K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume-cost", action="store_true", help="measure only what --resume costs, on SmolLM2")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose sections are replaced")
    options = parser.parse_args()
    if options.resume_cost:
        from common import smollm2_gguf

        text = resume_cost(options.model or smollm2_gguf())
        write_section(
            "resume_cost", f"`python tests/stress/faults.py --resume-cost` · {machine()}\n\n{text}", options.results
        )
        return
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        bench = make_bench(Path(scratch), options)
        if options.kills:
            kills, wrong = kill_tables(bench, options)
            bad += wrong
            write_section(f"kills_{options.engine}", kills, options.results)
        if options.faults:
            faults, wrong = fault_table(bench, options.faults)
            bad += wrong
            write_section("faults", faults, options.results)
    if bad:
        raise SystemExit(f"{bad} were not as they should be")


if __name__ == "__main__":
    main()
