"""What is written is what is loaded, through every door."""

from __future__ import annotations

import filecmp
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import halfplate
from halfplate.checkpoint.config import SENTENCE
from halfplate.checkpoint.read import load, load_tokenizer
from halfplate.checkpoint.write import round_others, write_checkpoint
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.pattern import DENSE, Pattern
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.version import package_version

Logits = Callable[[Any], Tensor]
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="device_map needs accelerate"
)


def stored_dtypes(model: Any) -> dict[str, torch.dtype]:
    return {
        f"{name}.{part}": module.stored()[part].dtype
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear) or (isinstance(module, PackedLinear) and module.dense_dtype is None)
        for part in module.spec.layout()
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3"])
def test_loaded_and_in_memory_models_compute_the_same_bits(written: Any, logits_of: Logits, architecture: str) -> None:
    one = written(architecture)
    for loaded in (halfplate.load(one.folder), AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float32)):
        assert torch.equal(logits_of(loaded), one.logits())
        assert stored_dtypes(loaded) == stored_dtypes(one.model)
        assert not loaded.training


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3"])
def test_the_kernels_compute_what_the_torch_path_does(written: Any, architecture: str) -> None:
    one = written(architecture)
    ids = torch.arange(3, 23)[None]
    expected = one.model(ids).logits
    torch.testing.assert_close(load(one.folder)(ids).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load(one.folder, kernels=False)(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("other_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_tied_and_untied(written: Any, logits_of: Logits, other_dtype: torch.dtype, tied: bool) -> None:
    one = written(other_dtype=other_dtype, max_shard_nbytes=20_000, tie_word_embeddings=tied)
    index = json.loads((one.folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert ("lm_head.weight" in index["weight_map"]) != tied
    sizes = [file.stat().st_size for file in one.folder.glob("*.safetensors")]
    assert index["metadata"]["total_size"] < sum(sizes) < index["metadata"]["total_size"] + 4096 * len(sizes)
    loaded = load(one.folder)
    assert torch.equal(logits_of(loaded), one.logits())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_tied_embeddings_of_more_numbers_than_the_cores(written: Any, logits_of: Logits) -> None:
    one = written(variety=[{"pattern": DENSE, "core_dtype": "int2"}], tie_word_embeddings=True)
    assert torch.equal(logits_of(load(one.folder)), one.logits())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_type_asked_for_governs_activations_and_never_stored_values(
    written: Any, logits_of: Logits, dtype: torch.dtype
) -> None:
    one = written("qwen2")
    for loaded in (load(one.folder, dtype=dtype), AutoModelForCausalLM.from_pretrained(one.folder, dtype=dtype)):
        assert stored_dtypes(loaded) == stored_dtypes(one.model)
        others = {
            name: tensor.dtype for name, tensor in loaded.state_dict().items() if name not in stored_dtypes(loaded)
        }
        assert set(others.values()) == {dtype}
        assert logits_of(loaded).dtype == dtype
        torch.testing.assert_close(logits_of(loaded).float(), one.logits(), rtol=0.1, atol=0.1)


def test_without_a_type_the_configured_one_is_taken(written: Any) -> None:
    one = written(other_dtype=torch.float16)
    assert json.loads((one.folder / "config.json").read_text())["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(one.folder).dtype == torch.float16


@needs_accelerate
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(written: Any, logits_of: Logits, device_map: Any) -> None:
    one = written(max_shard_nbytes=20_000)
    loaded = AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float32, device_map=device_map)
    assert torch.equal(logits_of(loaded), one.logits())


@needs_accelerate
def test_blocks_offloaded_to_disk(written: Any, logits_of: Logits, tmp_path: Path) -> None:
    one = written()
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    loaded = AutoModelForCausalLM.from_pretrained(
        one.folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits_of(loaded), one.logits())


@pytest.mark.parametrize("core_dtype", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(5, 16), DENSE], ids=str)
def test_codes_and_scales_come_back_exactly(written: Any, logits_of: Logits, core_dtype: str, pattern: Pattern) -> None:
    options = {"core_dtype": core_dtype, "pattern": pattern, "out_block": 10, "in_block": 16, "wrapper_dtype": "int8"}
    one = written("qwen2", variety=[options], max_shard_nbytes=20_000)
    for loaded in (load(one.folder), load(one.folder, dtype=torch.bfloat16)):
        for name, spec in one.specs.items():
            stored, expected = loaded.get_submodule(name).stored(), one.model.get_submodule(name).stored()
            assert stored.keys() == spec.layout().keys() | ({"bias"} & expected.keys())
            assert all(torch.equal(stored[part], expected[part]) for part in spec.layout())
            assert {part: (tuple(stored[part].shape), stored[part].dtype) for part in spec.layout()} == spec.layout()
    assert torch.equal(logits_of(load(one.folder, kernels=False)), one.logits())


def test_rounding_changes_no_types_and_no_compressed_values(written: Any) -> None:
    one = written(other_dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    round_others(one.model, torch.bfloat16)
    matrices = stored_dtypes(one.model)
    for name, tensor in one.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name] if name in matrices else before[name].bfloat16().float())


def test_the_same_input_gives_the_same_bytes(written: Any, tmp_path: Path) -> None:
    one = written(max_shard_nbytes=20_000)
    one.write(tmp_path / "again", max_shard_nbytes=20_000)
    files = sorted(path.name for path in one.folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert filecmp.cmpfiles(one.folder, tmp_path / "again", files, shallow=False) == (files, [], [])


def test_save_pretrained_of_a_loaded_model_still_loads(written: Any, logits_of: Logits, tmp_path: Path) -> None:
    one = written()
    again = tmp_path / "again"
    load(one.folder).save_pretrained(again, max_shard_size="20KB")
    loaded = load(again)
    assert torch.equal(logits_of(loaded), one.logits())
    assert stored_dtypes(loaded) == stored_dtypes(one.model)


def test_the_callers_config_survives_loading(written: Any, logits_of: Logits) -> None:
    from transformers import AutoConfig

    one = written()
    config = AutoConfig.from_pretrained(one.folder)
    for _ in range(2):
        loaded = AutoModelForCausalLM.from_pretrained(one.folder, config=config, dtype=torch.float32)
        assert torch.equal(logits_of(loaded), one.logits())
    assert config.transformers_weights == SENTENCE


def test_the_folder_is_complete(written: Any) -> None:
    one = written()
    config = json.loads((one.folder / "config.json").read_text())
    assert config["transformers_weights"] == SENTENCE
    assert config["quantization_config"] == {
        "quant_method": "halfplate",
        "version": 1,
        "modules": {name: spec.to_json() for name, spec in one.specs.items()},
        "needs": {f"quantizer {name}": f"halfplate {package_version()}" for name in ("affine3k", "affine4")},
    }
    assert "dtype" in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    record = json.loads((one.folder / "halfplate.json").read_text())
    assert record["format_version"] == 1
    assert record["recipe"] == {"method": "magnitude"}
    assert set(record["versions"]) == {"halfplate", "safetensors", "torch", "transformers"}
    assert len(record["tensors"]["model.norm.weight"]) == 64
    text = "One day a small bird"
    assert load_tokenizer(one.folder)(text)["input_ids"] == one.tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(one.folder)(text)["input_ids"] == one.tokenizer(text)["input_ids"]
    assert GenerationConfig.from_pretrained(one.folder).eos_token_id == 2
    (one.folder.parent / "usual").touch()
    assert {file.stat().st_mode for file in one.folder.iterdir()} == {(one.folder.parent / "usual").stat().st_mode}


def test_a_loaded_model_generates(written: Any) -> None:
    one = written()
    ids = load(one.folder).generate(torch.tensor([[1, 5, 7]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, one.model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=4, do_sample=False))


def test_gradients_flow_through_a_loaded_model(written: Any) -> None:
    loaded = load(written().folder, kernels=False)
    loaded(torch.tensor([[1, 5, 7]])).logits.square().sum().backward()
    module = loaded.get_submodule("model.layers.0.self_attn.q_proj")
    assert bool(module.weight.grad.abs().sum() > 0)
    assert bool(module.weight_in_blocks.grad.abs().sum() > 0)


def test_a_model_that_is_only_partly_compressed(
    written: Any, logits_of: Logits, tiny_model: Callable[..., Any], by_hand: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    dense = {
        name: model.get_submodule(name) for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj")
    }
    specs = by_hand(model)
    for name, linear in dense.items():
        model.set_submodule(name, linear)
        del specs[name]
    write_checkpoint(model, None, tmp_path / "part", specs, {}, torch.bfloat16)
    assert torch.equal(logits_of(load(tmp_path / "part")), logits_of(model))


def test_stories260k(stories260k: Path, by_hand: Any, logits_of: Logits, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    options = {"out_block": 16, "in_block": 16}
    specs = by_hand(model, [options])
    assert any("weight_in_tail" in spec.layout() for spec in specs.values())
    write_checkpoint(model, AutoTokenizer.from_pretrained(stories260k), tmp_path / "out", specs, {}, torch.float32)
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(model))


def test_writing_what_the_specs_do_not_say_is_refused(written: Any, tmp_path: Path) -> None:
    one = written()
    name = "model.layers.0.mlp.up_proj"
    for specs, complaint in (
        ({key: spec for key, spec in one.specs.items() if key != name}, "is compressed in the model"),
        (one.specs | {"lm_head": WeightSpec(8, 8)}, "lm_head is not compressed in the model"),
        (one.specs | {name: WeightSpec(8, 8)}, f"{name} is compressed as"),
    ):
        with pytest.raises(HalfplateError, match=complaint):
            write_checkpoint(one.model, None, tmp_path / "no", specs, {}, torch.bfloat16)
    one.model.get_submodule(name).weight = torch.nn.Parameter(one.model.get_submodule(name).weight.double())
    with pytest.raises(HalfplateError, match=rf"{name}\.weight is torch\.float64"):
        one.write(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_values_that_are_not_finite_are_never_written(written: Any, tmp_path: Path) -> None:
    one = written()
    one.model.get_submodule("model.norm").weight.fill_(1e6)
    one.other_dtype = torch.float16
    with pytest.raises(HalfplateError, match=r"model\.norm\.weight holds values that are not finite in torch\.float16"):
        one.write(tmp_path / "no")
    assert not (tmp_path / "no").exists()
