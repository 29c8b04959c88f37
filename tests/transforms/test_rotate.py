"""The rotation: an orthogonal matrix of any size, the same function, and models whose norms cannot be multiplied into linears."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfplate
from conftest import build_model
from halfplate.cli import main
from halfplate.compression.transforming import transformed
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.planning.making import plan_source
from halfplate.recipe import Recipe
from halfplate.telemetry.progress import silent
from halfplate.transforms.rotate import orthogonal

IDS = torch.arange(3, 27).reshape(2, 12)
INT8 = {"method": "rtn", "core_dtype": "int8", "pattern": "dense"}


def saved(tokenizer, folder, architecture="llama", **options):
    model = build_model(architecture, vocab_size=len(tokenizer), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms and biases that a mistake would show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                offset = 0.5 if name.endswith("norm.weight") else 0.0
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + offset)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(str(folder))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 80))
def test_the_matrix_is_orthogonal_and_spreads_every_axis(size):
    matrix = orthogonal(size, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-12


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("mistral", {}),
        ("qwen3", {}),
    ],
)
def test_it_is_the_same_model(tiny_tokenizer, tmp_path, architecture, options):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, **options)
    plan = plan_source(source, Recipe(transforms=["rotate"], **INT8))
    result = transformed(source, plan.transforms, plan.recipe, WorkFolder(tmp_path / "out"), silent)[1]
    with StreamedModel(result).running(held=True) as model, torch.no_grad():
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, load_dense(source).model(IDS).logits, rtol=0, atol=1e-4)
    turned = StreamedModel(result)
    assert all(bool((turned.read(name) == 1).all()) for name in turned.stored if "layernorm" in name)
    assert "lm_head.weight" in turned.stored
    weight = "model.layers.1.self_attn.o_proj.weight"
    assert not torch.allclose(turned.read(weight), StreamedModel(source).read(weight), atol=1e-3)


def test_outliers_cost_less_on_a_grid_from_end_to_end(tiny_tokenizer, tmp_path, capsys):
    model = build_model("llama", vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        for layer in model.model.layers:  # a few inputs with large weights set the scale of their groups
            layer.input_layernorm.weight[:2] = 0.05
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[:, :2] *= 20
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ["--method", "rtn", "--core-dtype", "int4", "--threads", "1", "--json"]
    assert main(["compress", str(tmp_path / "model"), "-o", str(tmp_path / "plain"), *options]) == 0
    plain = json.loads(capsys.readouterr().out)
    rotated = tmp_path / "rotated"
    assert main(["compress", str(tmp_path / "model"), "-o", str(rotated), *options, "--transforms", "rotate"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["check"]["kl"] < plain["check"]["kl"]
    assert json.loads((rotated / "halfplate.json").read_text())["recipe"]["transforms"] == ["rotate@1"]
    with torch.no_grad():
        assert bool(halfplate.load(rotated, kernels=False)(IDS).logits.isfinite().all())


def test_a_tied_head_is_counted_as_a_tensor_of_its_own(tiny_tokenizer, tmp_path):
    saved(tiny_tokenizer, tmp_path / "model", tie_word_embeddings=True)
    plain, rotated = (
        halfplate.plan(tmp_path / "model", transforms=names, **INT8).other_nbytes for names in ([], ["rotate"])
    )
    assert rotated - plain >= len(tiny_tokenizer) * 32


def test_a_model_with_other_norms_is_refused_with_the_name_of_the_norm(tiny_tokenizer, tmp_path):
    saved(tiny_tokenizer, tmp_path / "model", "gemma2")
    with pytest.raises(HalfplateError, match=r"rotate.*multiply model\.layers\.0\.\S*norm of a gemma2 model into"):
        halfplate.plan(tmp_path / "model", transforms=["rotate"], **INT8)
