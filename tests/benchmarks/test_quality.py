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
    names = ["common", "quality_results", "quality_rows", "quality_subjects", "quality_measure", "quality"]
    names += ["quality_pictures", "quality_report"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: __import__(name) for name in names})
    for name in names:
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


QUALITY = {
    "nbytes": 600_000,
    "dense_nbytes": 1_000_000,
    "layer_error": 0.02,
    "test": {"perplexity": 30.0, "kl": 0.5, "top1_agreement": 0.7},
    "valid": {"perplexity": 20.0, "kl": 0.4, "top1_agreement": 0.7},
    "c4": {"perplexity": 50.0, "kl": 0.6, "top1_agreement": 0.6},
}


def saved(quality, table, path, **by_label):
    """Results that hold a stage `quality` of some rows."""
    results = quality.quality_results.Results(path)
    for label, changes in by_label.items():
        results.save(label, "quality", quality.quality_rows.described(table[label], table), QUALITY | changes, {})
    return results


def test_report_shows_what_is_measured_and_dashes(quality, table, tmp_path, monkeypatch, capsys):
    rivals = {
        "sparsegpt, compressed inputs, damping 0.01": {"valid": {"perplexity": 40.0}, "test": {"perplexity": 60.0}},
        "sparsegpt, dense inputs, damping 0.1": {"valid": {"perplexity": 41.0}, "test": {"perplexity": 50.0}},
    }
    bits = {
        "armor dense int2, no wrappers": {"nbytes": 200_000, "layer_error": 0.04},
        "armor dense int3, no wrappers": {"nbytes": 300_000, "layer_error": 0.01},
        "armor dense int2, int8 wrappers": {"nbytes": 250_000, "layer_error": 0.01},
    }
    results = saved(quality, table, tmp_path / "results.json", armor={}, **rivals, **bits)
    made = quality.quality_rows.described(table["nowag"], table)
    results.save("nowag", "refused", made, {"reason": "method='nowag' is unknown; available: armor"}, {})
    made = quality.quality_rows.described(table["armor"], table)
    results.save("armor", "decode", made, {"decode": 250.0, "speedup": 4.5, "over_same_loop": 1.4}, {})
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- quality_smollm2: begin -->\nold\n<!-- quality_smollm2: end -->\nafter\n")
    monkeypatch.setattr(quality.quality_report, "PICTURES", ROOT / "docs" / "pictures")
    drawn = []
    monkeypatch.setattr(quality.quality_pictures, "draw", lambda subject, points, folder: drawn.extend(points) or [])
    quality.quality_report.write(quality.quality_subjects.SUBJECTS["smollm2"], results, page)
    text = page.read_text()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "4-bit grid" in text
    assert [cell.strip() for cell in lines["armor"].split("|")[2:8]] == [
        "0.600",
        "0.600",
        "0.0200",
        "30.00",
        "0.500",
        "0.700",
    ]
    assert "| 250 | 4.50 | 1.40 |" in lines["armor"]
    assert set(lines["wanda"].replace("wanda", "").split()) == {"|", "–"}
    assert "nowag (refused: method='nowag' is unknown)" in lines
    # The rival is chosen on valid, and judged on test.
    chosen = next(line for name, line in lines.items() if "best SparseGPT" in name)
    assert "compressed inputs, damping 0.01" in chosen
    assert chosen.endswith("| 0.500 |")
    # Half-way between 0.04 and 0.01 on a logarithmic scale lies 0.02.
    assert lines[next(name for name in lines if "log-linear" in name)].endswith("| 0.500 |")
    assert [(point.label, point.decode, point.kl) for point in drawn if point.label == "armor"] == [
        ("armor", 250.0, 0.5)
    ]


def test_front_of_a_picture(quality):
    point = quality.quality_pictures.Point
    points = [(point(str(x), "armor", x, None, kl), x) for x, kl in [(1, 0.9), (2, 0.5), (3, 0.6), (4, 0.1), (2, 0.7)]]
    assert [x for _, x in quality.quality_pictures.front(points, less_is_better=True)] == [1, 2, 4]
    assert [x for _, x in quality.quality_pictures.front(points, less_is_better=False)] == [4]


def test_pictures_are_drawn_of_what_there_is(quality, tmp_path):
    pytest.importorskip("matplotlib")
    point, draw = quality.quality_pictures.Point, quality.quality_pictures.draw
    points = [point("armor", "ARMOR, 2:4", 10**6, None, 0.5), point("Q8_0", "llama.cpp", 9 * 10**5, 100.0, 0.001)]
    subject = quality.quality_subjects.SUBJECTS["smollm2"]
    made = draw(subject, points, tmp_path)
    assert [path.name for path in made] == ["quality_smollm2_bytes.svg", "quality_smollm2_speed.svg"]
    first = made[0].read_bytes()
    assert b"armor" in first
    assert draw(subject, points, tmp_path)[0].read_bytes() == first
    assert draw(subject, [], tmp_path) == []


def test_rows_of_one_format_share_the_speed_of_the_timed_one(quality, table):
    rows, report = quality.quality_rows, quality.quality_report
    made = {label: rows.described(row, table) for label, row in table.items()}
    formats = {label: rows.format_of(entry) for label, entry in made.items()}
    same = ("armor", "armor, tuned", "armor, diag, dense inputs", "denoiserotator, block 16")
    assert len({formats[label] for label in same}) == 1
    assert formats["armor"] is not None
    assert formats["armor, tuned, 30 minutes of recovery"] == formats["armor"]
    assert formats["armor int4, rounded after the fact"] == formats["armor int4"] != formats["armor"]
    assert formats["wanda"] == formats["magnitude"] not in (formats["armor"], formats["ria, permuted"])
    assert formats["slim, rank 16"] != formats["armor"]
    assert formats["gptq int4, group 64"] == formats["rtn int4, group 64"] != formats["gptq int3, group 64"]
    for alone in ("dense", "armor, 0.5 of the bytes", "wanda, 4:8, owl", "armor int8, int8 activations"):
        assert formats[alone] is None
    found = {label: {} for label in table} | {
        "armor": {"quality": {}, "decode": {"decode": 50.0}},
        "armor, tuned": {"quality": {}},
        "armor, self": {},
        "wanda": {"quality": {}},
    }
    filled = report._with_speed_of_format(made, found)
    assert filled["armor, tuned"]["decode"] == {"decode": 50.0, "of": "armor"}
    assert "of" not in filled["armor"]["decode"]
    assert "decode" not in filled["wanda"]
    assert filled["armor, self"] == {}  # nothing is said of a row that is not measured
