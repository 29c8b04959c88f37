"""A sweep: rows measured once, recorded, resumed, measured again where they changed, and put into one table."""

from __future__ import annotations

import copy
import fcntl
import json
from pathlib import Path

import pytest
import torch

import halfplate
from halfplate.errors import HalfplateError
from halfplate.recipe import Recipe

MEASURES = ("perplexity", "kl", "top1_agreement", "tokens", "dense_perplexity")


class Steps:
    """A report that keeps what it is told of rows, and can end the process at a step, as Ctrl-C does."""

    def __init__(self, end_at=None):
        self.rows, self.phases, self._end_at = [], [], end_at

    def __call__(self, phase, done, total, note="", share=None, facts=()):
        if phase == "rows":
            self.rows.append((facts["name"], facts["step"]))
        else:
            self.phases.append(phase)
        if self._end_at is not None and self._end_at(self, phase, done):
            raise KeyboardInterrupt

    @property
    def begun(self):
        return [name for name, step in self.rows if step == "begun"]


def swept(description, out, **options):
    """The result and the names of the rows that were measured."""
    steps = Steps()
    return halfplate.sweep(description, out, report=steps, **options), steps.begun


def by_name(result):
    return {row["name"]: row for row in result["rows"]}


def test_measures_are_those_of_evaluate_and_bytes_those_of_the_checkpoint(finished_once, tiny_folder_once):
    description, out = finished_once
    result = json.loads((out / "results.json").read_text())
    assert (result["version"], result["failed"]) == (1, [])
    for name, row in by_name(result).items():
        original = name == "original"
        model = tiny_folder_once if original else out / "checkpoints" / name
        direct = halfplate.evaluate(
            model, against=None if original else tiny_folder_once, activations="float", **description["eval"]
        )
        assert {key: row["evaluation"].get(key) for key in MEASURES} == {key: direct.get(key) for key in MEASURES}
        assert json.loads((out / "rows" / f"{name}.json").read_text())["evaluation"] == row["evaluation"]
        if not original:
            recipe = Recipe(**description["base"]) if name == "wanda" else Recipe(method="rtn", core_dtype="int4")
            plan = halfplate.plan(tiny_folder_once, recipe)
            assert row["nbytes"] == plan.nbytes
            assert row["weight_nbytes"] == plan.nbytes + plan.other_nbytes
            assert row["share"] == row["weight_nbytes"] / (plan.dense_nbytes + plan.other_nbytes) < 1
            assert row["compression"]["seconds"]["total"] > 0
    lines = (out / "table.md").read_text().splitlines()
    assert (
        lines[0]
        == "| row | weights, MB | of original | linears, of original | perplexity | KL | top-1 | compression, s |"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| original", "| wanda", "| rounded"]
    wanda = by_name(result)["wanda"]
    assert f"| {wanda['evaluation']['perplexity']:.4g} | {wanda['evaluation']['kl']:.4g} |" in lines[3]
    assert "wanda" in (out / "picture.svg").read_text()


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_what_is_missing(description, tmp_path):
    out = tmp_path / "out"

    def in_the_second_recipe(steps, phase, done):
        return phase == "writing" and done == 1 and steps.begun[-1] == "rounded"

    with pytest.raises(KeyboardInterrupt):
        halfplate.sweep(description, out, report=Steps(in_the_second_recipe))
    so_far = by_name(json.loads((out / "results.json").read_text()))
    assert [row["status"] for row in so_far.values()] == ["done", "done", "to do"]
    before = {name: (out / "rows" / f"{name}.json").read_bytes() for name in ("original", "wanda")}
    result, begun = swept(description, out)
    assert begun == ["rounded"]
    assert {name: (out / "rows" / f"{name}.json").read_bytes() for name in before} == before
    rows = by_name(result)
    assert [row["status"] for row in rows.values()] == ["done"] * 3
    assert rows["rounded"]["compression"]["continued"]
    assert not rows["wanda"]["compression"]["continued"]
    assert "| > " in (out / "table.md").read_text().splitlines()[4]
    assert not (out / "checkpoints").exists()
    assert swept(description, out)[1] == []


@pytest.mark.slow
def test_a_compression_that_was_killed_before_judging_is_not_done_again(description, tmp_path):
    out = tmp_path / "out"

    def before_judging(steps, phase, done):
        return phase.startswith("evaluating") and steps.begun[-1] == "wanda"

    with pytest.raises(KeyboardInterrupt):
        halfplate.sweep(description, out, report=Steps(before_judging))
    kept = json.loads((out / "rows" / "wanda.json").read_text())
    assert kept["status"] == "compressed"
    steps = Steps()
    result = halfplate.sweep(description, out, ["wanda"], report=steps)
    assert "writing" not in steps.phases
    assert by_name(result)["wanda"]["compression"] == kept["compression"]


@pytest.mark.slow
def test_what_changed_is_measured_again_and_says_why(finished, tiny_folder):
    description, out = finished

    def why(changed):
        found = halfplate.sweep(changed, out, dry_run=True)
        return {row["name"]: row["why"] for row in found["rows"] if row["status"] != "done"}

    assert why(description) == {}
    changed = description | {"eval": {**description["eval"], "windows": 3}}
    assert why(changed) == dict.fromkeys(["original", "wanda", "rounded"], "eval windows was 4 and is 3 now")
    assert set(why(description | {"speed": {"prompt": 4}}).values()) == {"speed was absent and is {'prompt': 4} now"}
    weights = next(tiny_folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-200] + bytes(200))
    assert why(description | {"model": str(tiny_folder)})["wanda"] == "the content of model changed"
    changed = copy.deepcopy(description)
    changed["rows"][2]["core_dtype"] = "int3"
    assert why(changed) == {"rounded": "recipe core_dtype was 'int4' and is 'int3' now"}
    before = by_name(json.loads((out / "results.json").read_text()))["rounded"]
    result, begun = swept(changed, out)
    assert begun == ["rounded"]
    assert by_name(result)["rounded"]["nbytes"] < before["nbytes"]
    assert why(changed) == {}


