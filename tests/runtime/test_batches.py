"""The native step for several sequences against transformers' own forward, alone and inside `generate`."""

import copy

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.models.arguments import cache_argument
from halfplate.runtime import accelerate
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.native_step import NativeDecoder
from native_batches import batch_logits

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

MODELS = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one head of keys": ("llama", {"num_key_value_heads": 1}),
    "heads of 20": ("llama", {"head_dim": 20, "hidden_size": 36}),
    "heads of 64": ("llama", {"head_dim": 64, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "seven heads a group": (
        "llama",
        {"head_dim": 16, "hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen3": ("qwen3", {"use_sliding_window": False, "layer_types": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": None, "layer_types": None}),
}
FULL = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def models(request, tiny_model):
    """A model as transformers runs it, and a copy that decodes natively."""
    architecture, options = request.param
    plain = tiny_model(architecture, **options)
    fast = copy.deepcopy(plain)
    assert accelerate(fast).decoder == "native"
    return plain, fast


@pytest.fixture
def fast(tiny_model):
    model = tiny_model()
    accelerate(model)
    return model


def texts(count, length=9):
    """Token ids (count, length) with padding on the left, and their mask."""
    ids = torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(0))
    padding = torch.arange(count) % (length - 2)
    mask = (torch.arange(length) >= padding[:, None]).long()
    return ids * mask, mask


def with_cache(model, cache):
    return {cache_argument(model.forward): cache, "use_cache": True}


@pytest.mark.parametrize("count", [3, 19])
@torch.no_grad()
def test_steps_give_the_logits_of_the_whole_forward(models, count):
    plain, fast = models
    ids, mask = texts(count)
    expected = plain(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    found = batch_logits(fast, ids, mask)
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [3, 19])
def test_any_number_of_threads_gives_the_same_bits(models, count):
    _, fast = models
    results = [batch_logits(fast, *texts(count), threads) for threads in range(1, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_cache_in_bf16_rounds_keys_and_values(tiny_model):
    fast = tiny_model("llama", head_dim=16)
    accelerate(fast)
    exact, rounded = (batch_logits(fast, *texts(5), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def counted(model, monkeypatch):
    """The sequences of each batch step from here on."""
    steps, step = [], NativeDecoder.step_rows
    monkeypatch.setattr(
        NativeDecoder, "step_rows", lambda self, tokens, *rest: steps.append(len(tokens)) or step(self, tokens, *rest)
    )
    return steps


@pytest.mark.parametrize(
    ("settings", "sequences"),
    [
        ({"do_sample": False}, 4),
        ({"do_sample": True, "temperature": 0.9, "top_k": 20}, 4),
        ({"do_sample": False, "num_beams": 3}, 12),
        ({"do_sample": True, "num_return_sequences": 2}, 8),
        ({"do_sample": False, "num_beams": 20}, None),
        ({"do_sample": False, "use_cache": False}, None),
    ],
    ids=str,
)
def test_generate_gives_what_transformers_gives(models, monkeypatch, settings, sequences):
    ids, mask = texts(4)
    found, steps = [], counted(models[1], monkeypatch)
    for model in models:
        torch.manual_seed(3)
        found.append(model.generate(ids, attention_mask=mask, **FULL, **settings))
    assert torch.equal(*found)
    assert steps == ([] if sequences is None else [sequences] * 11)


def test_one_sequence_with_padding_decodes_natively(tiny_model, fast, monkeypatch):
    ids, mask = (part[3:4] for part in texts(4))
    steps = counted(fast, monkeypatch)
    expected = tiny_model().generate(ids, attention_mask=mask, do_sample=False, **FULL)
    assert torch.equal(fast.generate(ids, attention_mask=mask, do_sample=False, **FULL), expected)
    assert steps == [1] * 11


@torch.no_grad()
def test_masks_that_are_no_padding_on_the_left_take_the_ordinary_path(tiny_model, fast, monkeypatch):
    plain, steps, ids = tiny_model(), counted(fast, monkeypatch), texts(2)[0] + 1
    for hole in (2, -1):
        mask = torch.ones(2, 10, dtype=torch.int64)
        mask[0, hole] = 0
        logits = []
        for model in (fast, plain):
            cache = GrowingCache(2)
            model(input_ids=ids, **with_cache(model, cache))
            logits.append(model(input_ids=ids[:, :1], attention_mask=mask, **with_cache(model, cache)).logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert not steps


@torch.no_grad()
def test_a_batch_that_does_not_fit_the_cache_is_refused(fast):
    cache = GrowingCache(2)
    fast(input_ids=texts(3)[0], **with_cache(fast, cache))
    with pytest.raises(HalfplateError, match="tokens has 5 sequences, but the cache holds 3 sequences"):
        fast.native_decoder.step_batch(torch.arange(5), cache)
    with pytest.raises(HalfplateError, match="token=128 is outside the vocabulary of 128"):
        fast.native_decoder.step_batch(torch.tensor([1, 128, 2]), cache)
    with pytest.raises(HalfplateError, match="out of range"):
        fast.native_decoder.step_batch(torch.arange(3), cache, positions=torch.full((3,), 10**6))


def test_sequences_of_a_cache_change_places():
    cache = GrowingCache(1)
    keys, values = torch.randn(2, 3, 2, 5, 4)
    cache.update(keys, values, 0)
    layer = cache.layers[0]
    before = layer.moves
    cache.reorder_cache(torch.tensor([0, 1, 2]))
    assert layer.moves == before
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(layer.keys, keys[[2, 2, 0]])
    assert torch.equal(layer.values, values[[2, 2, 0]])
    assert layer.length == 5
