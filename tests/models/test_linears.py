"""Decoder blocks, their linears, and the reasons for everything else."""

import pytest
import torch
from torch import nn

from halfplate.errors import HalfplateError
from halfplate.models import find_blocks, find_linears, replace_module

LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
PHI = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2")
PHI3 = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
LINEARS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi": PHI,
    "phi3": PHI3,
}


@pytest.mark.parametrize("architecture", LINEARS)
def test_all_linears_of_the_blocks_and_no_others(tiny_model, architecture):
    model = tiny_model(architecture)
    prefix, blocks = find_blocks(model)
    assert prefix == "model.layers"
    assert len(blocks) == model.config.num_hidden_layers
    found, skipped = find_linears(model)
    expected = [f"model.layers.{index}.{name}" for index in range(len(blocks)) for name in LINEARS[architecture]]
    assert sorted(linear.name for linear in found) == sorted(expected)
    assert skipped == []
    assert [linear.block for linear in found] == sorted(linear.block for linear in found)
    for linear in found:
        module = model.get_submodule(linear.name)
        assert tuple(module.weight.shape) == (linear.d_out, linear.d_in)
        assert (module.bias is not None) == linear.bias


def test_the_meta_device_gives_the_same(tiny_model):
    from transformers import AutoModelForCausalLM

    model = tiny_model("qwen2")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert find_linears(empty) == find_linears(model)


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [("opt", "model.decoder.layers"), ("gpt_neox", "gpt_neox.layers"), ("bloom", "transformer.h")],
)
def test_other_architectures(tiny_model, architecture, prefix):
    model = tiny_model(architecture, ffn_dim=64)
    assert find_blocks(model)[0] == prefix
    found, skipped = find_linears(model)
    assert len(found) >= 8
    assert skipped == []


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_experts_and_routers_are_skipped_with_a_reason(tiny_model, architecture):
    model = tiny_model(architecture, num_local_experts=8, num_experts=8, moe_intermediate_size=16)
    found, skipped = find_linears(model)
    reasons = {module.name.rpartition(".")[2]: module.reason for module in skipped}
    assert "8 experts stored in 3-D tensors" in reasons["experts"]
    assert "use a model without experts" in reasons["experts"]
    assert "router of 8 experts" in reasons.get("gate", reasons.get("router"))
    assert any(linear.name.endswith("q_proj") for linear in found)
    named = {module.name for module in skipped} | {linear.name for linear in found}
    prefix, blocks = find_blocks(model)
    for name, parameter in blocks.named_parameters(prefix=prefix):
        assert parameter.ndim < 2 or name.rpartition(".")[0] in named, f"{name} is passed over silently"


def test_a_model_without_blocks_is_refused():
    with pytest.raises(HalfplateError, match="Sequential has no list of decoder layers"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_a_larger_tower_of_as_many_layers_is_not_the_decoder(tiny_model):
    model = tiny_model("llama")
    model.model.image_encoder = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(512, 512) for _ in range(2))})
    assert find_blocks(model)[0] == "model.layers"


def test_include_and_exclude(tiny_model):
    model = tiny_model("llama")
    found, skipped = find_linears(model, include=["*.mlp.*", "*.q_proj"], exclude=["model.layers.0.*"])
    assert [linear.name for linear in found] == [f"model.layers.1.{name}" for name in (LLAMA[0], *LLAMA[4:])]
    reasons = {module.name: module.reason for module in skipped}
    assert reasons["model.layers.0.mlp.up_proj"] == "excluded by exclude='model.layers.0.*'"
    assert reasons["model.layers.1.self_attn.k_proj"] == "not among include=*.mlp.*, *.q_proj"
    assert len(found) + len(skipped) == 14


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"include": ["q_proj"]}, r"include='q_proj' matches none of the 14 modules; did you mean '\*\.q_proj'"),
        ({"exclude": ["*.down_prj"]}, r"exclude='\*\.down_prj' matches none .*'\*\.down_proj'"),
        ({"include": ["model.layers.7.mlp.up_proj"]}, r"did you mean '.*mlp\.up_proj'"),
        ({"include": ["zzz"]}, r"did you mean '\*\.q_proj'"),
        ({"exclude": ["*"]}, "leave none of the 14 linears"),
    ],
)
def test_patterns_that_match_nothing(tiny_model, options, near):
    with pytest.raises(HalfplateError, match=near):
        find_linears(tiny_model("llama"), **options)


def test_replace_module(tiny_model):
    model = tiny_model("llama")
    module = nn.Linear(32, 48, bias=False)
    replace_module(model, "model.layers.1.mlp.up_proj", module)
    assert model.model.layers[1].mlp.up_proj is module
    with pytest.raises(HalfplateError, match=r"no module 'model\.layers\.9"):
        replace_module(model, "model.layers.9.mlp.up_proj", module)