def test_texts_whose_content_changed_are_noticed(finished):
    description, out = finished
    text = Path(description["eval"]["text"])
    content = text.read_text()
    try:
        text.write_text(f"Tom came home. {content}")
        rows = by_name(halfplate.sweep(description, out, dry_run=True))
    finally:
        text.write_text(content)
    assert rows["original"]["why"] == f"the content of eval texts {text} changed"
    assert rows["wanda"]["why"] == "the content of calibration changed"


@pytest.mark.slow
def test_a_row_that_fails_is_recorded_and_tried_again(description, text_file, tmp_path):
    out, late = tmp_path / "out", tmp_path / "late.txt"
    description["rows"] = [{"name": "broken", "calibration": str(late)}, "original"]
    result, begun = swept(description, out)
    assert (begun, result["failed"]) == (["broken", "original"], ["broken"])
    row = by_name(result)["broken"]
    assert (row["status"], "late.txt' does not exist" in row["why"], "\n" in row["why"]) == ("failed", True, False)
    assert f"- broken: failed, {row['why']}" in (out / "table.md").read_text()
    late.write_text(text_file.read_text())
    result, begun = swept(description, out)
    assert (begun, result["failed"]) == (["broken"], [])
    # A row that cannot be judged keeps its checkpoint, which the next call judges.
    description["speed"] = {"prompt": 200, "new_tokens": 4}
    result, _ = swept(description, out, only=["broken"])
    assert "prompt=200" in by_name(result)["broken"]["why"]
    steps = Steps()
    result = halfplate.sweep({**description, "speed": False}, out, ["broken"], report=steps)
    assert (result["failed"], "writing" in steps.phases) == ([], False)
    assert not (out / "checkpoints").exists()


def test_an_error_that_is_no_ours_ends_a_row_and_not_the_sweep(description, tmp_path, monkeypatch):
    from halfplate.sweeps import measuring

    def breaks(*arguments, **options):
        torch.set_num_threads(2)
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(measuring, "compress", breaks)
    result, _ = swept(description, tmp_path / "out")
    assert result["failed"] == ["wanda", "rounded"]
    assert by_name(result)["wanda"]["why"] == "RuntimeError: out of luck"
    assert by_name(result)["original"]["status"] == "done"
    assert torch.get_num_threads() == 1  # threads of one row are not those of the next


