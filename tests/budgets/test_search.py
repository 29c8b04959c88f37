"""The evolutionary search on a tiny model: its KL is that of the model, the budget holds, the same seed gives the same."""

import json

import pytest
import torch

from halfplate.allocation import Evolution
from halfplate.budgets.measure import LevelMeasurement
from halfplate.budgets.search import ModelAtLevels, search_levels, search_samples
from halfplate.budgets.store import LevelStore
from halfplate.compression.compress import compress
from halfplate.evaluation.perplexity import evaluate
from halfplate.models.sources import load_dense
from halfplate.planning import make_plan
from halfplate.recipe import Recipe
from halfplate.telemetry.progress import silent

QUICK = {"samples": 8, "seq_len": 32, "method": "sparsegpt", "choose": ("pattern",), "budget": 0.7}


@pytest.fixture
def measured(tiny_folder):
    """The dense model, its units, a store of their levels, and text: a function of the bytes that the store holds in memory."""

    def make(memory_bytes=10**9, **options):
        loaded = load_dense(str(tiny_folder))
        plan = make_plan(str(tiny_folder), Recipe(**QUICK | options))
        ids = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))
        store = LevelStore(memory_bytes)
        units = LevelMeasurement(loaded, plan, ids[:4], store).run(silent)
        return loaded, units, store, ids[4:]

    return make


def test_the_kl_is_that_of_the_model_at_the_levels(measured, tiny_folder):
    loaded, units, store, ids = measured()
    dense = load_dense(str(tiny_folder)).model
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    choice = tuple(number % len(unit.levels) for number, unit in enumerate(units))
    with ModelAtLevels(loaded.model, units, store, ids) as at_levels:
        found = at_levels.kl(choice, 2, 0)
        assert found == at_levels.kl(choice, 2, 7)
        # The whole model, its logits at all positions, against the dense one's.
        logits, expected = (model(ids).logits.double().log_softmax(-1) for model in (loaded.model, dense))
        assert found == pytest.approx(float((expected.exp() * (expected - logits)).sum(-1).mean()), rel=1e-4)
        assert found > 0.01
        # Early stages read other text in each generation.
        assert at_levels.kl(choice, 0, 1) != at_levels.kl(choice, 0, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "method": "armor",
            "method_options": {"iterations": 2},
            "share_wrappers": True,
            "block_size": 8,
            "budget": 0.9,
        },
    ],
)
def test_levels_survive_the_disk(measured, options):
    _, units, held, _ = measured(**options)
    _, again, spilled, _ = measured(memory_bytes=5000, **options)
    assert [unit.levels for unit in units] == [unit.levels for unit in again]
    with held, spilled:
        folder = spilled._folder
        assert folder is not None
        assert held._folder is None
        for number, unit in enumerate(units):
            for index, level in enumerate(unit.levels):
                for a, b in zip(*(s.dense((number, index), torch.device("cpu")) for s in (held, spilled)), strict=True):
                    assert torch.equal(a, b)
                assert list(level.specs) == list(unit.names)
    from pathlib import Path

    assert not Path(folder.name).exists()


def test_fronts_rise_in_cost_and_fall_in_error(measured):
    _, units, _, _ = measured()
    for unit in units:
        costs, errors = ([getattr(level, name) for level in unit.levels] for name in ("cost", "error"))
        assert costs == sorted(set(costs))
        assert errors == sorted(set(errors), reverse=True)
        assert unit.harm > 0


def test_a_search_never_ends_worse_than_it_starts(measured):
    loaded, units, store, ids = measured()
    start = [0] * len(units)
    budget = 1.2 * sum(unit.levels[0].cost for unit in units)
    told = []
    picked, record = search_levels(
        loaded.model, units, store, ids, start, budget, Evolution(4, 4), lambda *args, **facts: told.append(args)
    )
    trajectory = [entry["kl"] for entry in record["trajectory"]]
    assert trajectory == sorted(trajectory, reverse=True)
    assert trajectory[-1] < trajectory[0]  # the start leaves a sixth of the budget unspent
    assert sum(unit.levels[level].cost for unit, level in zip(units, picked, strict=True)) <= budget
    assert [args[1:3] for args in told] == [(number, 4) for number in range(5)]


@pytest.mark.slow
def test_a_run_keeps_its_budget_and_its_record_and_repeats(tiny_folder, tmp_path):
    recipe = Recipe(**QUICK, search="evolution", generations=3, offspring=4)
    for name in ("one", "two"):
        summary = compress(str(tiny_folder), tmp_path / name, recipe)
        assert summary["nbytes"] <= 0.7 * summary["dense_nbytes"]
        record = json.loads((tmp_path / name / "halfplate.json").read_text())["search"]
        assert [entry["generation"] for entry in record["trajectory"]] == [0, 1, 2, 3]
        assert (record["method"], record["tokens"], summary["search"]) == ("evolution", 4 * 32, record)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_some_text_is_kept_from_the_solves():
    assert search_samples(64, 512) == 16
    assert search_samples(8, 512) == 4
    assert search_samples(1, 512) == 1


@pytest.mark.slow
def test_on_held_out_text_it_is_no_worse_than_the_knapsack(stories260k, tmp_path):
    from halfplate.calibration.held_out import held_out_tokens
    from halfplate.checkpoint.loading import load_any

    dense = load_dense(str(stories260k))
    windows = held_out_tokens(dense.model, dense.tokenizer, 0, 16, 128, silent).ids
    common = {"samples": 32, "seq_len": 128, "method": "sparsegpt", "inputs": "dense", "choose": ("pattern",)}
    kl = {}
    for search in ("knapsack", "evolution"):
        recipe = Recipe(**common, budget=0.7, search=search, generations=8, offspring=12)
        compress(str(stories260k), tmp_path / search, recipe)
        kl[search] = evaluate(load_any(str(tmp_path / search))[0], windows, dense.model)["kl"]
    assert kl["evolution"] <= 1.02 * kl["knapsack"], kl
