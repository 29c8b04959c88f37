import json
from pathlib import Path

import pytest

from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.methods.wanda import Wanda
from halfplate.recipe import Recipe
from halfplate.telemetry.log import append, run_log
from halfplate.telemetry.progress import NO_FACTS, silent

SMALL = {"method": "wanda", "samples": 4, "seq_len": 32}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_of_a_run(tiny_folder, tmp_path):
    out = tmp_path / "out"
    summary = compress(str(tiny_folder), out, Recipe(**SMALL))
    log = lines(out / "log.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tiny_llama"}

    start, plan = log[0], next(line for line in log if line["event"] == "plan")
    assert start["event"] == "start"
    assert start["versions"].keys() >= {"halfplate", "torch", "transformers"}
    assert plan["recipe"] == summary["recipe"]
    assert (plan["model"], plan["out"], plan["fingerprint"]) == (str(tiny_folder), str(out), summary["fingerprint"])

    matrices = [line for line in log if line["event"] == "matrix"]
    assert [line["name"] for line in matrices] == [matrix["name"] for matrix in summary["matrices"]]
    assert [line["relative_error"] for line in matrices] == [m["relative_error"] for m in summary["matrices"]]
    assert [line["seconds"] for line in matrices] == [matrix["seconds"] for matrix in summary["matrices"]]
    assert {line["block"] for line in matrices} == {0, 1}
    assert [line["block"] for line in log if line["event"] == "block"] == [0, 1]
    assert all("seconds_left" in line for line in matrices)
    assert matrices[-1]["seconds_left"] == 0
    assert log[-1]["event"] == "end"
    assert log[-1]["seconds"] == summary["seconds"]
    assert [line["time"] for line in log] == sorted(line["time"] for line in log)
    if Path("/proc/self/status").exists():
        assert all(0 < line["rss_bytes"] <= line["peak_rss_bytes"] for line in log)


@pytest.mark.slow
def test_losses_are_logged(tiny_folder, tmp_path):
    recipe = Recipe(method="armor", block_size=4, method_options={"iterations": 2}, samples=4, seq_len=32)
    summary = compress(str(tiny_folder), tmp_path / "out", recipe)
    found = {line["name"]: line for line in lines(tmp_path / "out" / "log.jsonl") if line["event"] == "matrix"}
    for matrix in summary["matrices"]:
        line = found[matrix["name"]]
        assert (line["first_loss"], line["loss"]) == (matrix["losses"][0], matrix["losses"][-1])


@pytest.mark.slow
def test_the_log_changes_no_tensor_and_no_record(tiny_folder, tmp_path):
    for name in ("a", "b"):
        compress(str(tiny_folder), tmp_path / name, Recipe(**SMALL))
    for file in ("model.safetensors", "halfplate.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_run_that_fails_says_why(tiny_folder, tmp_path, monkeypatch):
    original, solved = Wanda.compress, []

    def breaks(self, *arguments):
        solved.append(1)
        if len(solved) == 9:
            raise RuntimeError("the disk\nis on fire")
        return original(self, *arguments)

    monkeypatch.setattr(Wanda, "compress", breaks)
    with pytest.raises(RuntimeError, match="on fire"):
        compress(str(tiny_folder), tmp_path / "out", Recipe(**SMALL))
    assert not (tmp_path / "out").exists()
    log = lines(tmp_path / "out.log.jsonl")
    assert len([line for line in log if line["event"] == "matrix"]) == 8
    assert (log[-1]["event"], log[-1]["kind"], log[-1]["message"]) == ("error", "RuntimeError", "the disk is on fire")


@pytest.mark.slow
def test_a_ruined_result_has_its_log(tiny_folder, tmp_path):
    with pytest.raises(RuinedResult):
        compress(str(tiny_folder), tmp_path / "out", Recipe(**SMALL, max_kl=1e-9))
    assert lines(tmp_path / "out" / "log.jsonl")[-1]["kind"] == "RuinedResult"


def failing(out, facts, resume=False):
    with run_log(out, silent, resume) as report:
        report("compressing", 1, 2, facts=facts)
        assert out.with_name("out.log.jsonl").exists()
        raise KeyError("x")


def test_a_failure_before_the_first_matrix_leaves_no_log(tmp_path):
    with pytest.raises(KeyError):
        failing(tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_log_goes_on(tmp_path):
    for resume in (False, True):
        with pytest.raises(KeyError):
            failing(tmp_path / "out", {"event": "matrix", "name": "m", "loss": float("nan")}, resume)
    log = lines(tmp_path / "out.log.jsonl")
    assert [line["event"] for line in log] == ["start", "matrix", "error"] * 2
    assert log[1]["loss"] is None


def test_a_refused_resume_leaves_the_log_as_it_was(tiny_folder, tmp_path):
    out, recipe = tmp_path / "out", Recipe(**SMALL)
    with pytest.raises(KeyError):
        compress(str(tiny_folder), out, recipe, report=raising_at_matrix)
    log = tmp_path / "out.log.jsonl"
    before = log.read_bytes()
    for changes in ({"seed": 1}, {"seq_len": 4000}):
        with pytest.raises(HalfplateError):
            compress(str(tiny_folder), out, Recipe(**SMALL | changes), resume=True)
        assert log.read_bytes() == before
    compress(str(tiny_folder), out, recipe, resume=True)
    assert (out / "log.jsonl").read_bytes().startswith(before)


def raising_at_matrix(phase, done, total, note="", share=None, facts=NO_FACTS):
    if facts.get("event") == "matrix" and done == 3:
        raise KeyError("x")


def test_a_second_run_does_not_touch_the_log_of_the_first(tiny_folder, tmp_path):
    out, met = tmp_path / "out", []

    def second(phase, done, total, note="", share=None, facts=NO_FACTS):
        if facts.get("event") == "matrix" and not met:
            for resume in (False, True):
                with pytest.raises(HalfplateError, match="another process works in") as refusal:
                    compress(str(tiny_folder), out, Recipe(**SMALL), resume=resume)
                met.append(refusal)

    compress(str(tiny_folder), out, Recipe(**SMALL), report=second)
    assert len(met) == 2
    log = lines(out / "log.jsonl")
    assert [line["event"] for line in log].count("start") == 1
    assert len([line for line in log if line["event"] == "matrix"]) == 14
    assert log[-1]["event"] == "end"


def test_a_line_that_a_full_disk_cut_off_goes(tmp_path):
    out, log = tmp_path / "out", tmp_path / "out.log.jsonl"
    log.write_text('{"event": "matrix"}\n{"event": "mat')
    with pytest.raises(KeyError):
        failing(out, {}, resume=True)
    assert [line["event"] for line in lines(log)] == ["matrix", "start", "error"]


def test_only_ends_of_phases_are_logged(tmp_path):
    with run_log(tmp_path / "out", silent) as report:
        (tmp_path / "out").mkdir()
        for done in range(101):
            report("sampling", done, 100)
    log = [line for line in lines(tmp_path / "out" / "log.jsonl") if line["event"] == "phase"]
    assert [(line["done"], line["total"]) for line in log] == [(0, 100), (100, 100)]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "out.log.jsonl").mkdir()
    with run_log(tmp_path / "out", silent) as report:
        report("reading", 1, 1)
    append(tmp_path / "nowhere", {"event": "measures"})
