"""benchmarks/rivals.py: every row is one that a sweep takes, and takes no more bytes than its size; its tables hold every row once."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import halfplate
from halfplate.sweeps.description import read_sweep
from structured_models import saved

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    module = __import__("rivals")
    for name in set(sys.modules) - before:
        if (ROOT / "benchmarks" / f"{name}.py").exists():
            monkeypatch.delitem(sys.modules, name)
    return module


def test_every_row_fits_its_size(rivals, tiny_tokenizer, tmp_path):
    name = saved(tiny_tokenizer, tmp_path / "model").name
    described, places = rivals.sweep_of("stories260K", name)
    rows = {row.name: row for row in read_sweep(described | {"eval": {}}).rows}
    sizes = rivals.Sizes(name)
    placed = {row for at in places.values() for row in at.values()}
    assert rows.keys() - placed == {"original", *(row for row in rows if row.endswith(", rotated"))}
    whole = rivals.StructureGraph.of(rivals.open_source(name)).parameters()
    for share in rivals.SHARES:
        keep = rows[places["tyr"][share]].recipe.keep
        # Linears count 2 bytes a weight; the rest of this model, which stays, is fp32.
        assert keep * whole == pytest.approx(share * sizes.linears / 2 + whole - sizes.linears / 2)
    for system in (
        "gptq, unpruned",
        "armor, unpruned",
        "armor, 2:4",
        "sparsegpt, 2:4",
        "wanda, of 16",
        "rocket",
        "gqsa",
    ):
        for share in (0.25,):
            if share in places[system]:
                plan = halfplate.plan(name, replace(rows[places[system][share]].recipe, calibration="self", seq_len=16))
                assert plan.nbytes + plan.other_nbytes <= sizes.limit(share), (system, share)


def test_a_table_holds_a_row_where_it_fits(rivals):
    import rivals_tables

    def row(name, nbytes, kl, **made):
        recipe = {"embedding_dtype": "int8"} if name == "whole" else {}
        recipe |= {"pattern": "2:4", "core_dtype": "int4", "group_size": 32, "block_size": 16, "keep": 0.5}
        return {
            "name": name,
            "status": "done",
            "weight_nbytes": nbytes,
            "linear_share": 0.2,
            "evaluation": {"kl": kl, "top1_agreement": 0.5},
            "speed": {"decode_speedup": 2.0},
            "compression": {"seconds": {"total": 3.2}, "continued": False},
            "made": {"recipe": recipe, **made},
        }

    failed = {"name": "depth, 0.5", "status": "failed", "why": "keep is too small"}
    rows = [row("a, 0.5", 480, 0.5), row("whole", 700, 0.01), row("narrow, 0.5", 470, 0.4, pruned=True), failed]
    rows.append(row("a, rotated", 480, 0.25))
    result = {"rows": rows, "original_weight_nbytes": 1000}
    places = {
        "a": {0.5: "a, 0.5"},
        "whole": {0.25: "whole"},
        "narrow": {0.5: "narrow, 0.5"},
        "depth": {0.5: "depth, 0.5"},
    }
    file = {
        "name": "llama.cpp Q8_0",
        "nbytes": 490,
        "contents": "Q8_0",
        "kl": 0.02,
        "top1_agreement": 0.9,
        "speedup": 3.0,
    }
    told = rivals_tables.rendered(result, places, [file], {0.75: 750.0, 0.5: 500.0, 0.25: 250.0})
    large, small = told.split("**0.5 of the linears")
    assert "| whole | 2:4, int4, groups of 32, blocks of 16 | 0.0007 | 0.700 | 0.01 | 50.0% | 2.00 | 3 |" in large
    order = [small.index(word) for word in ("| llama.cpp Q8_0 |", "| narrow | keeps 0.500", "| a | 2:4")]
    assert order == sorted(order)
    assert "| a | 0.200 | 0.5 | 0.25 | 0.50 |" in small
    assert "- depth, 0.5: keep is too small" in small
