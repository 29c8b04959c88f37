"""Mixtures of experts from the command's function to the loaded checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfplate
import tiny_models
from causal_models import MOE
from conftest import build_model
from halfplate.calibration import calibration_tokens
from halfplate.compression.compress import compress
from halfplate.formats import CompressedLinear
from halfplate.methods.solving import solve_matrices
from halfplate.recipe import Recipe

MIXTURES = {
    "qwen3_moe": MOE | {"head_dim": 8},
    "gpt_oss": MOE | {"head_dim": 8},
}
IDS = torch.arange(3, 35)[None]
INT8 = Recipe(method="rtn", pattern="dense", core_dtype="int8", threads=1)


def saved(architecture, tokenizer, folder, **more):
    model = build_model(architecture, **({"vocab_size": len(tokenizer)} | MIXTURES[architecture] | more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.no_grad()
def test_a_checkpoint_loads_saves_and_becomes_the_original_again(architecture, tiny_tokenizer, tmp_path):
    dense = saved(architecture, tiny_tokenizer, tmp_path / "dense")
    compress(str(tmp_path / "dense"), tmp_path / "out", INT8, benchmark=False)
    plain, fast = (halfplate.load(tmp_path / "out", kernels=kernels) for kernels in (False, True))
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    compressed = [name for name, module in plain.named_modules() if isinstance(module, CompressedLinear)]
    assert sum(".experts." in name for name in compressed) == 3 * 8 * sum(
        hasattr(layer.mlp, "experts") for layer in dense.model.layers
    )
    expected = plain(IDS).logits
    for other in (fast, by_transformers):
        torch.testing.assert_close(other(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    fast.save_pretrained(tmp_path / "saved")
    assert torch.equal(halfplate.load(tmp_path / "saved", kernels=False)(IDS).logits, expected)
    halfplate.export(tmp_path / "out", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert exported.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(exported(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_excluded_experts_stay_as_they_are(tiny_tokenizer, tmp_path):
    dense = saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    recipe = Recipe(method="magnitude", exclude=("*.experts.*",), threads=1)
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    loaded = halfplate.load(tmp_path / "out", kernels=False).dequantize()
    for name, tensor in dense.state_dict().items():
        if ".experts." in name:
            assert torch.equal(loaded.state_dict()[name], tensor)


TEXT = Recipe(method="wanda", pattern="2:4", samples=9, seq_len=24, threads=1)


def record_of(folder):
    return json.loads((folder / "halfplate.json").read_text())


@pytest.mark.parametrize(("method", "core"), [("wanda", "bf16"), ("sparsegpt", "int4"), ("armor", "bf16")])
@torch.no_grad()
def test_experts_that_no_token_reaches_are_solved_from_all_tokens(method, core, tiny_tokenizer, tmp_path):
    dense = saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    for layer in dense.model.layers:
        layer.mlp.gate.weight.zero_()  # equal scores: the first two experts of eight get all tokens
    dense.save_pretrained(tmp_path / "dense")
    options = {"method_options": {"iterations": 2}} if method == "armor" else {}
    recipe = Recipe(method=method, core_dtype=core, samples=4, seq_len=24, threads=1, **options)
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    matrices = record_of(tmp_path / "out")["matrices"]
    tokens = {name: matrix["tokens"] for name, matrix in matrices.items() if ".experts." in name}
    assert len(tokens) == 2 * 8 * 3
    assert sorted(set(tokens.values())) == [0, 96]
    assert sum(tokens.values()) == 2 * 3 * 2 * 96
    assert all(0 <= matrices[name]["relative_error"] < 1 for name in tokens)
    assert bool(halfplate.load(tmp_path / "out")(IDS).logits.isfinite().all())


def statistics_by_hand(folder, name, ids):
    """The diagonal of an expert's blended second moments in the original model, with loops over the tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    place, number, leaf = name.rsplit(".", 2)
    seen = []
    hook = model.get_submodule(place).register_forward_pre_hook(lambda module, args: seen.append(args))
    for batch in ids.split(8):
        model(batch)
    hook.remove()
    experts, routed, everything = model.get_submodule(place), [], []
    half = experts.gate_up_proj.shape[1] // 2
    for hidden, chosen, _ in seen:
        for token, its in zip(hidden, chosen, strict=True):
            x = token
            if leaf == "down_proj":
                both = experts.gate_up_proj[int(number)] @ token
                x = torch.nn.functional.silu(both[:half]) * both[half:]
            everything.append(x)
            if int(number) in its.tolist():
                routed.append(x)
    width, own = everything[0].numel(), [x.square() for x in routed]
    mean = sum(x.square() for x in everything) / len(everything)
    return (sum(own) + width * mean) / (len(own) + width), len(own)


