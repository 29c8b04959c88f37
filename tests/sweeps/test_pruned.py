"""Rows of a sweep that stay plain models: what `prune` writes, measured as other rows are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import halfplate
from halfplate.errors import HalfplateError
from halfplate.sweeps.description import read_sweep
from structured_models import saved

MEASURES = ("perplexity", "kl", "top1_agreement")


@pytest.fixture
def described(tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    """A sweep of two pruned models beside one compressed."""
    text = tmp_path / "story.txt"
    text.write_text("The small bird sat in the big tree near the house, and it wanted to play with the red ball. " * 20)
    return {
        "model": saved(tiny_tokenizer, tmp_path / "model").name,
        "eval": {"text": str(text), "seq_len": 16, "windows": 4},
        "speed": {"prompt": 4, "new_tokens": 2, "rounds": 1, "threads": 1},
        "base": {"method": "rtn", "core_dtype": "int8", "samples": 2, "seq_len": 16, "calibration": str(text)},
        "rows": [{"name": "flap", "prune": "flap", "keep": [0.9, 0.6]}, {"name": "int8"}],
    }


def test_a_pruned_row_is_what_prune_writes(described: dict[str, Any], tmp_path: Path) -> None:
    result = halfplate.sweep(described, tmp_path / "out", keep=True)
    rows = {row["name"]: row for row in result["rows"]}
    assert (list(rows), result["failed"]) == (["flap, keep 0.9", "flap, keep 0.6", "int8"], [])
    options = {name: described["base"][name] for name in ("samples", "seq_len", "calibration")}
    made = halfplate.prune(described["model"], tmp_path / "by hand", 0.6, transforms=["flap"], check=False, **options)
    row = rows["flap, keep 0.6"]
    found = halfplate.evaluate(tmp_path / "by hand", against=described["model"], **described["eval"])
    assert {key: row["evaluation"][key] for key in MEASURES} == {key: found[key] for key in MEASURES}
    # Linears count 2 bytes per weight in every row, although these files are fp32.
    plan = halfplate.plan(tmp_path / "by hand", method="rtn", core_dtype="int8", seq_len=16)
    assert row["weight_nbytes"] == plan.dense_nbytes + plan.other_nbytes < made["nbytes"]
    assert 0 < row["linear_share"] < rows["flap, keep 0.9"]["linear_share"] < 1
    assert row["compression"]["told"].startswith("keeps ")
    assert row["speed"]["decode_speedup"] > 0
    assert "flap, keep 0.6" in (tmp_path / "out" / "table.md").read_text()
    assert "against decode speed" in (tmp_path / "out" / "speed.svg").read_text()
    before = (tmp_path / "out" / "rows" / "int8.json").read_bytes()
    again = halfplate.sweep(described, tmp_path / "out")  # nothing is measured again
    assert [one["status"] for one in again["rows"]] == ["done"] * 3
    assert (tmp_path / "out" / "rows" / "int8.json").read_bytes() == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prune": "flap"}, "row 'x': transforms='flap@1' needs keep"),
        ({"prune": "flapp", "keep": 0.5}, "'flapp' is unknown; did you mean 'flap'"),
        ({"prune": "flap", "keep": 2}, "must be a fraction of the parameters"),
        ({"prune": 3, "keep": 0.5}, "prune=3 is a int, expected the name of a transform; try flap"),
        ({"prune": "flap", "keep": 0.5, "method": "wanda"}, "row 'x': key 'method' is unknown"),
    ],
)
def test_bad_input_is_named(described: dict[str, Any], row: dict[str, Any], message: str) -> None:
    with pytest.raises(HalfplateError) as error:
        read_sweep(described | {"rows": [{"name": "x", **row}]})
    assert message in str(error.value)


def test_a_share_that_leaves_nothing_is_told_by_the_dry_run_and_stops_no_row(
    described: dict[str, Any], tmp_path: Path
) -> None:
    described |= {"rows": [{"name": "x", "prune": "flap", "keep": 0.02}], "speed": None}
    planned = halfplate.sweep(described, tmp_path / "out", dry_run=True)["rows"][0]["planned"]
    assert "keep=0.02 is too small" in planned["error"]
    assert halfplate.sweep(described, tmp_path / "out")["failed"] == ["x"]
    assert "keep=0.02 is too small" in json.loads((tmp_path / "out" / "rows" / "x.json").read_text())["error"]


def test_lists_of_transforms_are_no_rows(described: dict[str, Any]) -> None:
    found = read_sweep(described | {"rows": [{"name": "rotated", "transforms": ["rotate"]}]})
    assert [(row.name, row.recipe and row.recipe.transforms) for row in found.rows] == [("rotated", ("rotate@1",))]
