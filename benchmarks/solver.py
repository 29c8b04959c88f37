"""`solver: exact` against `solver: paper`, side by side in one process; the cost of a sweep by size.

    python benchmarks/solver.py

For q_proj, gate_proj and down_proj of blocks 0, 10 and 29 of SmolLM2-135M at wrapper block 32, with second moments of 32k
tokens of WikiText-2 train text: the seconds in which each solver reaches the loss of the published run after 3,000 and
20,000 iterations, and in which Adam at its best learning rate reaches the first. Results are kept in benchmarks/cache
matrix by matrix; `--fresh` measures them again. About an hour on two quiet cores.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import CACHE, DATA, ROOT, machine, smollm2_gguf, table, write_section

from halfplate.calibration import calibration_tokens, collect_block
from halfplate.formats import WeightSpec
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.sources import load_dense
from halfplate.pattern import Pattern
from halfplate.solvers.armor.exact import solve_exact
from halfplate.solvers.armor.paper import PaperRun, PaperSchedule
from halfplate.solvers.armor.problem import Problem
from halfplate.solvers.armor.stages import stages_for
from halfplate.solvers.normalise import normalise
from halfplate.statistics import Statistic

BLOCKS, LINEARS = (0, 10, 29), ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
EARLY, FULL = 3_000, 20_000
RATES = (1e-3, 3e-3, 3e-4, 1e-2)
CPU = torch.device("cpu")


def problems() -> dict[str, Problem]:
    """The nine matrices, normalised, at block 32."""
    path = CACHE / "solver_problems.pt"
    if path.exists():
        loaded: dict[str, Problem] = torch.load(path, weights_only=False)
        return loaded
    dense = load_dense(str(smollm2_gguf()))
    text = DATA / "wikitext2" / "train_1MB.txt.gz"
    tokens = calibration_tokens(str(text), dense.model, dense.tokenizer, samples=64, seq_len=512, seed=0)
    blockwise = BlockwiseModel(dense.model)
    inputs = [blockwise.embed(batch) for batch in tokens.ids.split(8)]
    found = {}
    for index in range(len(blockwise.blocks)):
        names = [f"{blockwise.prefix}.{index}.{linear}" for linear in LINEARS] if index in BLOCKS else []
        statistics, inputs = collect_block(blockwise, index, inputs, names, Statistic.DIAGONAL)
        for name in names:
            weight = dense.model.get_submodule(name).weight
            moment = statistics[name].require_diagonal()
            spec = WeightSpec(*weight.shape, Pattern(2, 4), "bf16", 32, 32)
            found[name] = Problem.from_weight(normalise(weight).weight, moment / moment.mean(), spec)
    CACHE.mkdir(exist_ok=True)
    torch.save(found, path)
    return found


def paper_trajectory(
    problem: Problem, iterations: int, rate: float, until: float = 0.0, limit: float = float("inf")
) -> list[tuple[float, float]]:
    """(seconds, loss) after each iteration of the published algorithm, ending at the loss `until` or after `limit` seconds."""
    total = problem.zero_loss()
    run = PaperRun(problem, PaperSchedule(learning_rate=rate))
    points = [(0.0, run.loss / total)]
    best, waited = points[0][1], 0
    for _ in range(iterations):
        start = time.perf_counter()
        loss = run.step() / total
        points.append((points[-1][0] + time.perf_counter() - start, loss))
        best, waited = (loss, 0) if loss < best * (1 - PaperSchedule.tolerance) else (best, waited + 1)
        if loss <= until or points[-1][0] > limit or waited >= PaperSchedule.patience:
            break
    return points


def seconds_to(problem: Problem, losses: list[float], target: float) -> float | None:
    """Median seconds of five exact runs that end at the first iteration whose loss is at most `target`."""
    reached = next((index for index, loss in enumerate(losses) if loss <= target), None)
    if reached is None:
        return None
    return median(timed(lambda: solve_exact(problem, reached, stages_for(CPU))) for _ in range(5))


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_early(problem: Problem) -> dict[str, Any]:
    """Both solvers up to the loss that the published one has after 3,000 iterations, and the exact one up to its end."""
    paper = paper_trajectory(problem, EARLY, 1e-4)
    seconds, loss = paper[-1]
    _, losses = solve_exact(problem, 400, stages_for(CPU))
    adam: dict[str, float] = {}
    for rate in RATES:
        # A rate that has not arrived when a better one had is of no interest.
        end = paper_trajectory(problem, EARLY, rate, loss, min(adam.values(), default=seconds))[-1]
        if end[1] <= loss:
            adam[str(rate)] = end[0]
    return {
        "paper": paper[::50],
        "start": paper[0][1],
        "early": (seconds, loss),
        "ms_an_iteration": 1e3 * seconds / (len(paper) - 1),
        "exact": losses,
        "exact_seconds": seconds_to(problem, losses, losses[-1]),
        "exact_to_early": seconds_to(problem, losses, loss),
        "adam_to_early": adam,
    }


def measure_full(problem: Problem, losses: list[float], iterations: int) -> dict[str, Any]:
    """The whole published run, and how soon the exact solver, whose `losses` are known, is as low."""
    paper = paper_trajectory(problem, iterations, 1e-4)
    full = min(paper, key=lambda point: point[1])
    return {"paper": paper[::50], "full": full, "exact_to_full": seconds_to(problem, losses, full[1])}


def sweep_cost() -> list[list[str]]:
    """Seconds of one exact iteration by size: random weights, block 32."""
    rows = []
    for size in (576, 1024, 2048, 4096):
        generator = torch.Generator().manual_seed(size)
        spec = WeightSpec(size, size, Pattern(2, 4), "bf16", 32, 32)
        weight = torch.randn(size, size, generator=generator)
        problem = Problem.from_weight(normalise(weight).weight, torch.rand(size, generator=generator), spec)
        factors, stages = problem.start(), stages_for(CPU)
        sweep = median(timed(lambda f=factors, p=problem, s=stages: s.sweep(p, f)) for _ in range(7))
        whole = median(timed(lambda p=problem, s=stages: solve_exact(p, 3, s)) for _ in range(3)) / 3
        weights = size * size
        rows.append([f"{size}²", f"{1e9 * sweep / weights:.1f}", f"{1e9 * whole / weights:.1f}"])
    return rows


def plot(results: dict[str, dict[str, Any]]) -> None:
    """Loss against seconds of both solvers, one panel a matrix."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "halfplate"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 3, figsize=(10, 8.5), sharex=True)
    for axis, (name, result) in zip(axes.flat, results.items(), strict=True):
        seconds, losses = zip(*result["paper"][1:], strict=True)
        axis.plot(seconds, losses, label="paper (Adam)", color="#b8562f")
        step = result["exact_seconds"] / max(1, len(result["exact"]) - 1)
        times = list(accumulate([step] * (len(result["exact"]) - 1)))
        axis.plot(times, result["exact"][1:], label="exact", color="#2a6f97")
        axis.axhline(result["paper"][-1][1], color="#999999", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", title=name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", ""))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.supxlabel("seconds")
    figure.supylabel("proxy loss, relative to that of zero")
    figure.tight_layout()
    target = ROOT / "docs" / "pictures" / "solver_trajectories.svg"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def report(results: dict[str, dict[str, Any]], where: str) -> str:
    """The section of RESULTS.md."""
    rows = []
    ratios: dict[str, list[float]] = {"early": [], "full": [], "adam": []}
    for name, r in results.items():
        best = min(r["adam_to_early"], key=r["adam_to_early"].get, default=None)
        ratios["early"].append(r["early"][0] / r["exact_to_early"])
        told = {"early": f"{ratios['early'][-1]:.0f}×", "full": "not run", "adam": "never there"}
        if r.get("exact_to_full"):
            ratios["full"].append(r["full"][0] / r["exact_to_full"])
            told["full"] = f"{ratios['full'][-1]:.0f}×"
        if best:
            ratios["adam"].append(r["adam_to_early"][best] / r["exact_to_early"])
            told["adam"] = f"{ratios['adam'][-1]:.0f}× (lr {best})"
        full = f"{r['full'][1]:.5f}" if "full" in r else "not run"
        losses = [f"{r['start']:.5f}", f"{r['early'][1]:.5f}", full, f"{r['exact'][-1]:.5f}"]
        rows.append([name.removeprefix("model.layers."), *losses, f"{r['ms_an_iteration']:.1f}", *told.values()])
    middle = [f"**{median(values):.0f}×** of {len(values)}" if values else "" for values in ratios.values()]
    rows.append(["**median**", "", "", "", "", "", *middle])
    header = [
        "matrix",
        "start = NoWag-P",
        f"paper, {EARLY:,}",
        "paper, full run",
        "exact, 400",
        "paper, ms an iteration",
    ]
    header += [f"exact sooner at paper's loss of {EARLY:,}", "of the full run", "than Adam's best rate"]
    cost = table(["size", "sweep, ns a weight", "whole iteration, ns a weight"], sweep_cost())
    return (
        f"`python benchmarks/solver.py` · {where}\n\n{table(header, rows)}\n\n"
        "Proxy losses are relative to that of the zero matrix. The full run is 20,000 iterations or the end of its patience "
        "(100 iterations without 1e-6 of progress). A ratio is the seconds of the published algorithm over the median of five exact "
        "runs, start included, that end at the first iteration at or below the same loss; the last column takes the learning rate, of "
        f"{', '.join(str(rate) for rate in sorted(RATES))}, with which Adam is first at the loss of {EARLY:,} iterations at 1e-4.\n\n"
        f"Cost of one exact iteration by size (random weights, block 32):\n\n{cost}"
    )


