"""Layers that share their weights (Zamba): each weight is compressed once, from the text of all its uses, stored once and loaded as shared."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halfplate
import tiny_traits
from conftest import TEXT, build_model
from halfplate.calibration import calibration_tokens
from halfplate.compression.compress import compress
from halfplate.formats import CompressedLinear
from halfplate.planning import make_plan
from halfplate.recipe import Recipe
from halfplate.runtime import restore

IDS = torch.arange(3, 35)[None]
KINDS = {
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
    },
    # Two blocks, one of them used twice, with adapters of which each belongs to one use.
    "zamba2": tiny_traits.DIFFERENT["zamba2"]
    | {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2, 3],
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
    },
}
BLOCK = {"zamba": "shared_transf", "zamba2": "shared_transformer"}
INT8 = {"pattern": "dense", "core_dtype": "int8", "group_size": 32, "samples": 4, "seq_len": 24, "threads": 1}


def saved(kind, tokenizer, folder):
    model = build_model(kind, **KINDS[kind], vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def modules_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_shared_weight_is_compressed_and_stored_once(kind, tiny_tokenizer, tmp_path):
    dense = saved(kind, tiny_tokenizer, tmp_path / "dense")
    recipe = Recipe(method="gptq", embedding_dtype="int8", head_dtype="int8", **INT8)
    summary = compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    assert summary["check"]["logit_error"] < 1e-3
    owner, borrower = (f"model.layers.{layer}.{BLOCK[kind]}.self_attn.q_proj" for layer in (1, 3))
    modules = modules_of(tmp_path / "out")
    assert modules[borrower] == modules[owner] | {"same_as": owner}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{owner}.weight" in stored
    assert not any(name.startswith(f"{borrower}.") for name in stored)
    expected = dense(IDS).logits
    plain, fast = (halfplate.load(tmp_path / "out", kernels=kernels) for kernels in (False, True))
    assert plain.get_submodule(borrower).tensors()["weight"].data_ptr() == plain.get_submodule(owner).weight.data_ptr()
    assert fast.get_submodule(borrower).packed.data_ptr() == fast.get_submodule(owner).packed.data_ptr()
    logits = plain(IDS).logits
    assert (logits - expected).norm() < 0.1 * expected.norm()
    few = IDS[:, :3]  # tokens: more may be rounded
    torch.testing.assert_close(fast(few).logits, logits[:, :3], rtol=1e-3, atol=1e-4)
    fast.save_pretrained(tmp_path / "saved")
    assert torch.equal(halfplate.load(tmp_path / "saved", kernels=False)(IDS).logits, logits)
    restore(fast)
    torch.testing.assert_close(fast(IDS).logits, logits)
    halfplate.export(tmp_path / "out", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert exported.get_submodule(borrower).weight is exported.get_submodule(owner).weight
    torch.testing.assert_close(exported(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_its_statistics_are_those_of_all_its_uses(tiny_tokenizer, tmp_path, monkeypatch):
    """The diagonal of the inputs in the original model, by hooks."""
    from halfplate.compression import tasks

    dense = saved("zamba", tiny_tokenizer, tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    # Only the shared block is compressed, so the text before every use is that of the original.
    options = INT8 | {"include": ("*.shared_transf.*",), "calibration": str(tmp_path / "text.txt")}
    recipe = Recipe(method="gptq", inputs="dense", token_limit="none", **options)
    given, seen = {}, {}
    original = tasks.solve_matrices

    def recorded(names, weights, method, statistics, *others):
        given.update(dict.fromkeys(names, statistics.gram.diagonal().clone()))
        return original(names, weights, method, statistics, *others)

    monkeypatch.setattr(tasks, "solve_matrices", recorded)
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False, check=False)
    ids = calibration_tokens(recipe.calibration, dense, tiny_tokenizer, recipe.samples, recipe.seq_len, recipe.seed).ids
    for name in ("self_attn.q_proj", "feed_forward.down_proj"):
        rows = []
        for layer in (1, 3):
            module = dense.get_submodule(f"model.layers.{layer}.shared_transf.{name}")
            module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1)))
        seen[name] = rows
    with torch.no_grad():
        dense(ids)
    for name, rows in seen.items():
        assert len(rows) == 2
        torch.testing.assert_close(
            given[f"model.layers.1.shared_transf.{name}"].float(),
            torch.cat(rows).square().mean(0),
            rtol=1e-4,
            atol=1e-6,
        )


def test_the_plan_counts_it_once_and_options_that_change_one_use_leave_it(tiny_tokenizer, tmp_path):
    saved("zamba", tiny_tokenizer, tmp_path / "dense")
    owner, borrower = (f"model.layers.{layer}.shared_transf.self_attn.q_proj" for layer in (1, 3))
    plan = make_plan(str(tmp_path / "dense"), Recipe(method="gptq", **INT8))
    assert plan.specs[borrower].same_as == owner
    assert plan.specs[borrower].nbytes == 0
    assert owner in plan.layer_specs
    assert borrower not in plan.layer_specs
    other = plan.with_specs({owner: Recipe(method="gptq", **INT8 | {"core_dtype": "int4"}).spec(32, 64, 0, "int4")})
    assert other.specs[borrower].core_dtype == "int4"
    assert {owner, borrower}.isdisjoint(plan.without([owner]).specs)
    tuned = make_plan(str(tmp_path / "dense"), Recipe(method="armor", tune_block=2, samples=4, seq_len=24))
    assert {owner, borrower}.isdisjoint(tuned.specs)
    reasons = {matrix.name: matrix.reason for matrix in tuned.matrices}
    assert reasons[owner] == reasons[borrower] == "several layers share its weight; not compressed with tune_block"


def test_a_run_with_a_budget_gives_all_uses_one_format(tiny_tokenizer, tmp_path):
    saved("zamba", tiny_tokenizer, tmp_path / "dense")
    recipe = Recipe(method="rtn", budget=0.45, **INT8 | {"core_dtype": "int8"})
    compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    modules = modules_of(tmp_path / "out")
    assert len({entry["core_dtype"] for entry in modules.values()}) > 1
    for entry in modules.values():
        if "same_as" in entry:
            assert modules[entry["same_as"]] == {key: value for key, value in entry.items() if key != "same_as"}
    loaded = halfplate.load(tmp_path / "out", kernels=False)
    assert any(isinstance(module, CompressedLinear) and module.spec.same_as for module in loaded.modules())
