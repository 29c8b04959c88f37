"""Resuming: the same bytes after being killed anywhere, a refusal naming what differs, and only damaged parts done again."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from conftest import build_model
from halfplate.cli import main
from halfplate.compression import preparation
from halfplate.compression.compress import compress
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.methods.wanda import Wanda
from halfplate.pattern import Pattern
from halfplate.recipe import Recipe
from halfplate.storage.artifact import load_artifact
from halfplate.telemetry.progress import NO_FACTS

SMALL = {"samples": 12, "seq_len": 16, "threads": 1}
ARGUMENTS = ["--samples", "12", "--seq-len", "16", "--threads", "1"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One day a small bird sat in a big tree. It saw a red ball near the house. " * 40)
    return path


class Killed(BaseException):
    """Stands in for kill -9 where a test must know the moment."""


def digests(folder):
    told = ("log.jsonl", "report.html")  # these have times in them
    files = [path for path in sorted(folder.iterdir()) if path.name not in told]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def solved(monkeypatch, stop_at=None):
    """The matrices that are really solved from now on; the one of number `stop_at` ends in Killed."""
    names, original = [], Wanda.compress

    def counting(self, weight, statistics, spec):
        if len(names) == stop_at:
            raise Killed
        names.append(tuple(weight.shape))
        return original(self, weight, statistics, spec)

    monkeypatch.setattr(Wanda, "compress", counting)
    return names


def broken_off(folder, out, recipe, monkeypatch, stop_at, **options):
    """A work folder in which `stop_at` matrices are finished."""
    with monkeypatch.context() as patched:
        solved(patched, stop_at)
        with pytest.raises(Killed):
            compress(str(folder), out, recipe, **options)
    return WorkFolder(out)


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
@pytest.mark.parametrize("stop_at", [0, 2, 6, 7, 9, 13])
def test_the_same_bytes_after_a_break_and_nothing_solved_twice(
    tiny_folder_once, tmp_path, monkeypatch, inputs, stop_at, compressed_once
):
    recipe = Recipe(method="wanda", inputs=inputs, **SMALL)
    whole = digests(compressed_once(recipe))
    out = tmp_path / "out"
    work = broken_off(tiny_folder_once, out, recipe, monkeypatch, stop_at)
    assert not out.exists()
    assert work.path.exists() == (stop_at > 0)  # nothing finished, nothing left
    names = solved(monkeypatch)
    compress(str(tiny_folder_once), out, recipe, resume=True)
    assert len(names) == 14 - stop_at
    assert digests(out) == whole
    assert not work.path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("finished", [0, 9])
def test_tuned_blocks_and_chosen_levels_are_kept(tiny_folder, tmp_path, monkeypatch, finished):
    recipe = Recipe(method="wanda", tune_block=3, budget=0.6, choose=("pattern",), **SMALL)
    compress(str(tiny_folder), tmp_path / "whole", recipe)
    out, tried = tmp_path / "out", 0
    with monkeypatch.context() as patched:
        tried = len(solved(patched))  # those of choosing levels count too
        compress(str(tiny_folder), tmp_path / "again", recipe)
        names = solved(patched)
        compress(str(tiny_folder), tmp_path / "count", recipe)
        tried = len(names) - 14
    broken_off(tiny_folder, out, recipe, monkeypatch, tried + finished)
    monkeypatch.setattr(preparation, "allocate_plan", None)
    names = solved(monkeypatch)
    summary = compress(str(tiny_folder), out, recipe, resume=True)
    assert len(names) == 14 - finished
    assert digests(out) == digests(tmp_path / "whole")
    assert summary["tuned_blocks"].keys() == {"0", "1"}


@pytest.mark.slow
def test_a_complete_result_is_found_and_nothing_is_done(tiny_folder, tmp_path, monkeypatch, text_file):
    recipe = Recipe(method="wanda", calibration=str(text_file), **SMALL)
    first = compress(str(tiny_folder), tmp_path / "out", recipe)
    monkeypatch.setattr("halfplate.compression.compress.compress_layers", None)
    before = digests(tmp_path / "out")
    again = compress(str(tiny_folder), tmp_path / "out", recipe, resume=True)
    assert digests(tmp_path / "out") == before
    for key in ("nbytes", "fingerprint", "calibration", "mean_relative_error", "skipped"):
        assert again[key] == first[key], key
    text_file.write_text(text_file.read_text().replace("bird", "fish"))
    with pytest.raises(HalfplateError, match=r"--resume: tokens was .* when the result was made and is .* now"):
        compress(str(tiny_folder), tmp_path / "out", recipe, resume=True)
    with pytest.raises(HalfplateError, match=r"--resume: seed was 0 when .* was made and is 1 now"):
        compress(
            str(tiny_folder),
            tmp_path / "out",
            Recipe(method="wanda", calibration=str(text_file), seed=1, **SMALL),
            resume=True,
        )


@pytest.mark.slow
def test_what_differs_is_named(tiny_folder, tmp_path, monkeypatch, text_file):
    recipe = {"method": "wanda", "calibration": str(text_file), **SMALL}
    out = tmp_path / "out"
    work = broken_off(tiny_folder, out, Recipe(**recipe), monkeypatch, 9)

    def refused(message, folder=tiny_folder, **changes):
        with pytest.raises(HalfplateError, match=message):
            compress(str(folder), out, Recipe(**recipe | changes), resume=True)
        assert load_artifact(work.layer(0)) is not None  # a refusal costs nothing

    refused("--resume: seed was 0 when .* began and is 1 now; give the same again, or pass --overwrite", seed=1)
    refused("--resume: samples was 12 .* is 8 now", samples=8)
    refused("--resume: threads was 1 .* is 2 now", threads=2)
    refused("--resume: method was 'wanda'", method="ria")
    text = text_file.read_text()
    text_file.write_text(text.replace("bird", "fish"))
    refused("--resume: calibration='.*' had tokens with SHA-256")
    text_file.write_text(text)
    weights = (tiny_folder / "model.safetensors").read_bytes()
    (tiny_folder / "model.safetensors").write_bytes(weights[:-400] + bytes(40) + weights[-360:])
    refused("--resume: model was")
    (tiny_folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(HalfplateError, match=r"left its finished files in .*; pass --resume to continue"):
        compress(str(tiny_folder), out, Recipe(**recipe))
    compress(str(tiny_folder), out, Recipe(**recipe | {"seed": 1}), overwrite=True)
    assert json.loads((out / "halfplate.json").read_text())["recipe"]["seed"] == 1


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def deep(tiny_folder_once, tmp_path_factory):
    """A model of four blocks, the digests of its whole result, and a work folder in which three blocks and four matrices are finished."""
    place = tmp_path_factory.mktemp("deep")
    folder = place / "deep"
    build_model(vocab_size=320, num_hidden_layers=4).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder_once / file, folder)
    recipe = Recipe(method="wanda", **SMALL)
    compress(str(folder), place / "whole", recipe)
    with pytest.MonkeyPatch.context() as patch:
        work = broken_off(folder, place / "out", recipe, patch, 7 * 3 + 4)
    return folder, digests(place / "whole"), work.path


@pytest.mark.parametrize("damage", ["flipped", "cut", "note", "gone"])
@pytest.mark.parametrize("what", ["block", "matrix", "hidden", "tokens"])
def test_only_the_damaged_part_is_done_again(deep, tmp_path, monkeypatch, damage, what):
    folder, whole, broken = deep
    recipe, out = Recipe(method="wanda", **SMALL), tmp_path / "out"
    work = WorkFolder(out)
    shutil.copytree(broken, work.path)
    path = {
        "block": work.layer(1),
        "matrix": next(iter(sorted((work.path / "matrices").glob("*.safetensors")))),
        "hidden": work.hidden("compressed", 3).with_name("compressed-00003.1"),
        "tokens": work.tokens,
    }[what]
    if damage == "flipped":
        flip(path, -5)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "gone":
        path.unlink()
    elif what == "hidden":
        flip(path.with_name(f"{path.name}.sha256"), 3)
    else:
        flip(path.with_suffix(".json"), 80)
    names = solved(monkeypatch)
    compress(str(folder), out, recipe, resume=True)
    assert len(names) == 3 + {"block": 7, "matrix": 1, "hidden": 0, "tokens": 0}[what]
    assert digests(out) == whole


def test_the_identity_is_there_twice(tiny_folder, tmp_path, monkeypatch):
    recipe, out = Recipe(method="wanda", **SMALL), tmp_path / "out"
    work = broken_off(tiny_folder, out, recipe, monkeypatch, 9)
    flip(work.identity_copy, 80)
    flip(work.identity, 80)
    with pytest.raises(HalfplateError, match="and its copy are damaged or missing"):
        compress(str(tiny_folder), out, recipe, resume=True)
    assert load_artifact(work.layer(0)) is not None
    flip(work.identity_copy, 80)
    names = solved(monkeypatch)
    compress(str(tiny_folder), out, recipe, resume=True)
    assert len(names) == 14 - 9


def test_two_processes_do_not_share_a_work_folder(tiny_folder, tmp_path):
    work = WorkFolder(tmp_path / "out")
    with (
        work.opened({}, resume=False, overwrite=False),
        pytest.raises(HalfplateError, match="another process works in"),
    ):
        compress(str(tiny_folder), tmp_path / "out", Recipe(method="wanda", **SMALL))


@pytest.mark.slow
def test_a_finished_result_does_not_take_the_folder_from_who_replaces_it(tiny_folder, tmp_path):
    out, recipe, met = tmp_path / "out", Recipe(method="wanda", **SMALL), []
    compress(str(tiny_folder), out, recipe)

    def second(phase, done, total, note="", share=None, facts=NO_FACTS):
        if facts.get("event") == "matrix" and not met:
            met.append(compress(str(tiny_folder), out, recipe, resume=True))

    compress(str(tiny_folder), out, Recipe(method="ria", **SMALL), overwrite=True, report=second)
    assert met[0]["method"] == "wanda"
    assert json.loads((out / "halfplate.json").read_text())["recipe"]["method"] == "ria"


@pytest.mark.slow
def test_overwrite_beside_resume_starts_what_differs_afresh(tiny_folder, tmp_path, monkeypatch):
    recipe, out = Recipe(method="wanda", **SMALL), tmp_path / "out"
    for changed, expected in ((recipe, 14 - 9), (replace(recipe, seed=1), 14)):
        broken_off(tiny_folder, out, recipe, monkeypatch, 9)
        names = solved(monkeypatch)
        compress(str(tiny_folder), out, changed, resume=True, overwrite=True)
        assert len(names) == expected
        monkeypatch.undo()
        shutil.rmtree(out)


def test_a_ruined_result_leaves_no_work_behind(tiny_folder, tmp_path):
    """The folder is held until the judging is over, so that nobody begins meanwhile, and goes then."""
    with pytest.raises(RuinedResult):
        compress(str(tiny_folder), tmp_path / "out", Recipe(method="wanda", max_kl=1e-9, **SMALL))
    assert not WorkFolder(tmp_path / "out").path.exists()


@pytest.mark.slow
def test_levels_that_are_lost_are_not_mixed_with_others(tiny_folder, tmp_path, monkeypatch):
    """Chosen anew they may be other ones, where measured times decide: what was solved at the old ones is solved again."""
    recipe, out = Recipe(method="magnitude", budget=0.6, tune_block=1, **SMALL), tmp_path / "out"

    def chooses(pattern):
        def choose(loaded, plan, *_):
            specs = {name: replace(spec, pattern=Pattern.parse(pattern)) for name, spec in plan.specs.items()}
            return plan.with_specs(specs), None

        monkeypatch.setattr(preparation, "allocate_plan", choose)

    def die(phase, done, total, note="", share=None, facts=NO_FACTS):
        if facts.get("event") == "matrix" and done == 9:
            raise Killed

    chooses("1:4")
    compress(str(tiny_folder), tmp_path / "whole", recipe)
    chooses("2:4")
    with pytest.raises(Killed):
        compress(str(tiny_folder), out, recipe, report=die)
    chooses("1:4")
    flip(WorkFolder(out).levels, 90)
    compress(str(tiny_folder), out, recipe, resume=True)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tiny_folder_once, tmp_path, monkeypatch, compressed_once):
    recipe = Recipe(method="wanda", **SMALL)
    whole = digests(compressed_once(recipe))
    original, written = os.pwrite, []

    def full(descriptor, data, offset):
        written.append(1)
        if len(written) > 60:
            raise OSError(28, "No space left on device")
        return original(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(HalfplateError, match=r"the disk is full .*finished work is kept, continue with --resume"):
            compress(str(tiny_folder_once), tmp_path / "out", recipe)
    names = solved(monkeypatch)
    compress(str(tiny_folder_once), tmp_path / "out", recipe, resume=True)
    assert 0 < len(names) < 14
    assert digests(tmp_path / "out") == whole


@pytest.mark.slow
def test_killed_for_real_at_random_moments(tiny_folder, tmp_path):
    """Each round kills the process with SIGKILL, the next goes on; the result is that of a run which nobody disturbed."""
    words = ["compress", str(tiny_folder), *ARGUMENTS, "--iterations", "6"]
    command = [sys.executable, "-m", "halfplate", *words]
    assert main([*words, "-o", str(tmp_path / "whole")]) == 0
    out, chance = tmp_path / "out", random.Random(0)
    kills = 0
    while kills < 3 and not out.exists():
        kills += 1
        with subprocess.Popen(
            [*command, "-o", str(out), "--resume"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as process:
            process.stderr.readline()  # it has begun
            time.sleep(chance.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert main([*words, "-o", str(out), "--resume"]) == 0
    assert digests(out) == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_memory_that_runs_out_loses_nothing(tiny_folder_once, tmp_path, monkeypatch, error, compressed_once):
    recipe = Recipe(method="wanda", **SMALL)
    whole = digests(compressed_once(recipe))
    with monkeypatch.context() as patched:
        names, original = [], Wanda.compress

        def starved(self, weight, statistics, spec):
            if len(names) == 9:
                raise error
            names.append(1)
            return original(self, weight, statistics, spec)

        patched.setattr(Wanda, "compress", starved)
        with pytest.raises(type(error)):
            compress(str(tiny_folder_once), tmp_path / "out", recipe)
    names = solved(monkeypatch)
    compress(str(tiny_folder_once), tmp_path / "out", recipe, resume=True)
    assert len(names) == 14 - 9
    assert digests(tmp_path / "out") == whole


def test_a_mount_that_vanishes_and_comes_back_loses_nothing(tiny_folder_once, tmp_path, monkeypatch, compressed_once):
    """The folder of OUT goes in the middle, as a network disk does, and is there again for --resume."""
    recipe = Recipe(method="wanda", **SMALL)
    whole = digests(compressed_once(recipe))
    place, away = tmp_path / "disk", tmp_path / "away"
    place.mkdir()

    def vanish(phase, done, total, note="", share=None, facts=NO_FACTS):
        if facts.get("event") == "block" and not away.exists():
            place.rename(away)

    with pytest.raises(
        HalfplateError, match=r"cannot be used .*; check that the folder exists .* continue with --resume"
    ):
        compress(str(tiny_folder_once), place / "out", recipe, report=vanish)
    if place.exists():
        shutil.rmtree(place)
    away.rename(place)
    names = solved(monkeypatch)
    compress(str(tiny_folder_once), place / "out", recipe, resume=True)
    assert 0 < len(names) < 14
    assert digests(place / "out") == whole
