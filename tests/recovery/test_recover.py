"""Recovery as a job on a tiny model: it helps, keeps the masks, goes on after any interruption, and refuses what cannot work."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import halfplate
from halfplate.cli import main
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.recipe import Recipe
from halfplate.recovery.job import recover
from halfplate.recovery.settings import Recovery

FAST = {"learning_rate": 1e-3, "seq_len": 32, "samples": 64, "precision": "fp32"}


ARMOR = {"method": "armor", "block_size": 4, "pattern": "1:4"}  # far enough from the dense model for a little training


@pytest.fixture(params=[{"method": "magnitude", "pattern": "1:4"}, ARMOR], ids=["plain", "wrapped"])
def compressed(request, compressed_once, tmp_path):
    made = compressed_once(Recipe(**request.param, samples=8, seq_len=32))
    return shutil.copytree(made, tmp_path / "compressed")


@pytest.fixture
def wrapped(compressed_once, tmp_path):
    return shutil.copytree(compressed_once(Recipe(**ARMOR, samples=8, seq_len=32)), tmp_path / "compressed")


def weights(folder):
    return load_file(folder / "model.safetensors")


def work(out):
    return out.with_name(f".{out.name}.recovery")


def test_recovery_lowers_the_divergence_and_keeps_the_masks(compressed, tiny_folder, tmp_path):
    out = tmp_path / "recovered"
    summary = recover(compressed, str(tiny_folder), out, Recovery(tokens=4096, **FAST))
    assert summary["after"]["kl"] < 0.99 * summary["before"]["kl"]
    before, after = weights(compressed), weights(out)
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith("weight_index"):
            assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in before if "norm" in name)
    assert not work(out).exists()
    record = json.loads((out / "halfplate.json").read_text())
    assert record["recoveries"][0]["tokens"] == summary["tokens"] >= 4096
    assert halfplate.load(out)(torch.arange(3, 20)[None]).logits.isfinite().all()


@pytest.mark.slow
def test_two_recoveries_of_one_result_do_not_meet(wrapped, tiny_folder, tmp_path):
    out, met = tmp_path / "out", []

    def second(phase, *_, **__):
        if phase == "recovering" and not met:
            with pytest.raises(HalfplateError, match="another process works in") as refusal:
                recover(wrapped, str(tiny_folder), out, Recovery(tokens=512, **FAST), resume=True)
            met.append(refusal)

    recover(wrapped, str(tiny_folder), out, Recovery(tokens=512, **FAST), report=second)
    assert met
    assert not work(out).exists()


def test_what_is_written_lies_in_the_work_folder_until_it_is_whole(wrapped, tiny_folder, tmp_path, monkeypatch):
    """So that a process killed meanwhile leaves it where the next one looks."""
    out, written = tmp_path / "out", []
    monkeypatch.setattr("halfplate.checkpoint.folder._flush", written.append)
    (work(out) / "result.partial").mkdir(parents=True)
    recover(wrapped, str(tiny_folder), out, Recovery(tokens=64, **FAST), overwrite=True)
    assert [path.parent for path in written] == [work(out)]
    assert not work(out).exists()


def test_the_log_tells_every_step(wrapped, tiny_folder, tmp_path):
    summary = recover(wrapped, str(tiny_folder), tmp_path / "out", Recovery(tokens=512, **FAST))
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    by_event = {line["event"]: line for line in lines}
    assert by_event["recovery"]["settings"]["tokens"] == 512
    assert len([line for line in lines if line["event"] == "step"]) == summary["steps"]
    assert by_event["end"]["after"] == summary["after"]
    assert not list(tmp_path.glob("*.log.jsonl"))


def test_wrappers_alone_leave_the_core_and_the_norms(wrapped, tiny_folder, tmp_path):
    settings = Recovery(tokens=512, train="wrappers", norms=False, **FAST)
    recover(wrapped, str(tiny_folder), tmp_path / "out", settings)
    before, after = weights(wrapped), weights(tmp_path / "out")
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"weight_out_blocks", "weight_in_blocks", "weight_out_tail", "weight_in_tail"}
    assert changed


@pytest.mark.slow
def test_a_core_on_a_grid_keeps_its_codes(tiny_folder, tmp_path):
    recipe = Recipe(**ARMOR, samples=8, seq_len=32, core_dtype="int8")
    compress(str(tiny_folder), tmp_path / "int8", recipe)
    recover(tmp_path / "int8", str(tiny_folder), tmp_path / "out", Recovery(tokens=1024, square_head=0.5, **FAST))
    before, after = weights(tmp_path / "int8"), weights(tmp_path / "out")
    codes = [name for name in before if name.endswith("_proj.weight")]
    assert codes
    assert all(torch.equal(before[name], after[name]) for name in codes)


class Interruption(Exception):
    pass


def interrupted_at(step):
    """A report that fails at the given step of the training."""
    seen = 0

    def report(phase, done, total, *more, **named):
        nonlocal seen
        seen += phase == "recovering"
        if seen == step:
            raise Interruption

    return report


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5])
def test_an_interrupted_recovery_ends_in_the_same_bytes(wrapped, tiny_folder, tmp_path, step):
    settings = Recovery(tokens=640, **FAST)
    recover(wrapped, str(tiny_folder), tmp_path / "whole", settings)
    out = tmp_path / "resumed"
    with pytest.raises(Interruption):
        recover(wrapped, str(tiny_folder), out, settings, report=interrupted_at(step), save_minutes=0)
    assert not out.exists()
    assert work(out).exists()
    if step > 1:  # before it there is a text and no state
        with pytest.raises(HalfplateError, match="pass --resume to continue"):
            recover(wrapped, str(tiny_folder), out, settings)
    told = []
    recover(
        wrapped, str(tiny_folder), out, settings, resume=True, report=lambda phase, *rest, **note: told.append(phase)
    )
    assert "sampling text" not in told
    assert told.count("recovering") < 640 // 64 or step == 1
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    again = recover(wrapped, str(tiny_folder), out, settings, resume=True)
    assert again["tokens"] == 640
    assert "after" not in again


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_saved(wrapped, tiny_folder, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ("--tokens", "2560", "--seq-len", "32", "--samples", "16", "--learning-rate", "0.0001", "--threads", "1")

    def command(folder, *more):
        words = ("recover", wrapped, "--teacher", tiny_folder, "-o", folder, "--save-every", "0", *options, *more)
        return [sys.executable, "-m", "halfplate", *map(str, words)]

    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (work(out) / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for words in (command(out, "--resume"), command(whole)):
        status = main(words[3:])
        # So few tokens may teach nothing that holds elsewhere; which, is up to the text that the processor samples.
        assert status == 0 or "did not fall" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_do_what_one_does(wrapped, tiny_folder, tmp_path, capsys):
    words = ("recover", wrapped, "--teacher", tiny_folder, "--tokens", "512", "--seq-len", "32")
    words = (*words, "--samples", "64", "--precision", "fp32", "--json", "--quiet", "-o")
    # What `accelerate launch` itself starts for several devices; for processors it has no launcher of its own.
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "halfplate")
    command = [sys.executable, *launch, *map(str, words), str(tmp_path / "two")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    two = json.loads(run.stdout)
    capsys.readouterr()
    assert main([*map(str, words), str(tmp_path / "one")]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["after"]["kl"] == pytest.approx(one["after"]["kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 330}, "has a different vocabulary (330)"),
        ({"num_hidden_layers": 3}, "has a different number of layers (3)"),
        ({"hidden_size": 64, "head_dim": 16}, "has a different width (64)"),
    ],
)
def test_another_model_is_no_teacher(wrapped, tiny_folder, tmp_path, change, message):
    from tests.conftest import build_model

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    build_model("llama", **({"vocab_size": 320} | change)).save_pretrained(other)
    with pytest.raises(HalfplateError, match=re.escape(message)):
        recover(wrapped, str(other), tmp_path / "out", Recovery(tokens=64, **FAST))
    assert not (tmp_path / "out").exists()


def test_a_teacher_whose_tokens_have_other_numbers_is_refused(wrapped, tiny_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(HalfplateError, match=r"has a different vocabulary: token .* is 1[01] in it and 1[01] in the"):
        recover(wrapped, str(other), tmp_path / "out", Recovery(tokens=64, **FAST))


def test_a_teacher_that_is_not_there_is_refused_by_its_name(wrapped, tmp_path):
    with pytest.raises(HalfplateError, match=r"^teacher='nowhere' does not exist"):
        recover(wrapped, "nowhere", tmp_path / "out", Recovery(tokens=64, **FAST))


@pytest.mark.slow
def test_what_is_left_behind_does_not_block_the_next_try(wrapped, tiny_folder, tmp_path):
    out, told = tmp_path / "out", []
    with pytest.raises(HalfplateError, match=r"the loss became|diverged"):
        recover(wrapped, str(tiny_folder), out, Recovery(tokens=640, **(FAST | {"learning_rate": 1e30})))
    recover(
        wrapped,
        str(tiny_folder),
        out,
        Recovery(tokens=640, **FAST),
        report=lambda phase, *rest, **note: told.append(phase),
    )
    assert "recovering" in told
    assert "sampling text" not in told
    assert not work(out).exists()


def test_a_finished_recovery_leaves_no_state_of_a_killed_one(wrapped, tiny_folder, tmp_path):
    out, settings = tmp_path / "out", Recovery(tokens=64, **FAST)
    recover(wrapped, str(tiny_folder), out, settings)
    work(out).mkdir()
    (work(out) / "state.safetensors").write_bytes(b"left")
    recover(wrapped, str(tiny_folder), out, settings, resume=True)
    assert not work(out).exists()


@pytest.mark.slow
def test_a_state_of_other_settings_is_refused(wrapped, tiny_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        recover(wrapped, str(tiny_folder), out, Recovery(tokens=640, **FAST), report=interrupted_at(3), save_minutes=0)
    with pytest.raises(HalfplateError, match="--resume: tokens was 640 when the recovery"):
        recover(wrapped, str(tiny_folder), out, Recovery(tokens=1280, **FAST), resume=True)
    (work(out) / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(HalfplateError, match="is damaged"):
        recover(wrapped, str(tiny_folder), out, Recovery(tokens=640, **FAST), resume=True)
    recover(wrapped, str(tiny_folder), out, Recovery(tokens=640, **FAST), overwrite=True)
    assert out.exists()


@pytest.mark.slow
def test_nothing_is_trained_again_where_the_result_could_not_be_written(wrapped, tiny_folder, tmp_path, monkeypatch):
    out, settings, told = tmp_path / "out", Recovery(tokens=640, **FAST), []

    def full(*arguments, **named):
        raise HalfplateError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("halfplate.recovery.job.write_checkpoint", full)
        with pytest.raises(HalfplateError, match="the disk is full"):
            recover(wrapped, str(tiny_folder), out, settings)
    recover(
        wrapped, str(tiny_folder), out, settings, resume=True, report=lambda phase, *rest, **note: told.append(phase)
    )
    assert "recovering" not in told
    recover(wrapped, str(tiny_folder), tmp_path / "whole", settings)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_another_text_under_the_same_name_is_refused(wrapped, tiny_folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("One day a small bird sat in a big tree, and it sang to a red ball. " * 40)
    settings = Recovery(tokens=640, **(FAST | {"text": str(text)}))
    with pytest.raises(Interruption):
        recover(wrapped, str(tiny_folder), out, settings, report=interrupted_at(3), save_minutes=0)
    text.write_text("Tom and Mia came out of the house, and they were happy in the sun. " * 40)
    with pytest.raises(HalfplateError, match="--resume: windows was"):
        recover(wrapped, str(tiny_folder), out, settings, resume=True)


def test_the_largest_seed_trains(wrapped, tiny_folder, tmp_path):
    settings = Recovery(tokens=512, seed=2**63 - 1, **FAST)
    assert recover(wrapped, str(tiny_folder), tmp_path / "out", settings)["steps"] > 1


def test_what_cannot_work_is_refused(compressed, tiny_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(HalfplateError, match="is not a Halfplate checkpoint"):
        recover(tiny_folder, str(tiny_folder), out, Recovery(tokens=64))
    with pytest.raises(HalfplateError, match="choose another folder"):
        recover(compressed, str(tiny_folder), compressed, Recovery(tokens=64, **FAST), overwrite=True)
    if not torch.cuda.is_available():
        with pytest.raises(HalfplateError, match="device='cuda' is not available"):
            recover(compressed, str(tiny_folder), out, Recovery(tokens=64, **FAST), device="cuda")
    for minutes in (-1.0, float("nan")):
        with pytest.raises(HalfplateError, match="save_every="):
            recover(compressed, str(tiny_folder), out, Recovery(tokens=64, **FAST), save_minutes=minutes)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(HalfplateError, match="need 32 tokens"):
        recover(compressed, str(tiny_folder), out, Recovery(tokens=64, **(FAST | {"text": str(short)})))
    assert not out.exists()


def test_a_model_without_wrappers_has_none_to_train(tiny_folder, tmp_path):
    compress(str(tiny_folder), tmp_path / "plain", Recipe(method="magnitude"))
    settings = Recovery(tokens=64, train="wrappers", norms=False, **FAST)
    with pytest.raises(HalfplateError, match="no wrappers and no norms to train"):
        recover(tmp_path / "plain", str(tiny_folder), tmp_path / "out", settings)
    assert not work(tmp_path / "out").exists()


@pytest.mark.slow
def test_a_recovery_that_ruins_says_so(wrapped, tiny_folder, tmp_path):
    with pytest.raises(RuinedResult, match="did not fall"):
        recover(wrapped, str(tiny_folder), tmp_path / "out", Recovery(tokens=640, **(FAST | {"learning_rate": 0.1})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of them"),
        ({"tokens": 5, "minutes": 1.0}, "exactly one of them"),
        ({"tokens": 0}, "tokens=0 must be"),
        ({"minutes": float("nan")}, "minutes=nan must be"),
        ({"tokens": 5, "train": "core"}, "train='core' is not one of wrappers, all"),
        ({"tokens": 5, "precision": "fp8"}, "precision='fp8'"),
        ({"tokens": 5, "batch": 0}, "batch=0 is too small"),
        ({"tokens": 5, "seed": 2**63}, "is too large; expected less than 2^63"),
        ({"tokens": 5, "square_head": -1.0}, "square_head=-1.0 is not a weight"),
        ({"tokens": "many"}, "tokens='many' is not of the right type; expected a whole number"),
        ({"tokens": 5, "norms": 2}, "norms=2 is not of the right type; expected true or false"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(HalfplateError, match=re.escape(message)):
        Recovery(**options)


@pytest.mark.slow
def test_low_rank_parts_are_trained_as_wrappers_are(tiny_folder, tmp_path):
    compress(
        str(tiny_folder), tmp_path / "slim", Recipe(method="slim", pattern="1:4", block_size=4, samples=8, seq_len=32)
    )
    settings = Recovery(tokens=4096, train="wrappers", norms=False, **FAST)
    summary = recover(tmp_path / "slim", str(tiny_folder), tmp_path / "out", settings)
    assert summary["after"]["kl"] < summary["before"]["kl"]
    before, after = weights(tmp_path / "slim"), weights(tmp_path / "out")
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight_left", "weight_right"}
