"""Multimodal models: the language model inside is compressed, and everything else is written back as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import halfplate
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.exports.dense import export_dense
from halfplate.formats import CompressedLinear
from halfplate.models.auto import auto_name, language_model
from halfplate.models.linears import find_blocks, find_linears
from halfplate.models.sources import load_dense, open_source
from halfplate.planning import make_plan
from halfplate.recipe import Recipe
from tiny_models import build_model

IDS = torch.arange(3, 19)[None]
INT8 = Recipe(method="rtn", pattern="dense", core_dtype="int8")
PROCESSOR = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, tiny_tokenizer):
    """A tiny Gemma 3 with its vision tower, its processor files and a head that predicts further tokens."""
    folder = tmp_path_factory.mktemp("gemma") / "gemma3"
    model = build_model("gemma3", wrapper=True)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "processor_config.json").write_text('{"image_seq_length": 4}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {"mtp.fc.weight": torch.arange(12.0).view(3, 4)}, weights, {"format": "pt"})
    return folder, model


@pytest.fixture(scope="module")
def compressed(gemma, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "out"
    recipe = Recipe(method="wanda", pattern="2:4", core_dtype="bf16", samples=4, seq_len=16)
    return out, compress(str(gemma[0]), out, recipe, benchmark=False)


def test_the_whole_model_is_written_and_loads_through_its_own_class(gemma, compressed):
    _, model = gemma
    out, summary = compressed
    names = {matrix["name"] for matrix in summary["matrices"]}
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert len(names) == 7 * len(find_blocks(model)[1])
    plain, fast = halfplate.load(out, kernels=False), halfplate.load(out)
    theirs = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    assert {type(one).__name__ for one in (plain, fast, theirs)} == {"Gemma3ForConditionalGeneration"}
    assert {name for name, module in plain.named_modules() if isinstance(module, CompressedLinear)} == names
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        for other in (fast, theirs):
            torch.testing.assert_close(other(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
    for name, tensor in model.state_dict().items():
        if "vision" in name or "projector" in name:
            torch.testing.assert_close(plain.state_dict()[name], tensor)


def test_images_give_the_same_as_in_the_original(gemma, tmp_path):
    folder, model = gemma
    compress(str(folder), tmp_path / "out", INT8, benchmark=False, check=False)
    ids = torch.cat(
        [IDS[:, :4], torch.full((1, model.config.mm_tokens_per_image), model.config.image_token_id), IDS], 1
    )
    size = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == model.config.image_token_id).long()}
    with torch.no_grad():
        expected, found = model(**call).logits, halfplate.load(tmp_path / "out")(**call).logits
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert float((model(input_ids=ids).logits - expected).norm() / expected.norm()) > 0.01


def test_processor_files_and_the_chat_template_are_copied(gemma, compressed):
    out, _ = compressed
    assert json.loads((out / "preprocessor_config.json").read_text()) == PROCESSOR
    assert json.loads((out / "processor_config.json").read_text()) == {"image_seq_length": 4}
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert "AutoModelForMultimodalLM.from_pretrained" in (out / "README.md").read_text()


def test_further_tokens_are_kept_and_named_in_the_plan(gemma, compressed, tmp_path):
    folder, _ = gemma
    out, summary = compressed
    plan = make_plan(str(folder), INT8)
    assert plan.notes == ("kept: mtp.fc.weight, which predict further tokens; they are copied as they are",)
    assert plan.to_json()["notes"] == summary["notes"]
    stored = load_file(out / "model.safetensors")["mtp.fc.weight"]
    assert torch.equal(stored, torch.arange(12.0).view(3, 4))
    assert plan.other_nbytes == make_plan(str(folder), INT8).other_nbytes
    halfplate.inspect(out, verify=True)
    export_dense(str(out), tmp_path / "dense", overwrite=False)
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")["mtp.fc.weight"], stored)
    assert (tmp_path / "dense" / "preprocessor_config.json").is_file()


def test_a_damaged_processor_file_is_refused_and_nothing_is_written(gemma, tmp_path):
    import shutil

    folder = shutil.copytree(gemma[0], tmp_path / "model")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(HalfplateError, match=r"preprocessor_config.json is not valid JSON") as refused:
        compress(str(folder), tmp_path / "out", INT8, benchmark=False, check=False)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_text_model_of_the_same_type_is_not_taken_for_the_wrapper(tmp_path, tiny_tokenizer):
    model = build_model("qwen3_5_text")
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert auto_name(open_source(str(tmp_path)).config) == "AutoModelForCausalLM"
    assert type(load_dense(str(tmp_path)).model) is type(model)
    assert isinstance(model, AutoModelForCausalLM.from_config(model.config).__class__)


def test_a_vision_tower_with_more_layers_is_not_taken_for_the_decoder():
    model = build_model("llava", wrapper=True)
    assert language_model(model)[0] == "model.language_model"
    tower = model.model.vision_tower
    tower.more = nn.ModuleList(nn.Linear(64, 256) for _ in find_blocks(model)[1])
    assert find_blocks(model)[0] == "model.language_model.layers"
    assert all(linear.name.startswith("model.language_model.layers.") for linear in find_linears(model)[0])


def test_a_model_that_needs_an_image_is_refused(tmp_path, tiny_tokenizer):
    model = build_model("blip-2", wrapper=True)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(HalfplateError, match=r"Blip2ForCond.* does not run on a text alone \(it needs pixel_values\)"):
        open_source(str(tmp_path))
