"""A dense model compressed by `from_pretrained` is what `compress` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfplate
from halfplate.checkpoint.read import inspect_checkpoint
from halfplate.errors import HalfplateError
from halfplate.recipe import Recipe

RECIPE = Recipe(method="wanda", samples=4, seq_len=32)
IDS = torch.tensor([[1, 5, 7, 11]])


def test_it_equals_a_compressed_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    halfplate.compress(str(tiny_folder), tmp_path / "out", RECIPE)
    expected = halfplate.load(tmp_path / "out")
    config = halfplate.HalfplateConfig(recipe=RECIPE)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.float32)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    found = inspect_checkpoint(tmp_path / "saved", verify=True)
    assert found["matrices"] == inspect_checkpoint(tmp_path / "out")["matrices"]
    assert torch.equal(halfplate.load(tmp_path / "saved")(IDS).logits, expected(IDS).logits)


def test_the_type_asked_for_is_kept(tiny_folder: Path) -> None:
    config = halfplate.HalfplateConfig(recipe={"method": "magnitude"})
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


def test_what_cannot_work_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match="recipe and modules are both given"):
        halfplate.HalfplateConfig(modules={}, recipe=RECIPE)
    with pytest.raises(HalfplateError, match="has no recipe to compress a dense model by"):
        AutoModelForCausalLM.from_pretrained(
            tiny_folder, quantization_config=halfplate.HalfplateConfig(modules={}, version=1)
        )
    with pytest.raises(HalfplateError, match="key 'metod' is unknown; did you mean 'method'"):
        AutoModelForCausalLM.from_pretrained(
            tiny_folder, quantization_config=halfplate.HalfplateConfig(recipe={"metod": "wanda"})
        )
