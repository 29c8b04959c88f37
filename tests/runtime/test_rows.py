"""Steps with several tokens of a sequence against steps with one."""

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.runtime import accelerate
from halfplate.runtime.cache import GrowingCache
from native_batches import batch_logits

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

LENGTH = 37


@pytest.fixture
def decoder(tiny_model):
    model = tiny_model("llama", head_dim=16)
    accelerate(model)
    return model.native_decoder


def text(sequences=1, length=LENGTH):
    return torch.randint(3, 128, (sequences, length), generator=torch.Generator().manual_seed(1))


def empty(decoder, sequences=1, room=LENGTH, dtype=torch.float32):
    traits = decoder.traits
    return GrowingCache.with_room(len(traits.layers), sequences, traits.kv_heads, room, traits.head_dim, dtype)


@pytest.mark.parametrize("at_once", [2, 5, 18, LENGTH])
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_prompt_in_chunks_gives_the_logits_of_single_steps(tiny_model, at_once, sequences):
    model = tiny_model()
    accelerate(model)
    ids, mask = text(sequences), torch.ones(sequences, LENGTH, dtype=torch.int64)
    mask[-1, : 4 * (sequences > 1)] = 0
    found, expected = (batch_logits(model, ids, mask, at_once=count)[mask > 0] for count in (at_once, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_the_wanted_logits_are_computed(decoder):
    ids, caches = text(2), [empty(decoder, 2) for _ in range(3)]
    all_of_them, last, none = (
        decoder.step_rows(ids, cache, wanted=w) for cache, w in zip(caches, (None, 2, 0), strict=True)
    )
    torch.testing.assert_close(last, all_of_them[:, -2:], rtol=1e-4, atol=1e-5)
    assert none.shape == (2, 0, 128)
    for cache in caches:
        assert cache.get_seq_length() == LENGTH
        assert torch.equal(cache.layers[1].keys, caches[0].layers[1].keys)


def test_any_number_of_threads_gives_the_same_bits(decoder):
    found = []
    for threads in range(1, 5):
        torch.set_num_threads(threads)
        found.append(decoder.step_rows(text(2), empty(decoder, 2)))
    torch.set_num_threads(1)
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_steps_of_one_token_follow_steps_of_many_and_the_other_way(decoder):
    ids, cache = text(), empty(decoder, room=16)  # it grows
    decoder.step_rows(ids[:, :20], cache)
    one = decoder.step(int(ids[0, 20]), cache)
    rest = decoder.step_rows(ids[:, 21:], cache)
    expected = decoder.step_rows(ids, empty(decoder))[0]
    torch.testing.assert_close(torch.cat([one[None], rest[0]]), expected[20:], rtol=1e-4, atol=1e-5)


def test_tokens_that_do_not_fit_are_refused(decoder):
    with pytest.raises(HalfplateError, match="tokens has 2 sequences, but the cache holds 1"):
        decoder.step_rows(text(2), empty(decoder))
    with pytest.raises(HalfplateError, match="wanted=38 is out of range; expected 0 to 37"):
        decoder.step_rows(text(), empty(decoder), wanted=LENGTH + 1)
