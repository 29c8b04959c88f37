"""Compressed, loaded and run with and without kernels: the same numbers, near those of the dense model."""

import pytest
import torch
from torch import nn

import halfplate
from architectures import ARCHITECTURES
from conftest import build_model
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear
from halfplate.kernels import native
from halfplate.models.experts import linear_experts
from halfplate.models.linears import find_linears
from halfplate.recipe import Recipe
from halfplate.runtime.backends.cpu import PackedLinear

IDS = torch.arange(3, 19)[None]


def folder_of(architecture, tokenizer, path, **more):
    model = build_model(architecture, vocab_size=len(tokenizer), **ARCHITECTURES[architecture][0] | more)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("pattern", "core_dtype"), [("dense", "int8"), ("2:4", "int8")])
@torch.no_grad()
def test_kernels_and_torch_agree(architecture, pattern, core_dtype, tmp_path, tiny_tokenizer):
    dense = folder_of(architecture, tiny_tokenizer, tmp_path / "dense")
    compress(
        str(tmp_path / "dense"),
        tmp_path / "out",
        Recipe(method="rtn" if pattern == "dense" else "magnitude", pattern=pattern, core_dtype=core_dtype),
        benchmark=False,
    )
    plain, fast = (halfplate.load(tmp_path / "out", kernels=kernels) for kernels in (False, True))
    named = {linear.name for linear in find_linears(linear_experts(dense))[0]}
    assert {name for name, module in plain.named_modules() if isinstance(module, CompressedLinear)} == named
    assert named <= {name for name, module in fast.named_modules() if isinstance(module, PackedLinear)}
    expected, logits = plain(IDS).logits, fast(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    if pattern == "dense":
        reference = dense(IDS).logits
        # Rounding sends single tokens to other experts or past other keys; a wrong mapping shows at 1 and more.
        assert float((expected - reference).norm() / reference.norm()) < 0.2


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
