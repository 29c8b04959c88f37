"""Local folders and Hub ids: what loads, and what is refused with one line."""

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfplate.errors import HalfplateError
from halfplate.models import is_compressed, load_dense, open_source, skeleton

MATRICES = ("qweight", "weight_packed", "up_proj_blocks")  # names of tensors that hold the codes of a matrix


def refused(action, pattern):
    with pytest.raises(HalfplateError, match=pattern) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder):
    """Cut the one weight file into two, as save_pretrained does for large models."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_a_folder_loads_as_it_was_saved(tiny_folder, tiny_model):
    loaded = load_dense(str(tiny_folder))
    expected = tiny_model("llama", vocab_size=320)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    state = loaded.model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert loaded.tokenizer.decode(loaded.tokenizer("A red ball.").input_ids, skip_special_tokens=True) == "A red ball."
    source = loaded.source
    assert (source.kind, source.name, source.path) == ("folder", str(tiny_folder), tiny_folder)
    assert source.nbytes == (tiny_folder / "model.safetensors").stat().st_size
    assert source.other_dtype == torch.float32


def test_shards_and_half_precision(tiny_folder):
    edit_weights(
        tiny_folder, lambda weights: weights.update({name: tensor.bfloat16() for name, tensor in weights.items()})
    )
    whole = load_dense(str(tiny_folder))
    assert whole.source.other_dtype == torch.bfloat16
    assert whole.model.dtype == torch.float32
    shard(tiny_folder)
    sharded = load_dense(str(tiny_folder))
    assert [path.name for path in sharded.source.weight_files] == ["model-1.safetensors", "model-2.safetensors"]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(sharded.model.state_dict()[name], tensor), name


def test_skeleton_has_the_shapes_and_no_values(tiny_folder):
    source = open_source(str(tiny_folder))
    model = skeleton(source)
    loaded = load_dense(str(tiny_folder)).model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in loaded.state_dict().items()
    }


def test_real_model(stories260k):
    loaded = load_dense(str(stories260k))
    ids = torch.tensor([[1]])
    text = loaded.tokenizer.decode(
        loaded.model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True
    )
    assert text.startswith("Once upon a time")


@pytest.mark.parametrize("name", ["/no/such/folder", "nosuchmodel", "a/b/c", "./gone/model"])
def test_what_does_not_exist(name):
    refused(lambda: open_source(name), f"model='{re.escape(name)}' does not exist; expected a local folder")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(
        lambda: open_source("org/name"), r"model='org/name' does not exist here and could not be fetched .*\(no route\)"
    )


def test_a_hub_id_asks_for_safetensors_alone(monkeypatch, tiny_folder):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def fetch(name, **patterns):
        asked.update(patterns)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert open_source("org/name").kind == "hub"
    files = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    files += [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    others = [
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "model.gguf",
        "modeling_x.py",
    ]
    assert sorted(filter_repo_objects(files + others, **asked)) == sorted(files)


def test_a_file_that_is_no_gguf(tiny_folder):
    refused(
        lambda: open_source(str(tiny_folder / "model.safetensors")), "is a file but not a .gguf file; pass the folder"
    )


def test_no_config(tmp_path):
    refused(lambda: open_source(str(tmp_path)), "has no config.json; pass the folder")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(lambda: open_source(str(tmp_path)), "it is an adapter, .*merge it")


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ("[]", "holds a list, expected an object")])
def test_damaged_config(tiny_folder, text, reason):
    (tiny_folder / "config.json").write_text(text)
    refused(lambda: open_source(str(tiny_folder)), reason)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration"), ("llama", "LlamaForSequenceClassification")],
)
def test_models_that_are_not_causal(tmp_path, kind, architecture):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
    refused(
        lambda: open_source(str(tmp_path)), f"is {architecture}, not a causal language model; expected a decoder-only"
    )


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("fp8", "weight_scale_inv"),
        ("gptq", "qweight"),
        ("awq", "qzeros"),
        ("compressed-tensors", "weight_packed"),
        ("bitsandbytes", "weight.absmax"),
        ("mxfp4", "up_proj_blocks"),
        (None, "weight_scale"),
    ],
)
def test_quantised_sources(tiny_folder, method, part):
    name = f"model.layers.0.mlp.up_proj.{part}"
    if method is not None:
        edit_config(tiny_folder, quantization_config={"quant_method": method})
    edit_weights(tiny_folder, lambda weights: weights.update({name: torch.ones(4)}))
    # A matrix of codes of a method that is read says what is wrong with it.
    told = (
        f"{part} cannot be read as {method}"
        if part in MATRICES
        else f"already quantised .*{method or 'unknown'}.*{part}"
    )
    refused(lambda: load_dense(str(tiny_folder)), f"{told}.*pass the fp32, bf16 or fp16 model")


def test_quantised_weights_without_a_word_in_the_config(tiny_folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(tiny_folder, lambda weights: weights.update({name: weights[name].to(torch.float8_e4m3fn)}))
    refused(
        lambda: open_source(str(tiny_folder)), f"already quantised: {name} in model.safetensors is stored as F8_E4M3"
    )


def test_halfplate_checkpoints(tiny_folder):
    assert not is_compressed(tiny_folder)
    edit_config(tiny_folder, quantization_config={"quant_method": "halfplate", "version": 1})
    assert is_compressed(str(tiny_folder))
    refused(lambda: open_source(str(tiny_folder)), "already compressed by Halfplate")
    assert not is_compressed("/no/such/folder")


def test_pickled_weights(tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    refused(
        lambda: load_dense(str(tiny_folder)),
        r"only pickled weights \(pytorch_model\.bin\), .*a pickle can run code; convert",
    )


def test_no_weights(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    refused(lambda: open_source(str(tiny_folder)), "has no weights that can be read; expected model.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_weight_file_cut_short(tiny_folder, kept):
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(lambda: open_source(str(tiny_folder)), "model.safetensors is cut short")


@pytest.mark.parametrize("header", [b"no json at all", b'{"a": 3}', b'{"a": {"dtype": "F32", "data_offsets": "xy"}}'])
def test_a_damaged_header(tiny_folder, header):
    (tiny_folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(lambda: open_source(str(tiny_folder)), "the header of model.safetensors is damaged")


def test_a_missing_shard(tiny_folder):
    shard(tiny_folder)
    (tiny_folder / "model-2.safetensors").unlink()
    refused(lambda: open_source(str(tiny_folder)), r"lacks 1 of its 2 weight files \(model-2\.safetensors\)")


@pytest.mark.parametrize(
    "index",
    ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../other.safetensors"}}', '{"weight_map": {"a": 3}}'],
)
def test_a_damaged_index(tiny_folder, index):
    shard(tiny_folder)
    (tiny_folder / "model.safetensors.index.json").write_text(index)
    refused(lambda: open_source(str(tiny_folder)), "model.safetensors.index.json cannot be read")


def test_code_of_the_model_never_runs(tiny_folder, tmp_path):
    trace = tmp_path / "trace"
    (tiny_folder / "own.py").write_text(f"open({str(trace)!r}, 'w')")
    edit_config(
        tiny_folder, model_type="own_model", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    refused(lambda: open_source(str(tiny_folder)), "needs Python code of its own .*never runs")
    edit_config(tiny_folder, model_type="llama")
    load_dense(str(tiny_folder))
    assert not trace.exists()


def test_an_unknown_model_type(tiny_folder):
    edit_config(tiny_folder, model_type="llama9")
    refused(
        lambda: open_source(str(tiny_folder)), "has model_type 'llama9', which transformers .* does not know; upgrade"
    )


def test_a_config_that_its_class_refuses(tiny_folder):
    edit_config(tiny_folder, hidden_size="wide")
    refused(lambda: open_source(str(tiny_folder)), "config.json cannot be read as 'llama'")


def test_missing_tensors_are_never_random(tiny_folder):
    edit_weights(tiny_folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(lambda: load_dense(str(tiny_folder)), r"lack 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight.*random")


def test_tensors_of_another_shape(tiny_folder):
    edit_config(tiny_folder, intermediate_size=64)
    refused(
        lambda: load_dense(str(tiny_folder)),
        r"down_proj\.weight has shape \(32, 48\) in its file, .* asks for \(32, 64\)",
    )


@pytest.mark.parametrize(("value", "count"), [(float("nan"), "2 NaN and 0 inf"), (float("-inf"), "0 NaN and 2 inf")])
def test_weights_that_are_not_finite(tiny_folder, value, count):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4:6] = value

    edit_weights(tiny_folder, spoil)
    refused(
        lambda: load_dense(str(tiny_folder)), rf"model\.layers\.1\.mlp\.up_proj\.weight holds {count} among 1536 values"
    )


def test_no_tokenizer(tiny_folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tiny_folder / file).unlink()
    refused(lambda: load_dense(str(tiny_folder)), "has no tokenizer that loads")


def test_an_unknown_device(tiny_folder):
    refused(lambda: load_dense(str(tiny_folder), device="gramophone"), "device='gramophone' cannot hold the model")


def test_a_folder_named_like_a_hub_id(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_source("org/name").kind == "folder"


def test_a_model_that_rescales_its_layers_for_fp16_does_not(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("rwkv", rescale_every=1, attention_hidden_size=32)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert source.config.rescale_every == 0
    assert any("rescale_every=1 is set to 0" in note for note in source.notes)
    ids = torch.arange(3, 19)[None]
    found = load_dense(source).model(ids).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-3, atol=1e-3)
