"""Models whose blocks pass on more than a hidden state run layer by layer as they run whole, or are refused in one line."""

import json
from dataclasses import replace

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.chain_check import check_chain
from halfplate.models.handover import differing, hands_on, patched
from halfplate.models.linears import find_linears, shared_linears
from halfplate.models.sources import open_source
from halfplate.models.streamed import StreamedModel
from state_passing import MODELS

LENGTH = 12  # longer than the windows
BY_TOKEN = ("gemma3n_text", "gemma4_text", "deepseek_v4", "qwen4_exp_text")
HANDING_ON = ("gemma3n_text", "gemma4_text", "zaya", "hy_v4")


def tokens(seed=0, samples=2):
    return torch.randint(3, 320, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def chains(blockwise, batches):
    """Every batch through a block before any runs through the next, with the arguments of the first batch but for what differs."""
    inputs = [blockwise.embed(batch) for batch in batches]
    reference, own = inputs[0].all_arguments, []
    for one in inputs:
        found = differing(reference, one.all_arguments)
        arguments = [
            patched(shared, {place: tensor for (at, place), tensor in found.items() if at == block})
            for block, shared in enumerate(reference)
        ]
        own.append(replace(one, arguments=arguments))
    for block in range(len(blockwise.blocks)):
        own = [blockwise.run_block(block, one) for one in own]
    return own


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_block_by_block_equals_the_whole_forward(tiny_model, architecture):
    model = tiny_model(architecture, vocab_size=320, **MODELS[architecture])
    blockwise, batches = BlockwiseModel(model), [tokens(seed) for seed in (0, 1)]
    for batch, ended in zip(batches, chains(blockwise, batches), strict=True):
        assert torch.equal(blockwise.finish(ended), model(batch, use_cache=False).logits)


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_what_depends_on_tokens_and_what_is_handed_on(tiny_model, architecture):
    """A guard of the test above: without either, these models come out otherwise."""
    blockwise = BlockwiseModel(tiny_model(architecture, vocab_size=320, **MODELS[architecture]))
    first, second = (blockwise.embed(tokens(seed)) for seed in (0, 1))
    assert bool(differing(first.all_arguments, second.all_arguments)) == (architecture in BY_TOKEN)
    # What Rwkv's blocks hand on is nothing without a cache.
    assert hands_on(first.arguments) == (architecture in (*HANDING_ON, "rwkv"))
    for block in range(len(blockwise.blocks) - 1):
        first = blockwise.run_block(block, first)
    assert bool(first.carried) == (architecture in HANDING_ON)


@pytest.mark.parametrize("architecture", ["gemma4_text", "zaya", "hy_v4"])
@torch.no_grad()
def test_samples_run_apart_as_they_run_together(tiny_model, architecture):
    blockwise = BlockwiseModel(tiny_model(architecture, vocab_size=320, **MODELS[architecture]))
    inputs = blockwise.embed(tokens(samples=3))
    for block in range(len(blockwise.blocks)):
        whole = blockwise.run_block(block, inputs)
        apart = torch.cat([blockwise.run_block(block, part).hidden for part in inputs.split(2)])
        torch.testing.assert_close(apart, whole.hidden, rtol=1e-4, atol=1e-5)
        inputs = whole


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return StreamedModel(open_source(str(folder)))


@pytest.mark.parametrize("kept_in", ["a module", "an output that changes"])
def test_state_that_cannot_be_carried_is_refused(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, kept_in):
    model = tiny_model("llama", vocab_size=320, num_hidden_layers=3)
    streamed = saved(model, tiny_tokenizer, tmp_path / "model")
    check_chain(streamed, tokens())
    kind, shared = type(model.model.layers[0]), {}
    forward = kind.forward

    def passing(self, hidden_states, *args, **kwargs):
        """The second block adds what the first had as its input."""
        index = self.self_attn.layer_idx
        if index == 0:
            shared["first"] = hidden_states
        extra = shared["first"] if index == 1 else 0.0
        return forward(self, hidden_states + extra, *args, **kwargs)

    def changing(self, hidden_states, *args, **kwargs):
        shared["calls"] = shared.get("calls", 0) + 1
        return forward(self, hidden_states, *args, **kwargs) * (1.1 if shared["calls"] == 2 else 1.0)

    monkeypatch.setattr(kind, "forward", passing if kept_in == "a module" else changing)
    with pytest.raises(
        HalfplateError, match=r"LlamaForCausalLM cannot be run layer by layer: layer 1 .*\(relative difference 0\.\d+\)"
    ) as refused:
        check_chain(streamed, tokens())
    assert "\n" not in str(refused.value)
    assert "magnitude" in str(refused.value)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_a_block_that_fails_by_itself_is_refused(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    model = tiny_model("llama", vocab_size=320)
    streamed = saved(model, tiny_tokenizer, tmp_path / "model")
    forward = model.model.forward.__func__
    needed = {}

    def whole(self, *args, **kwargs):
        needed["state"] = 0.0
        try:
            return forward(self, *args, **kwargs)
        finally:
            needed.clear()

    kind = type(model.model.layers[0])
    block = kind.forward
    monkeypatch.setattr(type(model.model), "forward", whole)
    monkeypatch.setattr(
        kind, "forward", lambda self, x, *args, **kwargs: block(self, x + needed["state"], *args, **kwargs)
    )
    with pytest.raises(
        HalfplateError, match=r"LlamaForCausalLM cannot be run .*layer 0 fails for these tokens .*KeyError"
    ) as refused:
        check_chain(streamed, tokens())
    assert "\n" not in str(refused.value)


def test_what_layers_share_is_a_linear_of_the_first_and_the_rest_runs(tiny_model, tiny_tokenizer, tmp_path):
    sizes = {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
    }
    sizes |= {"num_key_value_heads": 4, "adapter_rank": 8, "attention_head_dim": 16}
    streamed = saved(tiny_model("zamba2", vocab_size=320, **sizes), tiny_tokenizer, tmp_path / "model")
    check_chain(streamed, tokens())
    found, skipped = find_linears(streamed.model)
    reasons, names = {module.name: module.reason for module in skipped}, {linear.name for linear in found}
    owner, borrower = (f"model.layers.{layer}.shared_transformer.self_attn.q_proj" for layer in (1, 3))
    assert owner in names
    assert reasons[borrower] == f"its weight is that of {owner}"
    assert shared_linears(streamed.model, "model.layers")[borrower] == owner
    assert "model.layers.3.mamba_decoder.mamba.in_proj" in names
    assert "model.layers.3.shared_transformer.self_attn.q_proj.weight" in streamed.tied


def test_samples_that_do_not_come_first_cannot_be_cut(tiny_model, tiny_tokenizer, tmp_path):
    streamed = saved(
        tiny_model("gemma3n_text", vocab_size=320, **MODELS["gemma3n_text"]), tiny_tokenizer, tmp_path / "model"
    )
    check_chain(streamed, tokens())
    with pytest.raises(HalfplateError, match=r"tune_block=3: .* shape \(3, 2, 12, 32\)"):
        check_chain(streamed, tokens(), splits="tune_block=3")


def test_blocks_of_several_sublayers_are_named(tiny_folder):
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": 3}
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    del model.model.layers[2]
    with pytest.raises(
        HalfplateError, match=r"module lists of lengths model.layers of 2, but its configuration names 3 layers"
    ):
        BlockwiseModel(model)
