"""GPT-2's Conv1D as a linear: compressed, left out, loaded, written back."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import halfplate
from halfplate.compression.compress import compress
from halfplate.exports.dense import export_dense
from halfplate.formats import CompressedLinear
from halfplate.models.conv1d import TransposedLinear, as_conv1d, as_linears
from halfplate.recipe import Recipe
from tiny_models import build_model

IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    model = build_model("gpt2")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder, model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_there_and_back(gpt2):
    _, model = gpt2
    expected, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = as_linears(model)
    assert len(names) == 4 * model.config.n_layer
    assert all(type(model.get_submodule(name)) is TransposedLinear for name in names)
    torch.testing.assert_close(logits(model), expected)
    as_conv1d(model, names)
    assert all(type(model.get_submodule(name)) is Conv1D for name in names)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_compressed_left_out_and_exported(gpt2, tmp_path):
    folder, model = gpt2
    recipe = Recipe(method="wanda", pattern="2:4", core_dtype="bf16", samples=4, seq_len=16, exclude=("*.mlp.c_proj",))
    compress(str(folder), tmp_path / "out", recipe, benchmark=False)
    plain, fast = halfplate.load(tmp_path / "out", kernels=False), halfplate.load(tmp_path / "out")
    found = {name for name, module in plain.named_modules() if isinstance(module, CompressedLinear)}
    assert {name.rpartition(".")[2] for name in found} == {"c_attn", "c_proj", "c_fc"}
    left = plain.transformer.h[1].mlp.c_proj.weight
    assert torch.equal(left.T, model.transformer.h[1].mlp.c_proj.weight)
    weight = plain.transformer.h[0].attn.c_attn.matrix.dense()
    assert int((weight.view(len(weight), -1, 4) != 0).sum(-1).max()) == 2
    kept = weight != 0
    torch.testing.assert_close(weight[kept], model.transformer.h[0].attn.c_attn.weight.T[kept], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(logits(fast), logits(plain), rtol=1e-3, atol=1e-3)
    export_dense(str(tmp_path / "out"), tmp_path / "dense", overwrite=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert type(exported.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(logits(exported), logits(plain), rtol=1e-4, atol=1e-4)


def test_compressed_while_it_is_loaded(gpt2, tmp_path):
    folder, _ = gpt2
    recipe = Recipe(method="rtn", pattern="dense", core_dtype="int8")
    config = halfplate.HalfplateConfig(recipe=recipe, runtime={"activations": "float"})
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    compress(str(folder), tmp_path / "out", recipe, benchmark=False, check=False)
    torch.testing.assert_close(
        logits(loaded), logits(halfplate.load(tmp_path / "out", kernels=False)), rtol=1e-3, atol=1e-3
    )
    loaded.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        logits(halfplate.load(tmp_path / "saved", activations="float")), logits(loaded), rtol=1e-3, atol=1e-3
    )