def keep(cached: Path, results: dict[str, dict[str, Any]], name: str) -> None:
    """Save what was measured so far, and say what is new."""
    cached.write_text(json.dumps(results))
    print(name, {k: v for k, v in results[name].items() if k not in ("paper", "exact")}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--iterations", type=int, default=FULL, help="of the published run")
    parser.add_argument(
        "--early", action="store_true", help="leave out the full published runs that are not yet measured"
    )
    parser.add_argument("--dry", action="store_true", help="print the section instead of writing RESULTS.md")
    options = parser.parse_args()
    cached = CACHE / "solver.json"
    results: dict[str, dict[str, Any]] = {}
    if cached.exists() and not options.fresh:
        results = json.loads(cached.read_text())
    where = machine()
    with torch.no_grad():
        found = problems()
        for name, problem in found.items():
            if name not in results:
                results[name] = measure_early(problem)
                keep(cached, results, name)
        for name in sorted(found, key=lambda name: (not name.endswith("q_proj"), ".10." not in name)):
            if "full" not in results[name] and not options.early:
                results[name] |= measure_full(found[name], results[name]["exact"], options.iterations)
                keep(cached, results, name)
        if options.dry:
            print(report(results, where))
            return
        plot(results)
        write_section("solver", report(results, where))


if __name__ == "__main__":
    main()
