"""Compressing whole models by methods without a core."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfplate
from conftest import FACTORS
from halfplate.checkpoint.config import read_specs
from halfplate.errors import HalfplateError
from halfplate.recipe import Recipe

IDS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(3))
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 32, "threads": 1}


@pytest.mark.parametrize("method", FACTORS)
@torch.no_grad()
def test_transformers_loads_what_halfplate_writes(compressed_once: Callable[[Recipe], Path], method: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = compressed_once(Recipe(method=method, method_options=FACTORS[method], **QUICK))
    ours = halfplate.load(folder)(IDS).logits
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    found = halfplate.inspect(folder, verify=True)
    assert all(
        matrix["pattern"] == "none" and matrix["nbytes"] < matrix["dense_nbytes"] for matrix in found["matrices"]
    )
    assert found["without_kernel"].endswith(
        "no kernel for a matrix without a core, nearest setting with one: a method with a core, e.g. --method armor"
    )


def bytes_of(folder: Path, of: set[str] | None = None) -> int:
    """Bytes of the layers' matrices; those that are not in `of` but in the model count in full."""
    return sum(spec.nbytes for name, spec in read_specs(folder).items() if of is None or name in of)


def test_welore_gives_every_matrix_its_own_rank_within_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    options = QUICK | {"method": "svd", "method_options": {"share": 0.8, "weighting": "none"}}
    halfplate.compress(tiny_folder, tmp_path / "uniform", **options)
    out = tmp_path / "welore"
    made = halfplate.compress(tiny_folder, out, ratios="welore", **options)
    uniform, chosen = read_specs(tmp_path / "uniform"), read_specs(out)
    full = sum(spec.dense_nbytes for name, spec in uniform.items() if name not in chosen)
    assert bytes_of(out) + full <= bytes_of(tmp_path / "uniform")
    assert len({spec.rank / min(spec.d_out, spec.d_in) for spec in chosen.values()}) > 2
    halfplate.load(out)(IDS)
    again = halfplate.compress(
        tiny_folder, out, ratios="welore", resume=True, **options
    )  # it is recognised as finished
    assert again["nbytes"] == made["nbytes"]


def test_a_budget_chooses_the_share_of_every_matrix(tiny_folder: Path, tmp_path: Path) -> None:
    made = halfplate.compress(tiny_folder, tmp_path / "out", method="rocket", budget=0.6, **QUICK)
    assert made["nbytes"] <= 0.6 * made["dense_nbytes"]
    assert len({spec.parts for spec in read_specs(tmp_path / "out").values()}) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svd", "method_options": {"share": 0.01}}, "q_proj: share=0.01 .* leaves nothing: rank 1 takes"),
        ({"method": "svd", "method_options": {"rank": 30}}, "q_proj: rank=30 of a matrix .* takes .* choose less"),
        ({"method": "svd", "method_options": {"rank": 999}}, "rank=999 of a matrix .* must be 1 to"),
        ({"method": "bitstack", "method_options": {"share": 0.05}}, "leaves nothing: one level with rank 1 takes"),
        ({"method": "rocket", "method_options": {"share": 0.01}}, "leaves nothing: one atom takes"),
        ({"method": "monarch", "method_options": {"blocks": 7}}, "blocks=7 must divide both sides .*; use 2 or 4"),
        (
            {"method": "gqsa", "method_options": {"kept": 0.001}},
            "q_proj: kept=0.001 of the .* groups .* leaves nothing",
        ),
        ({"method": "gqsa", "method_options": {"width": 5}}, "width=5 must be even"),
        ({"method": "svd", "pattern": "2:4"}, "pattern='2:4' is not supported by method 'svd', which makes no core"),
        ({"method": "wanda", "pattern": "none"}, "pattern='none' is not supported by method 'wanda'"),
        ({"method": "svd", "core_dtype": "int4"}, "core_dtype='int4' is the type of a core, and method 'svd'"),
        ({"method": "svd", "wrapper_dtype": "int8"}, "wrapper_dtype='int8' is not a type for a low-rank part"),
        ({"method": "svd", "block_size": 8}, "block_size=8 needs a method with wrappers"),
        ({"method": "wanda", "ratios": "welore"}, "ratios='welore' does not fit method 'wanda'"),
        ({"method": "svd", "ratios": "owl"}, "ratios='owl' does not fit method 'svd'"),
        ({"method": "svd", "ratios": "welore", "budget": 0.5}, "ratios='welore' and a budget both choose"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tiny_folder: Path, options: Any, message: str) -> None:
    with pytest.raises(HalfplateError, match=message) as refused:
        halfplate.plan(tiny_folder, seq_len=32, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_bitstack_beats_round_to_nearest_between_two_and_three_bits(stories260k: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"samples": 16, "seq_len": 256, "threads": 1, "check": False}
    rounded = halfplate.compress(stories260k, tmp_path / "rtn", method="rtn", core_dtype="int2", group_size=32, **quick)
    share = rounded["nbytes"] / rounded["dense_nbytes"]
    stacked = halfplate.compress(stories260k, tmp_path / "stack", method="bitstack", budget=share, **quick)
    assert stacked["nbytes"] <= rounded["nbytes"]
    kl = {name: halfplate.evaluate(tmp_path / name, against=stories260k, windows=8)["kl"] for name in ("rtn", "stack")}
    assert kl["stack"] < kl["rtn"]