@torch.no_grad()
def test_the_statistics_of_an_expert_are_those_of_its_tokens_and_of_all(tiny_tokenizer, tmp_path, monkeypatch):
    saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    seen, ids = {}, []

    def solve(names, weights, method, statistics, specs, damping):
        seen.update(dict.fromkeys(names, statistics))
        return solve_matrices(names, weights, method, statistics, specs, damping)

    monkeypatch.setattr("halfplate.compression.experts.solve_matrices", solve)
    monkeypatch.setattr("halfplate.calibration.experts.SAMPLED", 10**6)
    monkeypatch.setattr("halfplate.compression.experts.SAMPLED", 10**6)
    read = calibration_tokens

    def tokens(*args):
        found = read(*args)
        ids.append(found.ids)
        return found

    monkeypatch.setattr("halfplate.compression.preparation.calibration_tokens", tokens)
    # On processors with bf16 products, the tokens would run through the layers in bf16, and those by hand in fp32.
    recipe = Recipe(
        method="wanda", precision="fp32", inputs="dense", token_limit="none", samples=9, seq_len=24, threads=1
    )
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False, check=False)
    for name in ("model.layers.0.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.5.down_proj"):
        expected, count = statistics_by_hand(tmp_path / "dense", name, ids[0])
        torch.testing.assert_close(seen[name].diagonal, expected, rtol=1e-4, atol=1e-6)
        assert seen[name].tokens == count == record_of(tmp_path / "out")["matrices"][name]["tokens"]


def digests(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def test_an_interrupted_run_keeps_finished_experts_and_gives_the_same_bytes(tiny_tokenizer, tmp_path):
    saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    compress(str(tmp_path / "dense"), tmp_path / "whole", TEXT, benchmark=False, check=False)
    told = []

    class Killed(BaseException):
        """Stands in for kill -9 where a test must know the moment."""

    def kill(phase, done, total, note="", share=None, facts=None):
        if facts and facts.get("event") == "matrix":
            told.append(facts["name"])
            if facts["name"].endswith("layers.1.mlp.experts.4.up_proj"):
                raise Killed

    with pytest.raises(Killed):
        compress(str(tmp_path / "dense"), tmp_path / "out", TEXT, benchmark=False, report=kill)
    before = set(told)
    told.clear()

    def seen(phase, done, total, note="", share=None, facts=None):
        if facts and facts.get("event") == "matrix":
            told.append(facts["name"])

    compress(str(tmp_path / "dense"), tmp_path / "out", TEXT, benchmark=False, check=False, resume=True, report=seen)
    assert not before & set(told)
    assert any(name.endswith("layers.1.mlp.experts.5.down_proj") for name in told)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(tiny_tokenizer, tmp_path):
    saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    recipe = replace(TEXT, method="sparsegpt")
    for name, workers in (("one", 1), ("two", 2)):
        compress(str(tmp_path / "dense"), tmp_path / name, recipe, benchmark=False, check=False, workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_code_that_initialises_the_tensors_of_all_experts_does_not_stop_loading(tiny_tokenizer, tmp_path):
    """Qwen3-Omni does it from the module above the experts."""
    tiny_models.build_model("qwen3_omni_moe_thinker", wrapper=True).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    summary = compress(str(tmp_path / "dense"), tmp_path / "out", INT8, benchmark=False)
    assert summary["check"]["logit_error"] < 1e-3
