"""A dense model compressed by `from_pretrained` is what `compress` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

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
    with pytest.raises(HalfplateError, match="has no recipe for compressing the original model"):
        AutoModelForCausalLM.from_pretrained(
            tiny_folder, quantization_config=halfplate.HalfplateConfig(modules={}, version=1)
        )
    with pytest.raises(HalfplateError, match="key 'metod' is unknown; did you mean 'method'"):
        AutoModelForCausalLM.from_pretrained(
            tiny_folder, quantization_config=halfplate.HalfplateConfig(recipe={"metod": "wanda"})
        )
    with pytest.raises(HalfplateError, match="HalfplateConfig needs a recipe"):
        halfplate.HalfplateConfig()
    with pytest.raises(HalfplateError, match="LlamaModel is not a language model; load it with AutoModelForCausalLM"):
        AutoModel.from_pretrained(tiny_folder, quantization_config=halfplate.HalfplateConfig(recipe=RECIPE))


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("method: wanda\nsamples: 4\nseq_len: 32\n")
    assert halfplate.HalfplateConfig(recipe=tmp_path / "mine.yaml").recipe == RECIPE
    assert halfplate.HalfplateConfig(recipe="quick-look").recipe == Recipe.from_yaml("quick-look")


def test_what_is_no_language_model_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    halfplate.compress(str(tiny_folder), tmp_path / "out", RECIPE)
    with pytest.raises(HalfplateError, match="LlamaModel does not have; load the checkpoint with AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path / "out")
    with pytest.raises(HalfplateError, match="not a LlamaForSequenceClassification, load it with AutoModelForCausalLM"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