def test_a_dry_run_writes_nothing_and_plans_what_is_to_do(description, tiny_folder_once, tmp_path):
    out = tmp_path / "out"
    description["rows"] += [
        {"name": "broken", "calibration": "nowhere.txt"},
        {"name": "budget", "method": "armor", "budget": 0.7},
    ]
    rows = by_name(halfplate.sweep(description, out, dry_run=True))
    assert not out.exists()
    plan = halfplate.plan(tiny_folder_once, **description["base"])
    assert rows["wanda"]["planned"]["nbytes"] == plan.nbytes
    assert rows["wanda"]["why"] == "not measured yet"
    assert rows["original"]["planned"]["share"] == 1
    assert rows["budget"]["planned"]["linear_share"] == pytest.approx(0.7, abs=1e-3)
    assert "nowhere.txt" in rows["broken"]["planned"]["error"]


@pytest.mark.slow
def test_several_texts_and_speed_have_their_columns(description, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Tom and Mia came out of the house. They saw the bird. " * 20)
    description |= {"eval": {**description["eval"], "text": [str(text_file), str(other)]}}
    description |= {"speed": {"prompt": 4, "new_tokens": 3, "rounds": 1}, "rows": description["rows"][:2]}
    result, _ = swept(description, tmp_path / "out")
    header, _, _, wanda = (tmp_path / "out" / "table.md").read_text().splitlines()
    for part in ("story: perplexity | KL | top-1 | other: perplexity", "decode, tokens/s | decode, × original"):
        assert part in header
    assert header.count("|") == wanda.count("|")
    row = by_name(result)["wanda"]
    assert row["speed"]["decode_tokens_per_s"] > 0
    assert f"{row['evaluation']['texts']['other']['kl']:.4g}" in wanda


@pytest.mark.slow
def test_int8_activations_are_those_of_the_row(description, tmp_path):
    int8 = {"method": "rtn", "core_dtype": "int8"}
    rows = [{"name": "float", **int8}, {"name": "int8", "activations": "int8", **int8}]
    found = by_name(swept(description | {"rows": rows}, tmp_path / "out")[0])
    assert found["float"]["nbytes"] == found["int8"]["nbytes"]
    assert found["float"]["evaluation"]["kl"] != found["int8"]["evaluation"]["kl"]


def test_two_sweeps_do_not_share_a_folder(description, tmp_path):
    rows = tmp_path / "out" / "rows"
    rows.mkdir(parents=True)
    with (rows / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(HalfplateError, match="another process works in"):
            halfplate.sweep(description, tmp_path / "out")
    assert not (rows / "original.json").exists()


def test_bad_input_is_refused_before_any_row(description, tiny_folder, tmp_path):
    out = tmp_path / "out"
    for changes, said in (
        ({"model": str(tmp_path / "none")}, "none' does not exist"),
        ({"eval": {"text": "nowhere.txt"}}, "eval: text='nowhere.txt' does not exist"),
    ):
        with pytest.raises(HalfplateError, match=said):
            halfplate.sweep(description | changes, out)
    with pytest.raises(HalfplateError, match="only='wnda' is not a row of the sweep; did you mean 'wanda'"):
        halfplate.sweep(description, out, ["wnda"])
    with pytest.raises(HalfplateError, match="holds files and is not the folder of a sweep"):
        halfplate.sweep(description, tiny_folder)
    with pytest.raises(HalfplateError, match="is a file"):
        halfplate.sweep(description, tiny_folder / "config.json")
    assert not out.exists()


def test_damaged_records_are_measured_again(finished):
    description, out = finished
    file = out / "rows" / "wanda.json"
    whole = json.loads(file.read_text())
    without = {key: value for key, value in whole.items() if key != "evaluation"}
    for content in ("{", "[]", json.dumps(whole | {"version": 9}), json.dumps(without)):
        file.write_text(content)
        row = by_name(halfplate.sweep(description, out, dry_run=True))["wanda"]
        assert (row["status"], row["why"]) == ("to do", "its record is damaged")
