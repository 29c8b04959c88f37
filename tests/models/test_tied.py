"""What the config says of tied embeddings against what the files hold: every verb gives the logits of the files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfplate
from halfplate import runtime
from halfplate.checkpoint.export import export_dense
from halfplate.checkpoint.read import load
from halfplate.errors import HalfplateError
from halfplate.execution.convert import convert, export_gguf
from halfplate.models import load_dense, open_source
from halfplate.planning import make_plan
from halfplate.recipe import Recipe

IDS = torch.arange(3, 27).reshape(2, 12)
# With everything stored as it is, the logits of a result are those of its source.
EXACT = Recipe(method="magnitude", pattern="dense", core_dtype="fp32")


def change(folder, change_weights, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    weights = load_file(folder / "model.safetensors")
    change_weights(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def says_tied(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@torch.no_grad()
def logits_of_files(folder):
    """The plain model with each tensor of the file under its own name, nothing tied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model(IDS).logits


@pytest.fixture
def apart(tiny_folder):
    """A folder whose config ties what its files hold with different values."""
    change(tiny_folder, lambda weights: None, tie_word_embeddings=True)
    return tiny_folder


@pytest.fixture
def compressed(apart, tmp_path):
    return Path(halfplate.compress(str(apart), tmp_path / "out", EXACT, benchmark=False)["out"])


def test_transformers_does_not_tie_them_either(apart):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(apart)(IDS).logits, logits_of_files(apart))


@torch.no_grad()
def test_loaded_dense(apart):
    with pytest.warns(UserWarning, match="tie_word_embeddings is taken as false"):
        loaded = load_dense(str(apart))
    assert torch.equal(loaded.model(IDS).logits, logits_of_files(apart))
    assert not loaded.model.config.tie_word_embeddings
    plan = make_plan(str(apart), EXACT)
    assert any("lm_head.weight and model.embed_tokens.weight with different values" in note for note in plan.notes)


@torch.no_grad()
def test_accelerated_and_restored(apart):
    from transformers import AutoModelForCausalLM

    # As the user loads it: the config still says that they are tied.
    model = AutoModelForCausalLM.from_pretrained(apart).eval()
    runtime.accelerate(model)
    runtime.restore(model)
    assert torch.equal(model(IDS).logits, logits_of_files(apart))


@torch.no_grad()
def test_compressed_restored_and_multiplied_out(apart, compressed):
    expected = logits_of_files(apart)
    assert not says_tied(compressed)
    for kernels in (True, False):
        model = load(compressed, kernels=kernels)
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
        runtime.restore(model)
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
        assert torch.allclose(model.dequantize()(IDS).logits, expected, atol=1e-4)


@torch.no_grad()
def test_a_checkpoint_whose_config_ties_them(apart, compressed, tmp_path):
    """As Halfplate wrote it before, or as somebody has edited it."""
    from transformers import AutoModelForCausalLM

    change(compressed, lambda weights: None, tie_word_embeddings=True)
    expected = logits_of_files(apart)
    for model in (load(compressed), AutoModelForCausalLM.from_pretrained(compressed)):
        assert not model.config.tie_word_embeddings
        model.save_pretrained(tmp_path / "again")
        assert not says_tied(tmp_path / "again")
        assert torch.allclose(load(tmp_path / "again")(IDS).logits, expected, atol=1e-4)
        assert torch.allclose(model.dequantize()(IDS).logits, expected, atol=1e-4)
        shutil.rmtree(tmp_path / "again")


@torch.no_grad()
def test_exported_dense(apart, compressed, tmp_path):
    export_dense(compressed, tmp_path / "dense")
    convert(str(apart), tmp_path / "converted")
    for folder in ("dense", "converted"):
        assert not says_tied(tmp_path / folder)
        assert torch.allclose(load_dense(str(tmp_path / folder)).model(IDS).logits, logits_of_files(apart), atol=1e-4)


@torch.no_grad()
def test_exported_as_gguf(apart, compressed, tmp_path):
    for number, model in enumerate((apart, compressed)):
        export_gguf(model, tmp_path / f"{number}.gguf")
        loaded = load_dense(str(tmp_path / f"{number}.gguf")).model
        # Matrices are F16 there.
        assert torch.allclose(loaded(IDS).logits, logits_of_files(apart), atol=0.05)
        weights = load_file(apart / "model.safetensors")
        assert torch.allclose(loaded.lm_head.weight, weights["lm_head.weight"], atol=1e-3)


@torch.no_grad()
def test_compressed_while_loading(apart):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(apart, quantization_config=halfplate.HalfplateConfig(recipe=EXACT))
    assert torch.allclose(model(IDS).logits, logits_of_files(apart), atol=1e-4)
    assert not model.config.tie_word_embeddings
    assert torch.allclose(model.dequantize()(IDS).logits, logits_of_files(apart), atol=1e-4)


@torch.no_grad()
def test_recovered(apart, compressed, tmp_path):
    out = tmp_path / "recovered"
    halfplate.recover(compressed, out, str(apart), steps=1, batch=1, seq_len=16, lr=1e-9)
    assert not says_tied(out)
    assert torch.allclose(load(out)(IDS).logits, logits_of_files(apart), atol=1e-3)


@torch.no_grad()
def test_a_model_that_holds_its_head_alone(tiny_folder, tmp_path):
    """Saved under the other of two names that are tied."""

    def head_alone(weights):
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    change(tiny_folder, head_alone, tie_word_embeddings=True)
    loaded = load_dense(str(tiny_folder)).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = loaded(IDS).logits
    halfplate.compress(str(tiny_folder), tmp_path / "out", EXACT, benchmark=False)
    assert torch.allclose(load(tmp_path / "out")(IDS).logits, expected, atol=1e-4)
    assert not open_source(str(tiny_folder)).notes


def test_equal_values_stay_tied(tiny_folder):
    change(tiny_folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}), tie_word_embeddings=True)
    source = open_source(str(tiny_folder))
    assert source.config.tie_word_embeddings
    assert not source.notes


def test_an_untied_config_without_a_head_is_refused(tiny_folder):
    change(tiny_folder, lambda weights: weights.pop("lm_head.weight"), tie_word_embeddings=False)
    with pytest.raises(HalfplateError, match=r"lack lm_head\.weight, and config.json says tie_word_embeddings=false; set it to true"):
        open_source(str(tiny_folder))
