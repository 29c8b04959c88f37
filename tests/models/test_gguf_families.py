"""Families of GGUF files against logits that llama.cpp computed with our exports (`tests/stress/gguf_check.py --store`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf as writing
import gguf_cases as cases
import numpy as np
import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.models import gguf
from halfplate.models.gguf_families.table import FAMILIES
from halfplate.models.gguf_header import check_header
from halfplate.models.gguf_writer import write_gguf

STORED = json.loads((Path(__file__).parent / "data" / "gguf_logits.json").read_text())
# llama.cpp looks GELU up in a table of half precision; all else differs in the order of sums.
WITH_GELU = ("gemma", "starcoder2", "phi2")


CASES = {case.name: case for case in cases.CASES}


def bound(name: str) -> float:
    return 1e-3 if name.startswith(WITH_GELU) else 2e-5


def written(name: str, path: Path, half: bool = False) -> Any:
    """The model of a case, written to `path`."""
    model = cases.build(CASES[name])
    write_gguf(model, None, path, half=half)
    return model


def read(path: Path) -> Any:
    model, report = gguf.load_model(path, path.name, gguf.read_config(path, path.name))
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model


def test_every_family_is_checked() -> None:
    assert {case.model_type for case in cases.CASES} == {family.model_type for family in FAMILIES}
    assert STORED.keys() == CASES.keys()
    assert len({family.architecture for family in FAMILIES}) >= 12


@pytest.mark.parametrize("name", CASES)
def test_model_file_and_reading_are_what_llama_cpp_computes(name: str, tmp_path: Path) -> None:
    path, stored = tmp_path / "model.gguf", STORED[name]
    model = written(name, path)
    assert cases.digest(path) == stored["digest"]  # the file that llama.cpp was given
    theirs = np.array(stored["logits"])
    scale = np.abs(theirs).max()
    again = read(path)
    for one in (model, again):
        assert np.abs(cases.logits(one)[list(cases.KEPT)] - theirs).max() < bound(name) * scale
    ours, tensors = model.state_dict(), again.state_dict()
    assert ours.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, ours[key], rtol=0, atol=1e-6)  # Gemma's norms are stored plus one


@pytest.mark.parametrize("name", ["llama, llama3", "gemma3", "mixtral", "phi3, longrope, short", "glm4"])
def test_half_precision_rounds_and_changes_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = written(name, path, half=True)
    again = read(path).state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-3, atol=1e-6)


def test_llama_cpp_itself(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from gguf_check import check

    for case in cases.CASES[::5]:
        row = check(case, tmp_path)
        for way in ("import", "export"):
            assert row[f"{way}_f32"] < bound(case.name), case.name
            assert row[f"{way}_f16"] < 0.02, case.name
        np.testing.assert_allclose(row["logits"], STORED[case.name]["logits"], rtol=1e-3, atol=1e-3)


def test_scalings_keep_their_names(tmp_path: Path) -> None:
    """What Halfplate and others know how to run (Llama 3's) stays that, and is not turned into factors."""
    for name, kind in (("linear", "linear"), ("yarn", "yarn"), ("llama3", "llama3"), ("longrope, long", "longrope")):
        model = written(f"llama, {name}", tmp_path / "model.gguf")
        config: Any = gguf.read_config(tmp_path / "model.gguf", "model.gguf")
        assert config.rope_parameters["rope_type"] == kind
        for key, value in model.config.rope_parameters.items():
            assert config.rope_parameters[key] == pytest.approx(value), key


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama's|llama computes with hidden_act='silu', the model has 'gelu'"),
        ("llama", cases._rope("dynamic", factor=2.0), "llama has no rotary scaling of type 'dynamic'"),
        ("mistral", {"sliding_window": 8}, "sliding_window=None, the model has 8"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types="),
        ("qwen2", {"head_dim": 32}, "qwen2 has heads of 16 values, the model of 32"),
        ("qwen2", cases.LLAMA3, "qwen2 has no rotary scaling of type 'llama3'"),
        ("qwen3", {"attention_bias": True}, "has no tensor for model.layers.0|attention_bias=False"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob=True, the model has False"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping=30.0, the model has None"),
        ("gemma3", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar=32, the model has 16"),
        ("phi3", {"sliding_window": 16}, "sliding_window=None, the model has 16"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no_rope_layers="),
        ("stablelm", {"qk_layernorm": True}, "has no tensor for model.layers.0.self_attn.q_layernorm"),
        ("command-r", {"use_qk_norm": True}, "has no tensor for model.layers.0.self_attn.q_norm"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads=4, the model has 2"),
        ("phi2", {"hidden_act": "gelu"}, "hidden_act='gelu_new', the model has 'gelu'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_not_written(
    name: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model = cases.build(cases.Case(name, case.model_type, {**case.settings, **settings}))
    with pytest.raises(HalfplateError, match=words) as caught:
        write_gguf(model, None, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_model_that_is_not_in_the_table(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match="models of type 'opt' are not written, only mixtral, llama"):
        write_gguf(tiny_model("opt", ffn_dim=48, word_embed_proj_dim=32), None, tmp_path / "no")


def changed(source: Path, path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """A copy of the F32 file `source` with other keys and tensors; None takes one away."""
    contents = check_header(source)
    values = {
        name: np.fromfile(source, np.float32, entry.nbytes // 4, offset=entry.start).reshape(entry.shape)
        for name, entry in contents.entries.items()
    }
    metadata = {**contents.metadata, **keys}
    writer = writing.GGUFWriter(path, metadata.pop("general.architecture"))
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key, value)
    for name, array in {**values, **tensors}.items():
        if array is not None:
            writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "keys", "tensors", "words"),
    [
        (
            "llama",
            {"llama.attention.clamp_kqv": 8.0},
            {},
            r"the key llama\.attention\.clamp_kqv \(8\.0\) has no known meaning",
        ),
        ("llama", {"llama.attention.sliding_window": 8}, {}, r"the key llama\.attention\.sliding_window"),
        ("llama", {"xielu.beta": 0.5}, {}, r"the key xielu\.beta"),
        ("llama", {"llama.attention.causal": False}, {}, "attention.causal is False, and only causal"),
        ("llama", {"llama.attention.value_length": 8}, {}, "16 values in keys and 8 in values"),
        ("llama", {"llama.rope.dimension_count": 8}, {}, "rope.dimension_count is 8, heads have 16"),
        ("llama", {"llama.rope.scaling.type": "su"}, {}, "rope.scaling.type is 'su', expected none, linear"),
        (
            "llama, yarn",
            {"llama.rope.scaling.yarn_beta_fast": 8.0},
            {},
            "yarn_beta_fast is 8.0, and llama.cpp computes with 32",
        ),
        ("llama", {"llama.rope.scaling.attn_factor": 1.5}, {}, "attn_factor is 1.5 without a scaling"),
        (
            "llama",
            {"llama.rope.freq_base": 0.0},
            {},
            r"llama\.rope\.freq_base holds 0\.0, expected a finite number above 0",
        ),
        ("llama", {"llama.rope.scaling.factor": -2.0}, {}, r"rope\.scaling\.factor holds -2\.0"),
        ("llama", {"llama.rope.scaling.attn_factor": -1.5}, {}, r"rope\.scaling\.attn_factor holds -1\.5"),
        ("llama", {}, {"rope_freqs.weight": np.zeros(8)}, r"rope_freqs\.weight holds 0\.0"),
        ("llama", {}, {"rope_freqs.weight": np.full(8, np.nan)}, r"rope_freqs\.weight holds nan"),
        ("llama", {"llama.vocab_size": 60}, {}, "vocab_size is 60, and token_embd.weight has 64 rows"),
        ("llama", {"llama.attention.head_count_kv": [2, 1]}, {}, r"head_count_kv is '\[2, 1\]', expected one int"),
        ("llama", {"llama.context_length": None}, {}, r"the key llama\.context_length is missing"),
        ("llama", {"llama.block_count": 1_000_000}, {}, "num_hidden_layers is 1000000, expected 1 to"),
        ("llama", {}, {"blk.0.attn_q.scale": np.ones(1)}, r"the tensor blk\.0\.attn_q\.scale is not part of"),
        ("llama", {}, {"blk.2.attn_norm.weight": np.ones(64)}, r"the tensor blk\.2\.attn_norm\.weight is not part of"),
        ("qwen2", {}, {"rope_freqs.weight": np.ones(8)}, r"the tensor rope_freqs\.weight|longrope"),
        ("qwen3", {}, {"blk.0.attn_q.bias": np.ones(128)}, r"the tensor blk\.0\.attn_q\.bias is not part of"),
        ("granite", {"granite.rope.scaling.finetuned": False}, {}, "llama.cpp does not rotate such a model"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True, False]}, {}, "has 2 entries, expected 7"),
        (
            "cohere2",
            {"cohere2.attention.sliding_window": None},
            {},
            r"the key cohere2\.attention\.sliding_window is missing",
        ),
        (
            "llama",
            {"general.architecture": "gpt2"},
            {},
            "architecture 'gpt2', which Halfplate does not read; it reads llama, qwen2",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(
    name: str, keys: dict[str, Any], tensors: dict[str, Any], words: str, tmp_path: Path
) -> None:
    written(name, tmp_path / "source.gguf")
    path = changed(tmp_path / "source.gguf", tmp_path / "model.gguf", keys, tensors)
    with pytest.raises(HalfplateError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    written("llama", tmp_path / "source.gguf")
    path = changed(tmp_path / "source.gguf", tmp_path / "model.gguf", {}, {"blk.1.ffn_up.weight": None})
    _, report = gguf.load_model(path, "model.gguf", gguf.read_config(path, "model.gguf"))
    assert report["missing_keys"] == ["model.layers.1.mlp.up_proj.weight"]


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    """Head sizes, key and value heads, base and a scaling under its old name, empty counts, one number for each layer."""
    model = cases.build(
        cases.Case("", "llama", {"head_dim": 16, "num_key_value_heads": 4, **cases._rope("linear", factor=4.0)})
    )
    write_gguf(model, None, tmp_path / "source.gguf", half=False)
    names = "attention.key_length attention.value_length attention.head_count_kv rope.freq_base rope.dimension_count vocab_size rope.scaling.type rope.scaling.factor"
    keys: dict[str, Any] = {f"llama.{name}": None for name in names.split()}
    keys |= {"llama.rope.scale_linear": 4.0, "llama.expert_count": 0, "llama.expert_used_count": 0}
    keys |= {"llama.feed_forward_length": [96, 96], "general.name": "tiny", "quantize.imatrix.file": "x.dat"}
    path = changed(tmp_path / "source.gguf", tmp_path / "model.gguf", keys, {})
    assert np.array_equal(cases.logits(read(path)), cases.logits(model))


def test_a_bias_that_is_missing_is_zero(tmp_path: Path) -> None:
    model = written("llama, biases", tmp_path / "source.gguf")
    gone = {f"blk.{block}.attn_output.bias": None for block in range(2)}
    path = changed(tmp_path / "source.gguf", tmp_path / "model.gguf", {}, gone)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    assert np.array_equal(cases.logits(read(path)), cases.logits(model))


def test_factors_of_no_known_scaling(tmp_path: Path) -> None:
    """Any divisors of the frequencies are kept, and one of all ones is no scaling."""
    model = written("llama", tmp_path / "source.gguf")
    path = changed(tmp_path / "source.gguf", tmp_path / "model.gguf", {}, {"rope_freqs.weight": np.ones(8)})
    assert read(path).config.rope_parameters["rope_type"] == "default"
    factors = np.linspace(1, 3, 8)
    path = changed(tmp_path / "source.gguf", tmp_path / "model.gguf", {}, {"rope_freqs.weight": factors})
    again = read(path)
    rope = model.model.rotary_emb
    rope.inv_freq.copy_(rope.inv_freq / torch.from_numpy(factors))
    np.testing.assert_allclose(cases.logits(again), cases.logits(model), rtol=1e-4, atol=1e-4)


def test_a_window_that_llama_cpp_does_not_apply_is_read(tmp_path: Path) -> None:
    written("phi3", tmp_path / "source.gguf")
    path = changed(tmp_path / "source.gguf", tmp_path / "model.gguf", {"phi3.attention.sliding_window": 16}, {})
    config: Any = gguf.read_config(path, "model.gguf")
    assert config.sliding_window == 16


def test_token_ids_of_the_file(tmp_path: Path) -> None:
    written("llama", tmp_path / "source.gguf")
    keys = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.padding_token_id": 4000}
    config: Any = gguf.read_config(changed(tmp_path / "source.gguf", tmp_path / "model.gguf", keys, {}), "model.gguf")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 6, None)
