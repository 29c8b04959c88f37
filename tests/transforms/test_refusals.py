"""What structured pruning and rotations refuse, before any work: too little left, nothing that can go, modules that are not there."""

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import halfplate
from conftest import build_model
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.transforms import TRANSFORMS
from structured_models import saved

LEAST = {
    "cfsp": "32 of 128 MLP channels",
    "depth": "1 of 4 layers",
    "flap": "2 of 4 heads of k and v, 32 of 128 MLP channels",
    "magnitude-structured": "2 of 4 heads of k and v, 32 of 128 MLP channels",
    "modegpt": "4 of 8 pairs of values in each head, 32 of 128 MLP channels",
    "nirvana": "2 of 4 heads of k and v, 32 of 128 MLP channels",
    "slicegpt": "32 of 64 hidden dimensions",
    "tyr": "2 of 4 heads of k and v, 32 of 128 MLP channels",
    "wanda-structured": "2 of 4 heads of k and v, 32 of 128 MLP channels",
}
# One layer, one head of k and v, and widths of one step: nothing is left to remove.
SMALLEST = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
}


def refused(folder: Path | str, out: Path, name: str, keep: float) -> str:
    """The message of `prune`, which has written nothing; `plan` says the same."""
    with pytest.raises(HalfplateError) as found:
        halfplate.prune(folder, out, keep, transforms=[name], samples=2, seq_len=8)
    with pytest.raises(HalfplateError, match=re.escape(str(found.value))):
        halfplate.plan(folder, transforms=[name], keep=keep, seq_len=8)
    assert not out.exists()
    assert not WorkFolder(out).path.exists()
    return str(found.value)


@pytest.mark.parametrize("name", LEAST)
def test_a_share_that_leaves_nothing(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str) -> None:
    folder, out = saved(tiny_tokenizer, tmp_path / "model").name, tmp_path / "out"
    message = refused(folder, out, name, 0.02)
    assert f"keep=0.02 is too small: with {LEAST[name]}, the fewest that can stay, the model has 0." in message
    assert ("depth" in message) == (name != "depth")
    told = re.search(r"use keep (0\.\d{4}) or more", message)
    assert told is not None
    halfplate.plan(folder, transforms=[name], keep=float(told[1]), seq_len=8)  # what the message says works


@pytest.mark.parametrize("name", LEAST)
def test_dimensions_that_cannot_shrink(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str) -> None:
    folder = saved(tiny_tokenizer, tmp_path / "model", **SMALLEST).name
    message = refused(folder, tmp_path / "out", name, 0.9)
    assert message.startswith(
        "keep=0.9: nothing of this model can go: it has 1 of 1" if name == "depth" else "keep=0.9: "
    )
    assert "the fewest that can stay; use keep 1" in message


def test_sizes_that_follow_from_others(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = saved(tiny_tokenizer, tmp_path / "model", "qwen2", layer_types=["full_attention"] * 4).name
    assert "does not support" in refused(folder, tmp_path / "out", "slicegpt", 0.8)


@pytest.mark.parametrize("architecture", ["gpt2", "mamba", "gemma"])
def test_a_model_without_the_modules(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, architecture: str
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    build_model(architecture, vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    shared = f"which dimensions of a {architecture} model shrink together; expected one of llama, mistral, qwen2, qwen3"
    for name in LEAST:
        assert shared in refused(folder, out, name, 0.8)
    for name in ("reap", "stun", "expert-frequency", "expert-merge"):
        assert "it has no experts that a router chooses from" in refused(folder, out, name, 0.8)
    with pytest.raises(HalfplateError, match=r"it is not known how to multiply .* into the linears after it"):
        halfplate.plan(folder, transforms=["rotate"], seq_len=8)


def test_every_structured_method_is_tried() -> None:
    experts = {"reap", "stun", "expert-frequency", "expert-merge"}
    assert {name for name in TRANSFORMS if TRANSFORMS.get(name).shrinks} - experts == set(LEAST)
