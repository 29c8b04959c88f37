"""Mixtures of experts from the command's function to the loaded checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfplate
import tiny_models
from causal_models import MOE
from conftest import build_model
from halfplate.calibration import calibration_tokens
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
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
    few = IDS[:, :3]  # tokens: more may be rounded
    for other in (fast, by_transformers):
        torch.testing.assert_close(other(few).logits, expected[:, :3], rtol=1e-4, atol=1e-5)
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


@pytest.mark.parametrize("weighted", ["equal", "gated"])
@torch.no_grad()
def test_a_router_that_sends_every_token_to_one_expert(weighted, tiny_tokenizer, tmp_path):
    dense = saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense", num_experts_per_tok=1)
    for layer in dense.model.layers:
        layer.mlp.gate.weight.zero_()
    dense.save_pretrained(tmp_path / "dense")
    recipe = Recipe(method="sparsegpt", expert_tokens=weighted, samples=4, seq_len=24, threads=1)
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    matrices = record_of(tmp_path / "out")["matrices"]
    for layer in range(2):
        tokens = [matrices[f"model.layers.{layer}.mlp.experts.{number}.up_proj"]["tokens"] for number in range(8)]
        assert sorted(tokens) == [0] * 7 + [96]
    assert all(0 <= matrix["relative_error"] < 1 for matrix in matrices.values())


@torch.no_grad()
def test_layers_without_experts_between_layers_with_them(tiny_tokenizer, tmp_path):
    saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense", num_hidden_layers=3, mlp_only_layers=[1])
    compress(str(tmp_path / "dense"), tmp_path / "out", TEXT, benchmark=False)
    names = record_of(tmp_path / "out")["matrices"].keys()
    experts = [sum(f"layers.{layer}.mlp.experts." in name for name in names) for layer in range(3)]
    assert experts == [3 * 8, 0, 3 * 8]
    assert {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"} <= names


def test_layers_that_share_their_experts(tiny_tokenizer, tmp_path):
    """Stored twice, each is compressed; stored once, the files lack some."""
    model = saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.load_state_dict(first.state_dict())
    model.save_pretrained(tmp_path / "dense")
    summary = compress(str(tmp_path / "dense"), tmp_path / "twice", INT8, benchmark=False)
    assert summary["check"]["logit_error"] < 1e-3
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" not in name}
    save_file(kept, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(HalfplateError, match=r"lack 48 tensors|lack 24 tensors") as refused:
        compress(str(tmp_path / "dense"), tmp_path / "once", INT8, benchmark=False)
    assert "\n" not in str(refused.value)


def statistics_by_hand(folder, name, ids, gated):
    """The diagonal of an expert's blended second moments in the original model, with loops over the tokens.

    gated: tokens count by the square of their routing weight.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    place, number, leaf = name.rsplit(".", 2)
    seen = []
    hook = model.get_submodule(place).register_forward_pre_hook(lambda module, args: seen.append(args))
    for batch in ids.split(8):
        model(batch)
    hook.remove()
    experts, routed, everything, gates = model.get_submodule(place), [], [], []
    half = experts.gate_up_proj.shape[1] // 2
    for hidden, chosen, weights in seen:
        for token, its, shares in zip(hidden, chosen, weights, strict=True):
            x = token
            if leaf == "down_proj":
                both = experts.gate_up_proj[int(number)] @ token
                x = torch.nn.functional.silu(both[:half]) * both[half:]
            everything.append(x)
            if int(number) in its.tolist():
                routed.append(x)
                gates.append(float(shares[its.tolist().index(int(number))]) if gated else 1.0)
    width, count = everything[0].numel(), len(routed)
    own = sum(gate**2 * x.square() for gate, x in zip(gates, routed, strict=True)) / sum(gate**2 for gate in gates)
    mean = sum(x.square() for x in everything) / len(everything)
    return (count * own + width * mean) / (count + width), count


@pytest.mark.parametrize("tokens", ["equal", "gated"])
@torch.no_grad()
def test_the_statistics_of_an_expert_are_those_of_its_tokens_and_of_all(tokens, tiny_tokenizer, tmp_path, monkeypatch):
    saved("qwen3_moe", tiny_tokenizer, tmp_path / "dense")
    seen, ids = {}, []

    def solve(names, weights, method, statistics, specs, damping):
        seen.update(dict.fromkeys(names, statistics))
        return solve_matrices(names, weights, method, statistics, specs, damping)

    monkeypatch.setattr("halfplate.compression.experts.solve_matrices", solve)
    monkeypatch.setattr("halfplate.calibration.experts.SAMPLED", 10**6)
    monkeypatch.setattr("halfplate.compression.experts.SAMPLED", 10**6)
    read = calibration_tokens

    def read_tokens(*args):
        found = read(*args)
        ids.append(found.ids)
        return found

    monkeypatch.setattr("halfplate.compression.preparation.calibration_tokens", read_tokens)
    # On processors with bf16 products, the tokens would run through the layers in bf16, and those by hand in fp32.
    exact = {"precision": "fp32", "inputs": "dense", "token_limit": "none"}
    recipe = Recipe(method="wanda", expert_tokens=tokens, samples=9, seq_len=24, threads=1, **exact)
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False, check=False)
    for name in ("model.layers.0.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.5.down_proj"):
        expected, count = statistics_by_hand(tmp_path / "dense", name, ids[0], tokens == "gated")
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
