"""Every tensor of the files and every entry of the config is used, or named, or refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.models import load_dense, open_source
from halfplate.models.fit import names_in_model
from halfplate.models.reading import reading
from halfplate.planning import make_plan
from halfplate.recipe import Recipe

RECIPE = Recipe(method="magnitude")
BIAS = "model.layers.0.self_attn.q_proj.bias"


def refused(action, pattern):
    with pytest.raises(HalfplateError, match=pattern) as caught:
        action()
    assert "\n" not in str(caught.value)


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add(folder, name, tensor):
    edit_weights(folder, lambda weights: weights.update({name: tensor}))


def output_config(folder, tmp_path):
    compress(str(folder), tmp_path / "out", RECIPE)
    return json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_bias_that_the_architecture_does_not_take(tiny_folder):
    add(tiny_folder, BIAS, torch.ones(32))
    refused(
        lambda: open_source(str(tiny_folder)),
        rf"hold {BIAS}, which LlamaForCausalLM .* does not have; .*attention_bias",
    )


def test_with_a_config_that_takes_biases_they_are_missed_or_used(tiny_folder):
    add(tiny_folder, BIAS, torch.ones(32))
    edit_config(tiny_folder, attention_bias=True)
    refused(lambda: open_source(str(tiny_folder)), "lack 7 tensors")


def test_a_bias_of_zeros_is_named_and_left_out(tiny_folder):
    add(tiny_folder, BIAS, torch.zeros(32))
    assert open_source(str(tiny_folder)).notes == (f"left out: {BIAS}, biases of zeros, which change nothing",)


def test_more_blocks_than_the_config_names(tiny_folder):
    edit_config(tiny_folder, num_hidden_layers=1)
    refused(lambda: make_plan(str(tiny_folder), RECIPE), "hold 2 decoder layers, config.json says num_hidden_layers=1")


def test_fewer_blocks_than_the_config_names(tiny_folder):
    edit_config(tiny_folder, num_hidden_layers=3)
    refused(lambda: make_plan(str(tiny_folder), RECIPE), r"lack 9 tensors .*model\.layers\.2")


def test_other_tensors_of_no_use(tiny_folder):
    for number in range(5):
        add(tiny_folder, f"adapter.{number}.weight", torch.ones(2))
    refused(
        lambda: open_source(str(tiny_folder)),
        r"hold adapter\.0\.weight, adapter\.1\.weight, adapter\.2\.weight and 2 more",
    )


def test_parts_of_an_adapter_that_was_not_merged(tiny_folder):
    for name in ("lora_A.weight", "lora_B.default.weight"):
        add(tiny_folder, f"model.layers.0.self_attn.q_proj.{name}", torch.ones(2, 2))
    refused(lambda: open_source(str(tiny_folder)), r"hold .*lora_A\.weight, .*belong to an adapter; .*merge_and_unload")


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "which the model computes itself"),
        ("model.layers.0.attn.bias", (1, 1, 8, 8), "which the model computes itself"),
        ("mtp.layers.0.mlp.up_proj.weight", (4, 4), "which predict further tokens"),
    ],
)
def test_known_leftovers_are_named(tiny_folder, tmp_path, name, shape, why):
    add(tiny_folder, name, torch.ones(shape))
    (note,) = make_plan(str(tiny_folder), RECIPE).notes
    assert note.startswith(f"{'kept' if 'further' in why else 'left out'}: {name}, {why}")
    assert compress(str(tiny_folder), tmp_path / "out", RECIPE)["notes"] == [note]
    assert json.loads((tmp_path / "out" / "halfplate.json").read_text())["notes"] == [note]


def test_blocks_that_predict_further_tokens_are_named(tiny_folder):
    edit_config(tiny_folder, num_nextn_predict_layers=1)
    add(tiny_folder, "model.layers.2.mlp.up_proj.weight", torch.ones(48, 32))
    assert "predict further tokens" in open_source(str(tiny_folder)).notes[0]
    add(tiny_folder, "model.layers.3.mlp.up_proj.weight", torch.ones(48, 32))
    refused(lambda: open_source(str(tiny_folder)), "hold 4 decoder layers, .*num_hidden_layers=2")


def test_a_prefix_of_a_training_tool_is_named(tiny_folder):
    def prefix(weights):
        for name in list(weights):
            weights[f"base_model.model.{name}"] = weights.pop(name)

    edit_weights(tiny_folder, prefix)
    refused(lambda: open_source(str(tiny_folder)), r"put 'base_model\.model\.' before every name; .*merge_and_unload")


def test_a_name_that_a_rule_for_older_files_spoils(tiny_model, monkeypatch):
    """As transformers does: where the renamed key is unknown and the plain one is not, the plain one holds."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rule = WeightRenaming(r"mlp\.up_proj", "mlp.other")
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    name = "model.layers.0.mlp.up_proj.weight"
    assert names_in_model(tiny_model("llama"), [name]) == {name: (name, None)}
    assert names_in_model(tiny_model("llama"), ["x.mlp.up_proj"]) == {"x.mlp.up_proj": ("x.mlp.other", None)}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_leftovers_of_quantisation_beside_plain_weights(tiny_folder, tmp_path, key):
    plain = load_dense(str(tiny_folder)).model.state_dict()
    edit_config(tiny_folder, **{key: {"quant_method": "gptq", "bits": 4}})
    with pytest.warns(UserWarning, match="says that the weights are quantised .'gptq'.*hold plain weights"):
        loaded = load_dense(str(tiny_folder)).model.state_dict()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    written = output_config(tiny_folder, tmp_path)
    assert written["quantization_config"]["quant_method"] == "halfplate"
    assert "compression_config" not in written


