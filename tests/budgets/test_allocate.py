"""Budgets on a tiny model: kept, better than one level for all, and clear where they cannot be met."""

import json

import pytest

from halfplate.checkpoint.loading import load_any
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.evaluation.perplexity import evaluate
from halfplate.models.sources import load_dense
from halfplate.planning import make_plan
from halfplate.recipe import Recipe

SMALL = {"samples": 8, "seq_len": 32}


def specs(out):
    return json.loads((out / "config.json").read_text())["quantization_config"]["modules"]


@pytest.mark.slow
def test_a_byte_budget_is_kept_and_used(tiny_folder, tmp_path):
    options = {"iterations": 3}
    recipe = Recipe(
        **SMALL, method_options=options, budget=0.62, core_dtype="int8", choose=("block_size", "core_dtype")
    )
    summary = compress(str(tiny_folder), tmp_path / "out", recipe)
    assert 0.9 * 0.62 < summary["nbytes"] / summary["dense_nbytes"] <= 0.62
    levels = {(entry["pattern"], entry["core_dtype"], entry["in_block"]) for entry in specs(tmp_path / "out").values()}
    assert len(levels) > 1
    load_any(str(tmp_path / "out"))


@pytest.mark.slow
def test_a_budget_loses_less_than_one_level_for_all(stories260k, tmp_path):
    dense = load_dense(str(stories260k))
    common = {"samples": 16, "seq_len": 128, "method": "sparsegpt", "inputs": "dense"}
    plain = compress(str(stories260k), tmp_path / "plain", Recipe(**common, pattern="2:4"))
    share = plain["nbytes"] / plain["dense_nbytes"]
    compress(str(stories260k), tmp_path / "budget", Recipe(**common, pattern="2:4", budget=share, choose=("pattern",)))
    from halfplate.calibration.held_out import held_out_tokens
    from halfplate.telemetry.progress import silent

    windows = held_out_tokens(dense.model, dense.tokenizer, 0, 16, 128, silent).ids
    kl = [evaluate(load_any(str(tmp_path / name))[0], windows, dense.model)["kl"] for name in ("plain", "budget")]
    assert kl[1] < kl[0]


def test_a_time_budget_chooses_what_its_measurements_allow(tiny_folder, tmp_path, monkeypatch):
    from halfplate.budgets.stopwatch import Stopwatch

    # Times waver: these are made up, and say that only 1:4 is fast.
    monkeypatch.setattr(Stopwatch, "dense", lambda self, linear: 1.0)
    monkeypatch.setattr(Stopwatch, "compressed", lambda self, linear: 0.4 if str(linear.spec.pattern) == "1:4" else 0.9)
    recipe = Recipe(**SMALL, method="wanda", time_budget=0.5, choose=("pattern",))
    compress(str(tiny_folder), tmp_path / "out", recipe)
    patterns = [entry["pattern"] for entry in specs(tmp_path / "out").values()]
    assert patterns.count("1:4") * 0.4 + (len(patterns) - patterns.count("1:4")) * 0.9 <= 0.5 * len(patterns)
    with pytest.raises(HalfplateError, match=r"time_budget=0\.3 cannot be met: the least is 0\.4"):
        compress(
            str(tiny_folder), tmp_path / "less", Recipe(**SMALL, method="wanda", time_budget=0.3, choose=("pattern",))
        )


@pytest.mark.slow
def test_the_stopwatch_tells_a_time(tiny_folder, tmp_path, monkeypatch):
    from halfplate.budgets.stopwatch import Stopwatch

    # On a busy machine any matrix may seem slower than the dense one, which is slow here.
    dense = Stopwatch.dense
    monkeypatch.setattr(Stopwatch, "dense", lambda self, linear: 1.0 + dense(self, linear))
    recipe = Recipe(**SMALL, method="wanda", time_budget=1.0, choose=("pattern",))
    summary = compress(str(tiny_folder), tmp_path / "out", recipe)
    assert summary["seconds"]["choosing levels"] > 0


def test_a_budget_that_cannot_be_met_is_refused_before_any_work(tiny_folder):
    with pytest.raises(HalfplateError, match=r"budget=0\.2 cannot be met: the least is 0\.\d+ of the original bytes"):
        make_plan(str(tiny_folder), Recipe(**SMALL, budget=0.2, choose=("pattern",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget=0.0 must be a fraction"),
        ({"budget": 1.5}, "budget=1.5 must be a fraction"),
        ({"budget": 0.5, "time_budget": 0.5}, "exclude each other"),
        ({"search": "evolution"}, "search='evolution' looks for the best candidates within a budget; give --budget"),
        ({"budget": 0.5, "search": "annealing"}, "search='annealing' is not one of knapsack, evolution"),
        ({"budget": 0.5, "search": "evolution", "offspring": 0}, "offspring=0 is out of range"),
        ({"choose": ("pattern",)}, "choose=pattern needs a budget"),
        ({"budget": 0.5, "choose": ("rank",)}, "choose='rank' is not one of block_size, pattern, core_dtype"),
    ],
)
def test_budgets_that_mean_nothing(options, message):
    with pytest.raises(HalfplateError, match=message):
        Recipe(**options)
