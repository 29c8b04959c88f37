"""Keys and values in bf16 and int8, in the native step and in transformers' forward."""

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.models.arguments import cache_argument
from halfplate.runtime import accelerate, greedy
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.kept import CACHE_DTYPES, to_codes
from native_batches import batch_logits

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

NARROW = [torch.bfloat16, torch.int8]
IDS = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast(tiny_model):
    model = tiny_model("llama", head_dim=16)
    accelerate(model)
    return model


def test_codes_are_the_nearest_of_a_vector():
    states = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(0)) * 4
    states[0, 0, 0], states[0, 0, 1, 3], states[0, 0, 2] = 0, torch.inf, 1e-38
    codes, scales = to_codes(states)
    assert scales[0, 0, 0] == 0
    assert scales[0, 0, 1].isnan()
    assert not codes[0, 0, :3].any()
    read = codes.float() * scales[..., None]
    assert bool((codes.abs().amax(-1).flatten()[3:] == 127).all())
    largest = states.abs().amax(-1, keepdim=True)
    assert bool(((read - states).abs() <= largest / 127 * 0.501)[1:].all())


@pytest.mark.parametrize("dtype", [None, *NARROW])
def test_a_cache_keeps_its_type_when_it_grows_moves_and_is_cut(dtype):
    cache = GrowingCache(1, dtype)
    states = torch.randn(2, 3, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    for start in range(0, 300, 50):
        keys, values = cache.update(*states[:, :, :, start : start + 50], 0)
    assert cache.kept_dtype == (dtype or torch.float32)
    assert cache.sequences == 3
    tolerance = {None: 0, torch.bfloat16: 0.01, torch.int8: 0.02}[dtype]
    torch.testing.assert_close(torch.stack([keys, values]), states, rtol=0, atol=tolerance * 4)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.crop(-40)
    torch.testing.assert_close(cache.layers[0].keys, keys[[2, 2, 0], :, :260], rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", NARROW)
def test_the_step_reads_and_writes_what_torch_does(fast, dtype):
    """Keys and values of a prompt that transformers read are followed by those of the step, and the other way round."""
    logits = []
    for steps in (0, 1, 8, 24):
        cache = GrowingCache.with_room(2, 1, 2, 16, 16, dtype)
        with torch.no_grad():
            before = IDS[:, : 24 - steps]
            first = (
                fast(input_ids=before, use_cache=True, **{cache_argument(fast.forward): cache}).logits[:, -1:]
                if steps < 24
                else None
            )
            last = fast.native_decoder.step_rows(IDS[:, 24 - steps :], cache)[:, -1:] if steps else first
        logits.append(last)
        assert cache.kept_dtype == dtype
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], rtol=1e-2, atol=1e-2 * float(logits[0].abs().max()))


@needs_native
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_types_lose_little_and_threads_change_nothing(fast, dtype):
    ids, mask = IDS.reshape(2, 12), torch.ones(2, 12, dtype=torch.int64)
    exact = batch_logits(fast, ids, mask)
    found = [batch_logits(fast, ids, mask, threads, dtype) for threads in (1, 3)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], exact)
    torch.testing.assert_close(found[0], exact, rtol=0.03, atol=0.03 * float(exact.abs().max()))


@needs_native
def test_nan_stays_in_its_sequence_of_a_cache_in_int8(fast):
    ids, mask = IDS.reshape(2, 12).clone(), torch.ones(2, 12, dtype=torch.int64)
    ids[1] = ids[1].clamp_max(90)
    clean = batch_logits(fast, ids, mask, dtype=torch.int8)
    ids[0, 4] = 100
    fast.model.embed_tokens.weight.data[100] = torch.nan
    fast._native_decoder = None
    found = batch_logits(fast, ids, mask, dtype=torch.int8)
    assert found[0, 4:].isnan().all()
    assert torch.equal(found[1], clean[1])


@needs_native
def test_greedy_decodes_with_every_type(fast):
    texts = {name: greedy(fast, IDS, 30, cache=GrowingCache(2, dtype)) for name, dtype in CACHE_DTYPES.items()}
    assert torch.equal(texts["fp32"], greedy(fast, IDS, 30))
    for name, dtype in CACHE_DTYPES.items():
        assert torch.equal(texts[name], greedy(fast, IDS, 30, cache=GrowingCache(2, dtype), lookup=7))


@needs_native
def test_heads_that_are_no_whole_vectors_are_refused(tiny_model):
    model = tiny_model("llama", head_dim=20)
    accelerate(model)
    with pytest.raises(HalfplateError, match="needs heads of a multiple of 16 numbers; this model has heads of 20"):
        greedy(model, IDS, 3, cache=GrowingCache(2, torch.int8))