def test_plain_weights_that_run_quantised_are_refused(tiny_folder):
    edit_config(tiny_folder, quantization_config={"quant_method": "bitnet"})
    refused(
        lambda: open_source(str(tiny_folder)),
        "already quantised .*'bitnet', which rounds weights and activations whenever",
    )


@pytest.mark.parametrize(
    ("entries", "note"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' is left out"),
        ({"_attn_implementation": "flash_attention_3"}, "attn_implementation='flash_attention_3' is left out"),
        ({"experts_implementation": "fused"}, "experts_implementation='fused' is left out"),
        ({"output_attentions": True}, "output_attentions=True is left out"),
        ({"output_hidden_states": True}, "output_hidden_states=True is left out"),
        ({"return_dict": False}, "return_dict=False is left out"),
        ({"pad_token_id": 4000}, "pad_token_id=4000 is outside the vocabulary of 320 tokens"),
        ({"pad_token_id": -1}, "pad_token_id=-1 is outside the vocabulary of 320 tokens"),
    ],
)
def test_entries_that_say_how_to_run_elsewhere(tiny_folder, tmp_path, entries, note):
    ids = torch.tensor([[1, 5, 7]])
    expected = load_dense(str(tiny_folder)).model(ids).logits
    edit_config(tiny_folder, **entries)
    with pytest.warns(UserWarning, match=note):
        assert torch.equal(load_dense(str(tiny_folder)).model(ids).logits, expected)
    written = output_config(tiny_folder, tmp_path)
    for key, value in entries.items():
        assert written.get(key) != value


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"hidden_act": "foo"}, "hidden_act='foo' is unknown to transformers"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "type='su' is unknown to transformers"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor=-2.0, expected a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta=0, expected a number above 0"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8', expected an object"),
        ({"dtype": "float17"}, "float17"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 3}, "k_proj.weight has shape"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers=1099511627776 in its config.json, expected at most 10000"),
        ({"hidden_size": None}, "config.json"),
        ({"rms_norm_eps": "small"}, "config.json"),
        ({"architectures": 7}, "config.json"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_configs_that_cannot_be_built_are_refused_at_open(tiny_folder, entries, words):
    edit_config(tiny_folder, **entries)
    refused(lambda: open_source(str(tiny_folder)), words)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_generation_config(tiny_folder, text):
    (tiny_folder / "generation_config.json").write_text(text)
    refused(
        lambda: open_source(str(tiny_folder)), r"generation_config\.json cannot be read .*remove it to use the defaults"
    )


def test_a_million_modules_are_not_built_to_be_counted(tiny_model, tiny_tokenizer, tmp_path):
    folder = tmp_path / "model"
    tiny_model("jamba", num_experts=4).save_pretrained(folder)
    edit_config(folder, num_experts=2**19)
    refused(lambda: open_source(str(folder)), "describes|configuration")


def test_failures_of_libraries_in_one_line():
    def fail(error):
        with reading("m", "config.json is wrong", "correct it", {"a": {"b": "su"}}):
            raise error

    refused(
        lambda: fail(ValueError("two\nlines of a message")),
        r"^model='m': config.json is wrong \(two lines of a message\); correct it$",
    )
    refused(lambda: fail(KeyError("su")), r"\(a\.b='su' is unknown to transformers\)")
    refused(lambda: fail(KeyError("other")), r"\(KeyError: 'other'\)")
    refused(lambda: fail(RecursionError()), r"\(RecursionError\)")
    refused(lambda: fail(ValueError("x" * 1000)), "x{600}…")
    refused(lambda: fail(HalfplateError("as it is")), "^as it is$")
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
