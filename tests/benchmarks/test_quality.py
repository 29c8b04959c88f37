"""The pure parts of benchmarks/quality.py: what makes a row stale, refused rows, the report."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quality(monkeypatch, tmp_path):
    """The modules of the script, with caches of their own."""
    monkeypatch.setenv("HALFPLATE_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setitem(sys.modules, "kernels", None)  # as benchmarks/common.py does
    names = ["common", "quality", "quality_measure", "quality_results", "quality_rows", "quality_subjects"]
    for name in (*names, "quality_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: __import__(name) for name in names}
    yield SimpleNamespace(**modules)
    for name in (*names, "quality_report"):
        sys.modules.pop(name, None)


@pytest.fixture
def table(quality):
    return {row.label: row for row in quality.quality_rows.rows(16, 30)}


def test_rows_have_labels_of_their_own_and_parents_before_them(quality, table):
    rows = quality.quality_rows.rows(16, 30)
    assert len(table) == len(rows)
    seen = set()
    for row in rows:
        assert row.parent is None or row.parent in seen, row.label
        seen.add(row.label)


def test_select_by_tag_and_pattern(quality, table):
    select = quality.quality_rows.select
    rows = list(table.values())
    assert select(rows, [], []) == rows
    assert {row.label for row in select(rows, ["main"], ["armor*"])} >= {"armor", "armor, tuned", "armor int4"}
    assert [row.label for row in select(rows, ["main"], ["wanda"])] == ["wanda"]
    assert select(rows, ["peer"], ["wanda"]) == []


def test_stages_are_kept_until_row_or_protocol_changes(quality, table, tmp_path):
    results = quality.quality_results.Results(tmp_path / "results" / "model.json")
    described = quality.quality_rows.described
    made = described(table["armor"], table)
    results.save("armor", "quality", made, {"test": {"kl": 0.5}}, {"windows": 16})
    results.save("armor", "decode", made, {"decode": 100.0}, {"threads": 2})
    assert results.stage("armor", "quality", made, {"windows": 16})["test"] == {"kl": 0.5}
    assert results.stage("armor", "quality", made, {"windows": 8}) is None
    other = replace(table["armor"], making=quality.quality_rows._armor(32))
    changed = described(other, table | {"armor": other})
    assert results.stage("armor", "quality", changed, {"windows": 16}) is None
    results.save("armor", "quality", changed, {"test": {"kl": 0.4}}, {"windows": 16})
    assert results.stage("armor", "decode", changed) is None  # of the row as it was


def test_a_changed_default_makes_a_row_stale_and_a_new_field_does_not(quality, table):
    unchanged, described = quality.quality_results.unchanged, quality.quality_rows.described
    made = described(table["armor"], table)
    assert unchanged(made, made)
    assert not unchanged(made | {"recipe": made["recipe"] | {"cross_damping": 2.0}}, made)
    before = {key: value for key, value in made["recipe"].items() if key != "token_limit"}
    assert unchanged(made | {"recipe": before}, made)
    stated = {"recipe": made["recipe"], "stated": made["stated"] | {"token_limit": 10.0}}
    assert not unchanged(made | {"recipe": before}, made | stated)


def test_a_child_is_stale_with_its_parent(quality, table):
    described = quality.quality_rows.described
    child = next(row for row in table.values() if row.parent == "armor, tuned")
    other = replace(table["armor, tuned"], making=quality.quality_rows._armor(16, tune_block=41))
    before, after = described(child, table), described(child, table | {other.label: other})
    assert quality.quality_results.unchanged(before, before)
    assert not quality.quality_results.unchanged(before, after)


def test_kept_files_name_no_folder(quality, table, tmp_path):
    message = "calibration='/home/somebody/data/c4.jsonl.gz' does not exist; 0.5/1 of it"
    assert quality.quality_results.without_paths(message) == "calibration='c4.jsonl.gz' does not exist; 0.5/1 of it"


def subject_of(quality, folder, text):
    """A model of random weights as a subject."""
    judged = quality.quality_subjects.Judged(lambda: [text], 2)
    return quality.quality_subjects.Subject(
        "tiny",
        "tiny",
        lambda: folder,
        32,
        {"test": judged, "valid": judged},
        {"text": lambda: folder},
        "random",
        4,
        1.0,
    )


def test_rows_run_refuse_and_resume(quality, tiny_folder, tmp_path, monkeypatch, capsys):
    rows, script = quality.quality_rows, quality.quality
    subject = subject_of(quality, tiny_folder, "One day a small bird sat in a big tree. " * 50)
    own_text = {"calibration": "self", "samples": 2, "seq_len": 16}
    table = [
        rows.Row("dense", rows.Dense()),
        rows.Row("armor", rows.Compressed({"method": "armor", "block_size": 4, **own_text})),
        rows.Row("later", rows.Compressed({"method": "not there yet", "calibration": "self"})),
        rows.Row("armor int4", rows.Rounded("armor", "int4")),
    ]
    monkeypatch.setattr(script, "rows", lambda *_: table)
    monkeypatch.setattr(script, "FOLDER", tmp_path / "results")
    options = SimpleNamespace(
        threads=1, tags=[], only=[], stage=["quality"], task_limit=1, drop=True, fresh=False, model=["tiny"]
    )
    assert script.measure(subject, options) == 0
    content = (tmp_path / "results" / "quality_tiny.json").read_text()
    assert str(tmp_path) not in content
    entries = json.loads(content)
    assert entries["later"]["refused"]["reason"].startswith("method='not there yet' is unknown")
    assert "quality" not in entries["later"]
    dense, armor, rounded = (entries[label]["quality"] for label in ("dense", "armor", "armor int4"))
    assert dense["nbytes"] == dense["dense_nbytes"] > armor["nbytes"] > rounded["nbytes"]
    assert 0 < armor["layer_error"] < rounded["layer_error"] < 1
    assert armor["test"]["kl"] > 0
    assert rounded["test"]["kl"] > 0
    assert entries["armor"]["compression"]["tokens"] == 32
    assert not list((tmp_path / "cache" / "checkpoints").rglob("*.safetensors"))
    capsys.readouterr()
    assert script.measure(subject, options) == 0
    assert "quality:" not in capsys.readouterr().out
