"""Outputs that are remembered between the passes of a layer change no result, and are not used where they could."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_models
from halfplate.compression.compress import compress
from halfplate.compression.remembered import RememberedOutputs
from halfplate.planning import memory
from halfplate.recipe import Recipe

SETTINGS = {"pattern": "dense", "block_size": 0, "core_dtype": "int4", "group_size": 16, "samples": 10, "seq_len": 24}
# Plain, parallel attention and MLP, norms around blocks, Conv1D, experts, shared keys and values, state spaces.
ROOM = 10**6
KINDS = ("llama", "falcon", "gpt_neox", "gemma2", "gpt2", "qwen2_moe", "mixtral", "gemma3n_text", "mamba")


def made(model: Path, out: Path, **options: object) -> dict[str, str]:
    compress(str(model), out, Recipe.of(**(SETTINGS | options)), check=False)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("inputs", ["compressed", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_what_is_remembered(kind, inputs, tiny_tokenizer, tmp_path, monkeypatch):
    tiny_models.build_model(kind).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    found = made(tmp_path / "model", tmp_path / "remembered", inputs=inputs)
    monkeypatch.setattr(memory, "REMEMBERED_NBYTES", 0)
    assert found == made(tmp_path / "model", tmp_path / "again", inputs=inputs)


def test_a_layer_runs_its_attention_twice_instead_of_four_times(tiny_folder, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    calls: list[str] = []
    for kind in (LlamaAttention, LlamaMLP):
        forward = kind.forward

        def counted(self, *args, forward=forward, **kwargs):
            calls.append(type(self).__name__)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    counts = []
    for room in (0, 10**8):
        monkeypatch.setattr(memory, "REMEMBERED_NBYTES", room)
        calls.clear()
        made(tiny_folder, tmp_path / str(room))
        counts.append((calls.count("LlamaAttention"), calls.count("LlamaMLP")))
    layers, batches = 2, 2
    assert (counts[0][0] - counts[1][0]) >= (2 * layers - 1) * batches  # of the last layer there is no output
    assert counts[0][1] >= counts[1][1]


class Block(nn.Module):
    """Two parts, of which the second changes the output of the first if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        self.changing = False
        self.ran: list[str] = []
        for name in ("first", "second"):
            inner = getattr(self, name)[0]
            inner.register_forward_hook(lambda *_, name=name: self.ran.append(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.changing:
            hidden.add_(1)
        return self.second(hidden)


def run(remembered: RememberedOutputs, block: Block, x: torch.Tensor, batch: int = 0, targets=()) -> list[str]:
    """The parts that ran; the output must be that of the block alone."""
    with torch.no_grad():
        expected = block(x)
        block.ran.clear()
        with remembered.recalling(block, batch, targets):
            assert torch.equal(block(x), expected)
    assert "forward" not in vars(block.first)
    return block.ran


def test_what_is_recalled_and_what_runs():
    remembered, block, x = RememberedOutputs(ROOM), Block(), torch.randn(3, 5, 4)
    assert run(remembered, block, x) == ["first", "second"]
    assert remembered.nbytes == 2 * x.nbytes  # of the submodules, no longer of the linears inside
    assert run(remembered, block, x) == []
    assert run(remembered, block, x, batch=1) == ["first", "second"]
    assert run(remembered, block, x + 1) == ["first", "second"]  # another input under the same number
    block.first[0].weight.data.add_(1)
    remembered.clear()
    assert run(remembered, block, x) == ["first", "second"]
    assert (run(remembered, block, x), remembered.nbytes) == ([], 2 * x.nbytes)


def test_a_part_whose_linear_is_watched_runs():
    remembered, block, x = RememberedOutputs(ROOM), Block(), torch.randn(3, 5, 4)
    run(remembered, block, x)
    seen: list[int] = []
    block.second[0].register_forward_pre_hook(lambda *_: seen.append(1))
    with torch.no_grad(), remembered.recalling(block, 0, ["second.0"]):
        block(x)
    assert seen == [1]
    assert "first" not in block.ran[-1:]


def test_outputs_that_are_changed_in_place_are_not_used_again():
    remembered, block, x = RememberedOutputs(ROOM), Block(), torch.randn(3, 5, 4)
    block.changing = True
    for _ in range(3):
        assert "first" in run(remembered, block, x)


def test_no_more_is_kept_than_there_is_room():
    block, x = Block(), torch.randn(3, 5, 4)
    for room, ran in ((0, ["first", "second"]), (x.nbytes, ["second"])):
        remembered = RememberedOutputs(room)
        run(remembered, block, x)
        assert run(remembered, block, x) == ran
        assert remembered.nbytes <= room


def test_parts_that_are_given_a_cache_run():
    class Cached(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, cache={})

    block, remembered = Cached(), RememberedOutputs(ROOM)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, cache: dict) -> torch.Tensor:
            block.ran.append("attention")
            return self.proj(x)

    block.attention = Attention()
    for _ in range(2):
        assert run(remembered, block, torch.ones(2, 4)) == ["attention"]
