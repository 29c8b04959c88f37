"""Recovery of everything that is compared with ARMOR: factors, structured pruning and pruned experts, each from end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

import halfplate
import structured_models
from causal_models import MOE
from conftest import FACTORS, build_model
from halfplate.models.sources import load_dense

TEXT = "The bird saw a red ball near the house, and it wanted to play. " * 60
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 16, "threads": 1}
# Stored as codes, which training keeps: positions, signs and int4 values.
CODES = (torch.uint8, torch.int8, torch.int16, torch.int32)
STRUCTURED = ("magnitude-structured", "wanda-structured", "cfsp", "tyr", "nirvana")
EXPERTS = ("reap", "stun", "expert-frequency", "expert-merge")


def recovered(model: Path, teacher: Path, out: Path) -> dict[str, Any]:
    text = out.with_suffix(".txt")
    text.write_text(TEXT)
    options = {"tokens": 2048, "seq_len": 16, "batch": 4, "learning_rate": 1e-3, "precision": "fp32"}
    found = halfplate.recover(model, teacher, out, text=str(text), **options)
    assert found is not None
    assert found["after"]["kl"] < 0.99 * found["before"]["kl"]
    return found


@pytest.mark.parametrize("method", FACTORS)
def test_factors_are_trained_and_their_codes_stay(tiny_folder_once: Path, tmp_path: Path, method: str) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    options = FACTORS[method] | ({} if "kept" in FACTORS[method] else {"share": 0.5})
    halfplate.compress(tiny_folder_once, made, method=method, method_options=options, **QUICK)
    found = recovered(made, tiny_folder_once, out)
    before, after = (load_file(folder / "model.safetensors") for folder in (made, out))
    assert before.keys() == after.keys()
    codes = {name for name, tensor in before.items() if tensor.dtype in CODES}
    assert bool(codes) == (method not in ("svd", "monarch"))
    for name in before:
        assert before[name].shape == after[name].shape, name
        assert torch.equal(before[name], after[name]) or name not in codes, name
    changed = {name for name in before if ".mlp." in name and not torch.equal(before[name], after[name])}
    assert changed
    score = halfplate.evaluate(
        out, against=tiny_folder_once, text=str(out.with_suffix(".txt")), seq_len=16, activations="float"
    )
    assert score["kl"] < 2 * found["after"]["kl"]


@pytest.mark.parametrize("name", STRUCTURED)
def test_what_structured_pruning_leaves_is_trained(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    source, out = structured_models.saved(tiny_tokenizer, tmp_path / "model"), tmp_path / "out"
    halfplate.prune(source.name, tmp_path / "made", 0.75, transforms=[name], check=False, **QUICK)
    recovered(tmp_path / "made", tmp_path / "model", out)
    first, second = (load_dense(str(folder)).model.state_dict() for folder in (tmp_path / "made", out))
    assert all(first[name].shape == second[name].shape for name in first)


@pytest.mark.parametrize("name", EXPERTS)
def test_what_pruning_experts_leaves_is_trained(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    build_model("qwen3_moe", vocab_size=len(tiny_tokenizer), **(MOE | {"head_dim": 8})).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    halfplate.prune(model, tmp_path / "made", 0.75, transforms=[name], check=False, **QUICK)
    recovered(tmp_path / "made", model, out)
