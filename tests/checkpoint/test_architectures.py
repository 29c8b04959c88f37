"""Rounded, loaded and run with and without kernels: the same numbers, near those of the original model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import halfplate
from causal_models import ARCHITECTURES
from conftest import build_model
from halfplate.checkpoint.write import write_checkpoint
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec, connect, stand_in
from halfplate.integrations.ties import untie
from halfplate.kernels import native
from halfplate.models.chain_check import check_chain
from halfplate.models.conv1d import as_linears
from halfplate.models.experts import linear_experts
from halfplate.models.linears import find_blocks, find_linears, replace_module, shared_linears
from halfplate.models.sources import open_source
from halfplate.models.streamed import StreamedModel
from halfplate.pattern import DENSE
from halfplate.recipe import Recipe
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.statistics import InputStatistics
from halfplate.transforms.conversion import needs_conversion
from tiny_models import build_model as build_tiny

IDS = torch.arange(3, 19)[None]


def folder_of(architecture, tokenizer, path, **more):
    model = build_model(architecture, vocab_size=len(tokenizer), **ARCHITECTURES[architecture][0] | more)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


# The most used ones, of every kind: plain, windows, experts, linear attention, state spaces, shared layers, Conv1D, wrappers.
MOST_USED = (
    "llama mistral qwen2 qwen3 qwen3_moe qwen3_next qwen3_5_text gemma2 gemma3_text gemma4_text phi phi3 smollm3 olmo2 granite mixtral"
    " gpt_oss deepseek_v3 deepseek_v32 glm4_moe hunyuan_v1_moe falcon bloom gpt2 opt mamba jamba zamba2"
)
WRAPPERS = "gemma3 qwen2_5_vl qwen3_vl mistral3 llava"


def rounded(model):
    """Put int8 matrices in the place of the linears of `model`, in place; returns their specifications."""
    method, specs = Recipe(method="rtn", pattern="dense", core_dtype="int8").create_method(), {}
    shared = shared_linears(model, find_blocks(model)[0])
    for linear in find_linears(model)[0]:
        module = model.get_submodule(linear.name)
        specs[linear.name] = spec = WeightSpec(linear.d_out, linear.d_in, DENSE, "int8")
        chain = method.compress(module.weight, InputStatistics(), spec).weight
        replace_module(model, linear.name, CompressedLinear.from_weight(chain, spec, module.bias))
    for name, owner in shared.items():
        specs[name] = replace(specs[owner], same_as=owner)
        replace_module(model, name, stand_in(model.get_submodule(name), specs[name], name))
    connect(model)
    untie(model, specs)
    return specs


@pytest.mark.parametrize(
    ("architecture", "wrapper"),
    [*((kind, False) for kind in MOST_USED.split()), *((kind, True) for kind in WRAPPERS.split())],
)
@torch.no_grad()
def test_layers_kernels_and_torch_agree(architecture, wrapper, tmp_path):
    """A reduced form of benchmarks/architectures.py: the layers run one by one, and a checkpoint loads and computes the same in every way."""
    model = build_tiny(architecture, wrapper)
    expected = model(input_ids=IDS, use_cache=False).logits
    model.save_pretrained(tmp_path / "dense")
    source = open_source(str(tmp_path / "dense"))
    if not needs_conversion(source):
        check_chain(StreamedModel(source), torch.cat([IDS, IDS + 9]))
    as_linears(model)
    linear_experts(model)
    specs = rounded(model)
    write_checkpoint(model, None, tmp_path / "out", specs, {}, torch.float32)
    plain = halfplate.load(tmp_path / "out", kernels=False)
    assert type(plain).__name__ == type(model).__name__
    found = plain(input_ids=IDS, use_cache=False).logits
    # Rounding sends single tokens to other experts or past other keys; a wrong mapping shows at 1 and more.
    assert float((found - expected).norm() / expected.norm()) < 0.2
    if native.available():
        fast = halfplate.load(tmp_path / "out", activations="float")
        assert specs.keys() <= {name for name, module in fast.named_modules() if isinstance(module, PackedLinear)}
        torch.testing.assert_close(
            fast(input_ids=IDS, use_cache=False).logits, found, rtol=1e-3, atol=1e-3 * float(found.std())
        )


@torch.no_grad()
def test_codes_that_the_model_takes_for_its_numbers_are_refused(tmp_path, tiny_tokenizer, monkeypatch):
    """A checkpoint of the time when indexers were compressed: right with kernels, refused without."""
    name = "model.layers.0.self_attn.indexer.weights_proj"
    dense = folder_of("deepseek_v32", tiny_tokenizer, tmp_path / "dense", index_topk=64)
    monkeypatch.setattr("halfplate.models.linears._router_reason", lambda *_: None)
    monkeypatch.setattr("halfplate.planning.making.data_reads", lambda *_: ({}, None))
    recipe = Recipe(method="rtn", pattern="dense", core_dtype="int8", include=("*.weights_proj",))
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    with pytest.raises(HalfplateError, match=rf"{name} is stored as int8, and its weight is read as data by .*Indexer"):
        halfplate.load(tmp_path / "out", kernels=False)
    if native.available():
        model = halfplate.load(tmp_path / "out")
        assert model.get_submodule(name).weight.dtype == torch.float32
        reference = dense(IDS).logits
        assert float((model(IDS).logits - reference).norm() / reference.norm()) < 0.05


@torch.no_grad()
def test_a_model_with_read_linears_is_accelerated_around_them(tiny_model):
    """Dense, too: packed linears answer for their type, and those whose values are read stay what they are."""
    from halfplate.runtime import accelerate, explain, restore

    model = tiny_model("jamba", **ARCHITECTURES["jamba"][0])
    expected = model(IDS).logits
    path = {linear.name: linear for linear in accelerate(model).linears}["model.layers.0.mamba.dt_proj"]
    assert (path.path, path.reason) == ("torch", "its weight is read as data by JambaMambaMixer.forward")
    assert path in explain(model).linears
    assert isinstance(model.model.layers[0].mamba.dt_proj, nn.Linear)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    restore(model)
    assert torch.equal(model(IDS).logits, expected)
