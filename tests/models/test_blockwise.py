"""Running layer by layer equals the whole forward, bit for bit, on every architecture."""

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.models import BlockwiseModel

CHECKED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3")
OTHERS = (
    "gpt_neox",
    "opt",
    "gpt2",
    "stablelm",
    "olmo2",
    "starcoder2",
    "cohere",
    "granite",
    "falcon",
    "mixtral",
    "qwen3_moe",
)
LENGTH = 12  # longer than the sliding windows of the tiny models (5)


def tokens(samples=2, length=LENGTH, vocab=128, seed=0):
    return torch.randint(3, vocab, (samples, length), generator=torch.Generator().manual_seed(seed))


def run_all(blockwise, inputs):
    for index in range(len(blockwise.blocks)):
        inputs = blockwise.run_block(index, inputs)
    return inputs


@pytest.mark.parametrize("architecture", CHECKED + OTHERS)
@torch.no_grad()
def test_block_by_block_equals_the_whole_forward(tiny_model, architecture):
    model = tiny_model(architecture)
    ids = tokens()
    blockwise = BlockwiseModel(model)
    logits = blockwise.finish(run_all(blockwise, blockwise.embed(ids)))
    assert logits.shape == (2, LENGTH, 128)
    assert torch.equal(logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (1, 5), (2, 6)])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
@torch.no_grad()
def test_any_shape(tiny_model, architecture, shape):
    model = tiny_model(architecture)
    blockwise = BlockwiseModel(model)
    logits = blockwise.finish(run_all(blockwise, blockwise.embed(tokens(*shape))))
    assert torch.equal(logits, model(tokens(*shape), use_cache=False).logits)


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gemma2", "gemma3_text", "phi3"])
@torch.no_grad()
def test_the_sliding_window_is_in_force(tiny_model, architecture):
    """A guard of the test above: with a window as long as the text the logits are others."""
    local, wide = tiny_model(architecture), tiny_model(architecture, sliding_window=64)
    assert not torch.equal(local(tokens()).logits, wide(tokens()).logits)


@pytest.mark.parametrize("architecture", ["gemma3_text", "llama"])
@torch.no_grad()
def test_arguments_serve_every_batch_of_the_same_shape(tiny_model, architecture):
    model = tiny_model(architecture)
    blockwise = BlockwiseModel(model)
    first, second = (blockwise.embed(tokens(seed=seed)) for seed in (0, 1))
    second.arguments = first.arguments
    assert torch.equal(blockwise.finish(run_all(blockwise, second)), model(tokens(seed=1), use_cache=False).logits)


@torch.no_grad()
def test_gemma3_blocks_differ_in_mask_and_rope(tiny_model):
    inputs = BlockwiseModel(tiny_model("gemma3_text")).embed(tokens())
    local, full, third = (arguments.kwargs for arguments in inputs.arguments)
    assert not torch.equal(local["position_embeddings"][0], full["position_embeddings"][0])
    assert local["attention_mask"] is not None
    assert local["attention_mask"] is not full["attention_mask"]
    assert torch.equal(local["position_embeddings"][0], third["position_embeddings"][0])


@torch.no_grad()
def test_every_block_output_equals_the_hidden_states(tiny_model):
    model = tiny_model("llama")
    blockwise = BlockwiseModel(model)
    inputs = blockwise.embed(tokens())
    expected = model(tokens(), output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(inputs.hidden, expected[0])
    assert torch.equal(blockwise.run_block(0, inputs).hidden, expected[1])


@torch.no_grad()
def test_blocks_that_return_tuples(tiny_model):
    model = tiny_model("llama")
    expected = model(tokens(), use_cache=False).logits

    class Tupled(type(model.model.layers[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs), "attention weights"

    for block in model.model.layers:
        block.__class__ = Tupled
    model.model.forward = lambda input_ids, **kwargs: forward_of_tuples(model.model, input_ids)
    blockwise = BlockwiseModel(model)
    assert torch.equal(blockwise.finish(run_all(blockwise, blockwise.embed(tokens()))), expected)


def forward_of_tuples(body, input_ids):
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = body.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = body.rotary_emb(hidden, position_ids=positions)
    for block in body.layers:
        hidden = block(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)[0]
    return BaseModelOutputWithPast(last_hidden_state=body.norm(hidden))


@torch.no_grad()
def test_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model("llama")
    expected = model(tokens(), use_cache=False).logits
    kept = model.model.layers[1].forward
    model.model.layers[1].forward = kept  # as accelerate's hooks do
    blockwise = BlockwiseModel(model)
    blockwise.finish(blockwise.embed(tokens()))
    with pytest.raises(HalfplateError, match=r"fails without its layers .*IndexError"):
        blockwise.embed(torch.full((1, 4), 999))
    assert "forward" not in vars(model.model.layers[0])
    assert vars(model.model.layers[1])["forward"] is kept
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)


@torch.no_grad()
def test_a_replaced_module_is_used(tiny_model):
    model = tiny_model("llama")
    blockwise = BlockwiseModel(model)
    before = blockwise.finish(run_all(blockwise, blockwise.embed(tokens())))
    model.model.layers[0].mlp.up_proj.weight.mul_(2)
    after = blockwise.finish(run_all(blockwise, blockwise.embed(tokens())))
    assert not torch.equal(before, after)
    assert torch.equal(after, model(tokens(), use_cache=False).logits)


def test_a_model_that_changes_the_hidden_state_between_blocks_is_refused(tiny_model):
    model = tiny_model("llama")
    body = model.model

    def forward(input_ids, **kwargs):
        hidden = body.embed_tokens(input_ids)
        for block in body.layers:
            hidden = block(
                hidden * 2, position_embeddings=body.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
            )
        return hidden

    body.forward = forward
    with pytest.raises(HalfplateError, match="changes the hidden state between its layers"):
        BlockwiseModel(model).embed(tokens())


@pytest.mark.parametrize("architecture", ["gemma3_text", "llama", "gpt_neox", "falcon"])
@torch.no_grad()
def test_samples_run_apart_as_they_run_together(tiny_model, architecture):
    blockwise = BlockwiseModel(tiny_model(architecture))
    whole = blockwise.embed(tokens(samples=5))
    parts = whole.split(2)
    assert [len(part.hidden) for part in parts] == [2, 2, 1]
    apart = torch.cat([run_all(blockwise, part).hidden for part in parts])
    torch.testing.assert_close(apart, run_all(blockwise, whole).hidden, rtol=1e-4, atol=1e-5)
