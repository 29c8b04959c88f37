"""What the config says of tied embeddings against what the files hold: every verb gives the logits of the files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfplate
from halfplate import runtime
from halfplate.checkpoint.read import load
from halfplate.errors import HalfplateError
from halfplate.exports import export
from halfplate.models import load_dense, open_source
from halfplate.planning import make_plan
from halfplate.recipe import Recipe
from halfplate.recovery.job import recover
from halfplate.recovery.settings import Recovery

IDS = torch.arange(3, 27).reshape(2, 12)
ROUNDED = Recipe(method="rtn", pattern="dense", core_dtype="int8")


def near(logits, expected):
    """Equal but for the rounding of cores: the embedding in the place of the head would make them differ entirely."""
    return (logits - expected).norm() < 0.05 * expected.norm()


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
    return Path(halfplate.compress(str(apart), tmp_path / "out", ROUNDED, benchmark=False)["out"])


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
    plan = make_plan(str(apart), ROUNDED)
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
        assert near(model(IDS).logits, expected)
        runtime.restore(model)
        assert near(model(IDS).logits, expected)
        assert near(model.dequantize()(IDS).logits, expected)


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
        assert near(load(tmp_path / "again")(IDS).logits, expected)
        assert near(model.dequantize()(IDS).logits, expected)
        shutil.rmtree(tmp_path / "again")


@torch.no_grad()
def test_exported_dense(apart, compressed, tmp_path):
    export(compressed, tmp_path / "dense")
    export(str(apart), tmp_path / "converted")
    for folder in ("dense", "converted"):
        assert not says_tied(tmp_path / folder)
        assert near(load_dense(str(tmp_path / folder)).model(IDS).logits, logits_of_files(apart))


@pytest.mark.slow
@torch.no_grad()
def test_exported_as_gguf(apart, compressed, tmp_path):
    for number, model in enumerate((apart, compressed)):
        export(model, tmp_path / f"{number}.gguf", "gguf")
        loaded = load_dense(str(tmp_path / f"{number}.gguf")).model
        # Matrices are F16 there.
        assert near(loaded(IDS).logits, logits_of_files(apart))
        weights = load_file(apart / "model.safetensors")
        assert torch.allclose(loaded.lm_head.weight, weights["lm_head.weight"], atol=1e-3)


@torch.no_grad()
def test_compressed_while_loading(apart):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(apart, quantization_config=halfplate.HalfplateConfig(recipe=ROUNDED))
    assert near(model(IDS).logits, logits_of_files(apart))
    assert not model.config.tie_word_embeddings
    assert near(model.dequantize()(IDS).logits, logits_of_files(apart))


@pytest.mark.slow
def test_recovered(apart, compressed, tmp_path):
    out = tmp_path / "recovered"
    recover(compressed, str(apart), out, Recovery(tokens=16, samples=2, batch=1, seq_len=16, learning_rate=1e-6))
    assert not says_tied(out)
    with torch.no_grad():
        assert near(load(out)(IDS).logits, logits_of_files(apart))


@torch.no_grad()
def test_a_model_that_holds_its_head_alone(tiny_folder, tmp_path):
    """Saved under the other of two names that are tied."""

    def head_alone(weights):
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    change(tiny_folder, head_alone, tie_word_embeddings=True)
    loaded = load_dense(str(tiny_folder)).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = loaded(IDS).logits
    halfplate.compress(str(tiny_folder), tmp_path / "out", ROUNDED, benchmark=False)
    assert near(load(tmp_path / "out")(IDS).logits, expected)
    assert not open_source(str(tiny_folder)).notes


def test_equal_values_stay_tied(tiny_folder):
    change(
        tiny_folder,
        lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}),
        tie_word_embeddings=True,
    )
    source = open_source(str(tiny_folder))
    assert source.config.tie_word_embeddings
    assert not source.notes


def test_an_untied_config_without_a_head_is_refused(tiny_folder):
    change(tiny_folder, lambda weights: weights.pop("lm_head.weight"), tie_word_embeddings=False)
    with pytest.raises(
        HalfplateError, match=r"lack lm_head\.weight, and config.json says tie_word_embeddings=false; set it to true"
    ):
        open_source(str(tiny_folder))
