"""The sweeps of benchmarks/quality.py: every row is a recipe that works, and no text judges what it calibrated."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from halfplate.calibration import read_text
from halfplate.sweeps.description import read_sweep

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "benchmarks").glob("quality_*.yaml"))


@pytest.fixture
def scripts(monkeypatch):
    """The script, and what it shares with others."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("common", "quality"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(quality=__import__("quality"), common=__import__("common"))
    for name in ("common", "quality"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(scripts, tmp_path, monkeypatch):
    """Models and texts of a few lines where the script looks for them."""
    monkeypatch.setattr(scripts.quality, "DATA", tmp_path / "data")
    for file in (*scripts.quality.LINKED.values(), *scripts.quality.DIVIDED.values()):
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as lines:
            lines.writelines(json.dumps({"text": f"{path.name} {number}"}) + "\n" for number in range(203))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    monkeypatch.setattr(
        scripts.quality, "MODELS", {name: (place, model) for name, (place, _) in scripts.quality.MODELS.items()}
    )
    return tmp_path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_is_a_recipe_and_every_file_is_made(scripts, data, file):
    sweep = read_sweep(file)
    assert len(sweep.rows) >= 9
    scripts.quality.prepare(file.stem.removeprefix("quality_"), data / "made")
    sources = {row.recipe.calibration for row in sweep.rows if row.recipe is not None} - {"self"}
    for name in (sweep.model, *sweep.evaluation["text"], *sources):
        assert (data / "made" / name).is_file(), name
    assert not sources & set(sweep.evaluation["text"])


def test_no_document_is_calibrated_on_and_judges(scripts, data):
    made = data / "made"
    scripts.quality.prepare("stories260K", made)
    before = {path.name: path.read_bytes() for path in made.glob("*_*.gz")}
    for name in scripts.quality.DIVIDED:
        judging = read_text(str(made / f"{name}_held_out.jsonl.gz"))
        calibrating = read_text(str(made / f"{name}_calibration.jsonl.gz"))
        assert (len(judging), len(calibrating)) == (scripts.quality.HELD_OUT, 3)
        assert not set(judging) & set(calibrating)
    # A second call makes the same bytes: rows that are done stay done.
    scripts.quality.prepare("stories260K", made)
    assert {path.name: path.read_bytes() for path in made.glob("*_*.gz")} == before


def test_what_is_missing_is_named(scripts, data):
    (data / "data" / "wikitext2" / "test.jsonl.gz").unlink()
    with pytest.raises(SystemExit, match=r"test\.jsonl\.gz is missing; HALFPLATE_SHARED names"):
        scripts.quality.prepare("smollm2", data / "made")
