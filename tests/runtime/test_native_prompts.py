"""Prompts read by the native step, against transformers' own forward."""

import copy
from unittest import mock

import pytest
import torch

import halfplate
from conftest import build_model
from decoding_cases import CASES, close
from halfplate.kernels import linear, native
from halfplate.models.arguments import cache_argument
from halfplate.models.experts import linear_experts
from halfplate.recipe import Recipe
from halfplate.runtime import accelerate, native_step
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.calls import LEAST_PROMPT
from halfplate.runtime.native_step import NativeDecoder

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

# Heads of whole vectors, whose positions are attended in blocks. The heads of Helium follow from its hidden size.
WIDE = {
    name: (kind, options | {"head_dim": 16})
    for name, (kind, options) in CASES.items()
    if "head_dim" in options and kind != "helium"
}
LENGTH = 40


def logits_of(model, ids, mask, kept=0, at_once=512, cache=None):
    """Logits and the cache of a prompt with padding on the left, through `forward`; the native step takes every prompt."""
    cache = cache or GrowingCache(model.config.num_hidden_layers)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    settings = {cache_argument(model.forward): cache, "use_cache": True, "logits_to_keep": kept}
    always = mock.patch.object(NativeDecoder, "takes_prompt", return_value=True)
    with torch.no_grad(), always, mock.patch.object(native_step, "ROWS_AT_ONCE", at_once):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **settings).logits
    return logits, cache


def texts(count, vocabulary=128):
    ids = torch.randint(3, vocabulary, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(LENGTH) >= torch.arange(count)[:, None] * 5).long()
    return ids * mask, mask


@pytest.mark.parametrize(("kind", "options"), WIDE.values(), ids=WIDE.keys())
def test_the_logits_of_a_prompt_are_those_of_transformers(kind, options):
    plain = build_model(kind, **options)
    fast = linear_experts(copy.deepcopy(plain))
    assert accelerate(fast).decoder == "native"
    ids, mask = texts(2)
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for at_once in (512, 24):
        found, cache = logits_of(fast, ids, mask, at_once=at_once)
        assert fast._native_decoder is not None
        assert cache.get_seq_length() == LENGTH
        close(found[mask.bool()], expected[mask.bool()])


@pytest.fixture(scope="module")
def llama():
    model = build_model("llama", head_dim=16)
    accelerate(model)
    return model


def test_only_the_last_logits_are_computed_if_asked(llama):
    ids, mask = texts(3)
    every, _ = logits_of(llama, ids, mask)
    last, _ = logits_of(llama, ids, mask, kept=2, at_once=30)
    close(last, every[:, -2:])


def test_a_prompt_continues_a_cache(llama):
    ids, mask = texts(1)
    whole, cache = logits_of(llama, ids.repeat(1, 2), torch.ones(1, 2 * LENGTH, dtype=torch.int64))
    _, begun = logits_of(llama, ids, mask)
    rest, begun = logits_of(llama, ids, torch.ones(1, 2 * LENGTH, dtype=torch.int64), cache=begun)
    close(rest, whole[:, LENGTH:])
    close(begun.layers[1].keys, cache.layers[1].keys)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.int8, 3e-2)])
def test_narrower_caches_lose_little(llama, dtype, error):
    ids, mask = texts(2)
    exact, _ = logits_of(llama, ids, mask)
    cache = GrowingCache(llama.config.num_hidden_layers, dtype)
    # Only later tokens read what the first ones left in the cache.
    found, cache = logits_of(llama, ids, mask, at_once=LENGTH, cache=cache)
    assert cache.layers[0].kept_keys.numbers.dtype == dtype
    assert 0 < float((found - exact)[mask.bool()].norm() / exact[mask.bool()].norm()) < error


def test_results_do_not_depend_on_threads(llama):
    ids, mask = texts(2)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(logits_of(llama, ids, mask)[0])
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nan_stays_in_its_sequence(llama):
    ids, mask = texts(2)
    model = copy.deepcopy(llama)
    with torch.no_grad():
        embedding = model.get_input_embeddings()
        embedding.weight = torch.nn.Parameter(embedding.weight.detach().float().clone())
        embedding.weight[1] = torch.nan
    ids[0, 20] = 1
    found, _ = logits_of(model, ids, mask)
    assert found[0, 20:].isnan().all()
    assert found[1, 5:].isfinite().all()


def test_floats_go_through_torch_and_codes_natively(compressed_once):
    folder = str(compressed_once(Recipe(method="rtn", pattern="dense", core_dtype="nl4", group_size=32)))
    ids = torch.randint(3, 100, (1, LEAST_PROMPT))
    for activations, native_prompt in (("float", False), ("auto", linear.multiplies_bytes())):
        model = halfplate.load(folder, activations=activations)
        cache = GrowingCache(model.config.num_hidden_layers)
        with (
            mock.patch.object(NativeDecoder, "read", side_effect=NativeDecoder.read, autospec=True) as read,
            torch.no_grad(),
        ):
            model(input_ids=ids, use_cache=True, **{cache_argument(model.forward): cache})
        assert bool(read.call_count) == native_prompt


@pytest.mark.parametrize("tokens", [LEAST_PROMPT, 100])
def test_the_scratch_of_a_mixture_has_room_for_rounded_inputs(tokens, monkeypatch):
    """Every token goes to every expert, so that each has many rows; nothing behind the scratch is written."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 4, "intermediate_size": 512, "hidden_size": 256}
    model = linear_experts(build_model("mixtral", **sizes, head_dim=16, sliding_window=None))
    assert accelerate(model, dense_dtype="int8").decoder == "native"
    bind, untouched, beyond = NativeDecoder._bind, 7.25, 2**20

    def with_canary(self, *rest):
        bind(self, *rest)
        count, struct = self._struct.sized_floats, self._struct
        scratch = torch.full((count + beyond + 16,), untouched, dtype=torch.float32)
        start = -scratch.data_ptr() % 64
        self._scratch, struct.scratch, struct.scratch_bytes = (
            scratch,
            scratch.data_ptr() + start,
            scratch.nbytes - start,
        )
        self.canary = scratch[start // 4 + count :]

    monkeypatch.setattr(NativeDecoder, "_bind", with_canary)
    ids = torch.randint(3, 100, (1, tokens))
    logits_of(model, ids, torch.ones_like(ids), kept=1)
    assert bool((model.native_decoder.canary == untouched).all())
