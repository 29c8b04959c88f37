"""What a plan says of memory, disk and time, and that what does not fit is refused before any work, naming what would help."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from torch import nn

from halfplate import limits
from halfplate.cli import main
from halfplate.compression.compress import compress
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.job import Job
from halfplate.planning import make_plan, memory, room
from halfplate.planning.memory import ALLOWANCE, memory_plan, sampling_room
from halfplate.recipe import Recipe
from halfplate.statistics import Statistic

SMALL = {"samples": 4, "seq_len": 16, "calibration": "text.txt"}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("One day a small bird sat in a big tree. " * 40)


def test_the_bound_is_two_blocks_embeddings_grams_and_an_allowance(tiny_folder, text):
    plan = make_plan(str(tiny_folder), Recipe(**SMALL))
    # q and o of 32 to 32, k and v to 16, gate and up to 48, down back; two norms.
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    outer = 2 * 320 * 32 + 32
    # q, k and v share an input, gate and up another; in fp64, each with its cross moments.
    grams = 2 * 8 * (3 * 32**2 + 48**2)
    assert plan.sizes.stages == (32, 32, 32, 48)
    assert plan.memory.bound == 4 * (2 * block + outer) + grams + ALLOWANCE
    assert plan.memory.whole_model == ()
    less = make_plan(str(tiny_folder), Recipe(**SMALL, cross_damping="none"))
    assert plan.memory.bound - less.memory.bound == grams // 2
    assert make_plan(str(tiny_folder), Recipe(method="magnitude")).memory.bound == 4 * (2 * block + outer) + ALLOWANCE


def grown(sizes, times):
    """The sizes of a model wider by a factor, so that more than the libraries shows."""
    return replace(
        sizes,
        blocks=tuple(times**2 * block for block in sizes.blocks),
        outer=times**2 * sizes.outer,
        stages=tuple(times * width for width in sizes.stages),
    )


def test_memory_does_not_grow_with_depth_but_where_the_whole_model_is_held(tiny_folder, text):
    plan = make_plan(str(tiny_folder), Recipe(**SMALL))
    wide = grown(plan.sizes, 100)
    deep = replace(wide, blocks=wide.blocks * 10)

    def peak(sizes, **options):
        recipe = Recipe(**SMALL | options)
        return memory_plan(sizes, list(plan.specs.values()), Job(recipe, Statistic.GRAM), 1).peak

    assert peak(deep) < 1.01 * peak(wide)  # a small result is checked as a whole, a large one by layer
    whole = 4 * (sum(deep.blocks) + deep.outer)
    for option in ({"budget": 0.5}, {"ratios": "owl", "pattern": "4:8"}, {"max_kl": 1.0}):
        assert peak(deep, **option) > whole > peak(deep)
    plan = make_plan(str(tiny_folder), Recipe(**SMALL, max_kl=1.0, budget=0.9))
    assert plan.memory.whole_model == ("--budget", "--max-kl")


def test_sampling_holds_no_more_than_its_room(tiny_folder, text, monkeypatch):
    sizes = make_plan(str(tiny_folder), Recipe(**SMALL)).sizes
    small = replace(sizes, blocks=(10**6,) * 30, hidden=1000, vocabulary=2000)
    monkeypatch.setattr(memory, "bf16_kernels", lambda device: None)
    assert sampling_room(small, "cpu") == (120_000_000, 580_000_000)  # a small model stays
    assert sampling_room(replace(sizes, blocks=(10**8,) * 30), "cpu") == (0, 700_000_000)
    monkeypatch.setattr(memory, "bf16_kernels", lambda device: nn.Identity)
    assert sampling_room(small, "cpu") == (64_000_000, 636_000_000)


def test_each_matrix_has_its_cost_and_the_benchmark_can_be_left_out(tiny_folder, text, capsys):
    options = ["--samples", "4", "--seq-len", "16", "--calibration", "text.txt", "--json"]
    assert main(["plan", str(tiny_folder), *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["refusal"] is None
    assert plan["seconds_estimate"] == pytest.approx(sum(plan["seconds"].values()), abs=0.5)
    for matrix in plan["matrices"]:
        assert matrix["flops"] > 0
        assert matrix["memory_bytes"] > 0
        assert matrix["seconds"] is not None
    by_name = {matrix["name"].rpartition(".")[2]: matrix for matrix in plan["matrices"]}
    assert by_name["down_proj"]["flops"] > by_name["o_proj"]["flops"] > by_name["k_proj"]["flops"]
    assert main(["plan", str(tiny_folder), *options, "--no-benchmark"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds_estimate"] is None
    assert {matrix["seconds"] for matrix in plan["matrices"]} == {None}


@pytest.mark.slow
def test_disk_counts_the_result_the_parts_and_the_hidden_states(tiny_folder, tmp_path, text):
    plan = make_plan(str(tiny_folder), Recipe(**SMALL))
    # Two streams at two blocks, and the inputs of q, k, v; of o; of gate, up; of down in the original model.
    assert plan.disk.hidden == 4 * 4 * 16 * (2 * 2 * 32 + sum(plan.sizes.stages))
    assert plan.sizes.stages[:3] == (32, 32, 32)
    assert plan.disk.transformed == plan.disk.statistics == 0
    assert make_plan(str(tiny_folder), Recipe(**SMALL), workers=2).disk.statistics > 0
    summary = compress(str(tiny_folder), tmp_path / "out", Recipe(**SMALL))
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert summary["nbytes"] < written <= plan.disk.result


def refused(tiny_folder, tmp_path, message, recipe, workers=1):
    with pytest.raises(HalfplateError, match=message):
        compress(str(tiny_folder), tmp_path / "out", recipe, workers=workers)
    assert not (tmp_path / "out").exists()
    assert not WorkFolder(tmp_path / "out").path.exists()
    assert not list(tmp_path.glob("*log*"))


@pytest.mark.slow
def test_too_little_memory_is_refused_before_any_work(tiny_folder, tmp_path, text, monkeypatch, capsys):
    plan = make_plan(str(tiny_folder), Recipe(**SMALL))
    monkeypatch.setattr(room, "available_memory", lambda: 10**8)
    refused(tiny_folder, tmp_path, "memory: .* needs .*B, this process can use 100.0 MB; no option .*", Recipe(**SMALL))
    assert main(["plan", str(tiny_folder), "--method", "magnitude", "--no-benchmark"]) == 0
    assert "fits no: memory: checking needs" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(limits, "cores", lambda: 4)
    # As much as one process needs is not enough for four.
    monkeypatch.setattr(room, "available_memory", lambda: 2 * plan.memory.peak)
    refused(tiny_folder, tmp_path, "memory: workers needs .*; try --workers 1$", Recipe(**SMALL), workers=4)
    compress(str(tiny_folder), tmp_path / "out", Recipe(**SMALL))


def test_the_option_that_would_do_is_named(tiny_folder, text, monkeypatch):
    recipe = Recipe(**SMALL, max_kl=1.0, budget=0.9)
    plan = make_plan(str(tiny_folder), recipe)
    wide = grown(plan.sizes, 100)
    deep = replace(wide, blocks=wide.blocks * 10)
    specs = list(plan.specs.values())

    def reason(recipe, available):
        held = memory_plan(deep, specs, Job(recipe, Statistic.GRAM), 1)
        monkeypatch.setattr(room, "available_memory", lambda: available)
        return room.refusal(replace(plan, job=Job(recipe, Statistic.GRAM), sizes=deep, memory=held), None)

    streamed = memory_plan(deep, specs, Job(Recipe(**SMALL), Statistic.GRAM), 1).peak
    assert reason(recipe, 10 * streamed) is None
    assert reason(replace(recipe, budget=None), streamed + 10**7).endswith("try leave out --max-kl")
    assert reason(recipe, streamed + 10**7).endswith("try leave out --max-kl, leave out --budget together")


def test_too_little_disk_is_refused_before_any_work(tiny_folder, tmp_path, text, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 10**6))
    message = r"out='.*': .* MB of disk space needed \(result .*\), but only 1.0 MB free; free some space"
    refused(tiny_folder, tmp_path, message, Recipe(**SMALL))


def test_limits_of_the_process_count():
    import resource

    free = room.available_memory()
    assert free is None or free > 0
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (2**40, before[1]))
        assert room.available_memory() <= 2**40
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
