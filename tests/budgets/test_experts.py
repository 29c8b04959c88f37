"""Budgets, sizes and built-in recipes on mixtures: a format for each expert, within the size that was asked for."""

import json

import pytest
import torch

import halfplate
from causal_models import MLA, MOE
from conftest import build_model
from halfplate.compression.compress import compress
from halfplate.formats import CompressedLinear
from halfplate.models.experts import experts_of
from halfplate.recipe import Recipe

WIDE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}
MIXTURES = {
    "qwen3_moe": MOE | WIDE,
    "mixtral": MOE | {"hidden_size": 64, "intermediate_size": 96},
    "gpt_oss": MOE | WIDE | {"intermediate_size": 64},
    "deepseek_v3": MOE | MLA | {"hidden_size": 64, "moe_intermediate_size": 32, "n_shared_experts": 1},
}
IDS = torch.arange(3, 35)[None]
QUICK = {"samples": 4, "seq_len": 24, "threads": 1}


def saved(kind, tokenizer, folder):
    model = build_model(kind, **MIXTURES[kind], vocab_size=len(tokenizer)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def formats(out):
    """The formats of all experts, by name."""
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    return {name: (entry["core_dtype"], entry.get("group")) for name, entry in modules.items() if ".experts." in name}


def check_loads(out):
    model = halfplate.load(out, kernels=False)
    assert all(
        isinstance(expert.up_proj, CompressedLinear) for one in experts_of(model).values() for expert in one.experts
    )
    assert bool(model(IDS).logits.isfinite().all())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "qwen3_moe")) for kind in MIXTURES]
)
@torch.no_grad()
def test_a_budget_chooses_a_format_for_each_expert(kind, tiny_tokenizer, tmp_path):
    saved(kind, tiny_tokenizer, tmp_path / "dense")
    recipe = Recipe.of(method="rtn", budget=0.4, core_dtype="int8", **QUICK)
    summary = compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    assert 0.9 * 0.4 < summary["nbytes"] / summary["dense_nbytes"] <= 0.4
    found = formats(tmp_path / "out")
    one_layer = {name: core for name, core in found.items() if "layers.1." in name and name.endswith("up_proj")}
    assert len(one_layer) == 8
    assert len(set(one_layer.values())) > 1
    check_loads(tmp_path / "out")


@pytest.mark.parametrize("target", ["halfplate", pytest.param("gguf", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_size_is_kept_on_a_mixture(target, tiny_tokenizer, tmp_path):
    asked = int(0.6 * saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense"))
    recipe = Recipe.of(method="rtn", fit=asked, target=target, **QUICK)
    summary = compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    assert 0.9 * asked < summary["fit"]["spent_bytes"] <= asked
    found = formats(tmp_path / "out")
    assert len(set(found.values())) > 1
    if target == "gguf":
        # A file holds the experts of a layer in one tensor.
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert len({core for name, core in found.items() if "layers.1." in name and name.endswith(leaf)}) == 1
    check_loads(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_the_built_in_recipe_compresses_every_expert(kind, tiny_tokenizer, tmp_path):
    saved(kind, tiny_tokenizer, tmp_path / "dense")
    summary = compress(str(tmp_path / "dense"), tmp_path / "out", Recipe.of(**QUICK), benchmark=False)
    assert summary["check"]["kl"] < 0.1
    check_loads(tmp_path / "out")
