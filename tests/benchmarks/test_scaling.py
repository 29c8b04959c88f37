"""The cost model of many machines against counting by hand, and its constants against the code that it describes."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfplate.calibration import BATCH
from halfplate.execution import blocks, hidden
from halfplate.models.linears import find_linears

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("common", "scaling_model", "scaling")


@pytest.fixture(scope="module")
def scripts():
    """The modules of the script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(scripts):
    return scripts.scaling_model


def machines(model, nodes=1, workers=1, **rates):
    plain = {"products": 1e9, "gram": 1e9, "solve": (1e-9, 1e-8, 1e-6), "node_bytes": 1e8, "storage_bytes": 3e8}
    return model.Machines(nodes, workers, **plain | {"add_bytes": 1e9, "hash_bytes": 1e9} | rates)


def test_constants_are_those_of_the_code(model):
    assert (model.BATCH, model.CHUNKS, model.AHEAD) == (BATCH, hidden.CHUNKS, blocks.AHEAD)


@given(samples=st.integers(1, 400))
def test_chunks_are_those_of_the_code(model, samples):
    states = hidden.HiddenStates(Path(), (samples, 7, 1), BATCH)
    expected = [7 * sum(states.samples(number) for number in chunk) for chunk in states.chunks]
    assert model.Work(samples, 7).chunks == expected
    assert [number for chunk in states.chunks for number in chunk] == list(range(states.batches))
    lengths = {len(chunk) for chunk in states.chunks}
    assert max(lengths) - min(lengths) <= 1
    assert len(states.chunks) <= hidden.CHUNKS


def test_matrices_are_those_of_a_llama(model):
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = model.Model("tiny", 2, 32, 16, 48)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    with torch.device("meta"):
        found, _ = find_linears(AutoModelForCausalLM.from_config(config))
    assert [(one.d_out, one.d_in) for one in found] == [(one.d_out, one.d_in) for one in shape.matrices] * 2


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(1, 5))
def test_the_free_worker_takes_the_costliest_task(model, durations, count):
    workers = model._Workers(machines(model, 1, count))
    free = [0] * count
    for duration in sorted(durations, reverse=True):
        free[free.index(min(free))] += duration
    assert workers.run(durations, 0.0) == max(free)


@pytest.mark.parametrize("inputs", ["compressed", "dense"])
def test_one_worker_takes_the_sum_of_all(model, inputs):
    shape, work = model.Model("tiny", 3, 32, 16, 48), model.Work(20, 10, 5, inputs)
    found = model.simulate(shape, work, machines(model, dispatch=0.0)).phases
    solving, writing = 0.0, 0.0
    for _ in range(3):
        for one in shape.matrices:
            solving += 5 * (1e-9 * one.d_out * one.d_in**2 + 1e-8 * one.d_out * one.d_in + 1e-6 * one.d_in)
            solving += 3.2 * one.d_out * one.d_in / 1e8
        writing += 4.4 * shape.weights * (1 / 1e8 + 1 / 1e9)
    assert found["solving"] == pytest.approx(solving)
    assert found["writing"] == pytest.approx(writing)
    assert "reduction" not in found
    # Text: each stage runs what is before it, then the block is run once more; 200 tokens that see 10 each.
    tokens, attention = 200, 4 * 10 * 32
    before = [0, 32 * 32 + 2 * 32 * 16, 32 * 32 * 2 + 2 * 32 * 16, 32 * 32 * 2 + 2 * 32 * 16 + 2 * 32 * 48]
    moments = 3 * 32**2 + 48**2
    if inputs == "compressed":
        flops = 2 * sum(2 * weights + attention * (weights > 0) for weights in before)
        flops += 2 * (2 * shape.weights + attention)
        flops, moments, loads, passes, streams = flops * tokens, 2 * moments, 1, 5, 2
    else:
        flops, loads, passes, streams = 2 * (2 * shape.weights + attention) * tokens, 1, 2, 1
    moved = loads * 2 * shape.weights + passes * tokens * 4 * 32 * streams
    expected = 3 * (flops / 1e9 + 2 * moments * tokens / 1e9 + moved / 1e8)
    assert found["statistics"] == pytest.approx(expected)


@pytest.mark.parametrize("inputs", ["compressed", "dense"])
def test_no_cluster_beats_its_work_nor_its_longest_chain(model, inputs):
    work = model.Work(inputs=inputs)
    for shape in model.LLAMA[:2]:
        seconds = [model.simulate(shape, work, model.on(model.GPU_NODES, nodes)) for nodes in (1, 2, 8)]
        for one, more in pairwise(seconds):
            assert more.seconds <= one.seconds * 1.001
        for nodes, found in zip((1, 2, 8), seconds, strict=True):
            assert 0 < found.busy <= 1
            play = model._Play(shape, work, model.on(model.GPU_NODES, nodes))
            longest = max(play.solving(shape.matrices))
            chain = shape.blocks * longest if inputs == "compressed" else longest
            assert found.seconds >= chain


def test_starts_are_spent_once(model):
    shape, work = model.Model("tiny", 3, 32, 16, 48), model.Work(20, 10, 5)
    plain = model.simulate(shape, work, machines(model, 1, 2)).seconds
    late = model.simulate(shape, work, replace(machines(model, 1, 2), begin=9.0)).seconds
    assert late == pytest.approx(plain + 9)


def test_the_page_shows_what_the_model_says_today(scripts):
    text = scripts.scaling.simulation()
    assert text.count("\n| ") == 20
    assert text in (ROOT / "docs" / "cluster.md").read_text()


def test_rates_of_the_solver_are_found_again(scripts, monkeypatch):
    monkeypatch.setattr(scripts.scaling, "solve_seconds", lambda d_out, d_in, _: d_out * d_in * (3e-12 * d_in + 5e-9))
    cubic, square, column = scripts.scaling.solve_rate([(576, 576), (1536, 576), (576, 1536)], 1)
    assert (cubic, square, column) == (pytest.approx(3e-12, rel=1e-6), pytest.approx(5e-9, rel=1e-6), 0.0)


def test_the_check_puts_both_side_by_side(scripts, monkeypatch, tiny_folder):
    rates = {"products": 1e9, "gram": 1e9, "solve": (1e-9, 1e-8, 0.0), "node_bytes": 1e8, "storage_bytes": 1e8}
    monkeypatch.setattr(scripts.scaling, "rates", lambda iterations: rates | {"add_bytes": 1e9, "hash_bytes": 1e9})
    monkeypatch.setattr(scripts.scaling, "begin_seconds", lambda: 7.0)
    measured = {"statistics": 1.0, "solving": 2.0, "writing": 3.0}
    monkeypatch.setattr(scripts.scaling, "run", lambda model, options: measured)
    text = scripts.scaling.check(str(tiny_folder), 4, 32, 2)
    assert text.count(" / 6.0 |") == 6
    assert "2 blocks, hidden 32; 4 samples of 32 tokens" in text
    assert scripts.scaling.shape_of(str(tiny_folder)) == scripts.scaling_model.Model(str(tiny_folder), 2, 32, 16, 48)
