"""Mixtures of experts from the command's function to the loaded checkpoint."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfplate
from architectures import MOE
from conftest import build_model
from halfplate.compression.compress import compress
from halfplate.formats import CompressedLinear
from halfplate.recipe import Recipe

MIXTURES = {
    "qwen3_moe": MOE | {"head_dim": 8},
    "gpt_oss": MOE | {"head_dim": 8},
}
IDS = torch.arange(3, 35)[None]
INT8 = Recipe(method="rtn", pattern="dense", core_dtype="int8", threads=1)


def saved(architecture, tokenizer, folder, **more):
    model = build_model(architecture, **({"vocab_size": len(tokenizer)} | MIXTURES[architecture] | more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.no_grad()
def test_a_checkpoint_loads_saves_and_becomes_the_original_again(architecture, tiny_tokenizer, tmp_path):
    dense = saved(architecture, tiny_tokenizer, tmp_path / "dense")
    compress(str(tmp_path / "dense"), tmp_path / "out", INT8, benchmark=False)
    plain, fast = (halfplate.load(tmp_path / "out", kernels=kernels) for kernels in (False, True))
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    compressed = [name for name, module in plain.named_modules() if isinstance(module, CompressedLinear)]
    assert sum(".experts." in name for name in compressed) == 3 * 8 * sum(
        hasattr(layer.mlp, "experts") for layer in dense.model.layers
    )
    expected = plain(IDS).logits
    for other in (fast, by_transformers):
        torch.testing.assert_close(other(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    fast.save_pretrained(tmp_path / "saved")
    assert torch.equal(halfplate.load(tmp_path / "saved", kernels=False)(IDS).logits, expected)
    halfplate.export(tmp_path / "out", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert exported.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(exported(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_excluded_experts_stay_as_they_are(tiny_tokenizer, tmp_path):
    dense = saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    recipe = Recipe(method="magnitude", exclude=("*.experts.*",), threads=1)
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    loaded = halfplate.load(tmp_path / "out", kernels=False).dequantize()
    for name, tensor in dense.state_dict().items():
        if ".experts." in name:
            assert torch.equal(loaded.state_dict()[name], tensor)
