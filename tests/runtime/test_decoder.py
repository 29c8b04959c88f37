"""The native step against transformers' own forward, alone and inside `generate`."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.models.arguments import OLD_CACHE_ARGUMENT, cache_argument
from halfplate.runtime import accelerate, greedy, restore
from halfplate.runtime.cache import ROOM, GrowingCache
from halfplate.runtime.decoder import NativeDecoding
from halfplate.runtime.native_step import NativeDecoder

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one head of keys": ("llama", {"num_key_value_heads": 1}),
    "heads of 20": ("llama", {"head_dim": 20, "hidden_size": 36}),
    "heads of 64": ("llama", {"head_dim": 64}),
    "rope of llama 3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen3": ("qwen3", {"use_sliding_window": False, "layer_types": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": None, "layer_types": None}),
}
IDS = torch.tensor([[1, 17, 40, 3, 99, 5, 23]])
EXACTLY = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def models(request, tiny_model):
    """A model as transformers runs it, and a copy that decodes natively."""
    architecture, options = request.param
    plain = tiny_model(architecture, **options)
    plain.generation_config.eos_token_id = None  # greedy stops at no token that it is not given
    fast = copy.deepcopy(plain)
    assert accelerate(fast).decoder == "native"
    return plain, fast


def cached(model, cache):
    """The argument that gives a call of `model` its cache."""
    return {cache_argument(model.forward): cache}


def native_logits(model, ids, threads=1):
    """Logits of each position after the first, by the native step."""
    torch.set_num_threads(threads)
    cache = GrowingCache(model.config.num_hidden_layers)
    with torch.no_grad():
        model(input_ids=ids[:, :1], **cached(model, cache), use_cache=True)
        return torch.stack([model.native_decoder.step(int(token), cache) for token in ids[0, 1:]])


def test_every_step_gives_the_logits_of_the_whole_forward(models):
    plain, fast = models
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids).logits[0, 1:]
    torch.testing.assert_close(native_logits(fast, ids), expected, rtol=1e-4, atol=1e-5)


def test_greedy_tokens_are_those_of_transformers(models):
    plain, fast = models
    expected = plain.generate(IDS, do_sample=False, **EXACTLY)
    assert torch.equal(greedy(fast, IDS, 30), expected)
    assert torch.equal(fast.generate(IDS, do_sample=False, **EXACTLY), expected)


def test_any_number_of_threads_gives_the_same_bits(models):
    _, fast = models
    results = [native_logits(fast, IDS, threads) for threads in range(1, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.fixture
def fast(tiny_model):
    model = tiny_model()
    accelerate(model)
    return model


def counted(model, monkeypatch):
    """The steps that the native decoder makes from here on."""
    steps, step = [], NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda *arguments: steps.append(1) or step(*arguments))
    return steps


@pytest.mark.parametrize(
    ("settings", "natively"),
    [
        ({"do_sample": True, "temperature": 0.9, "top_k": 20}, True),
        ({"do_sample": False, "repetition_penalty": 1.3}, True),
        ({"do_sample": False, "cache_implementation": "hybrid"}, True),
        ({"do_sample": False, "use_cache": False}, False),
        ({"do_sample": False, "cache_implementation": "static"}, False),
        ({"do_sample": False, "prompt_lookup_num_tokens": 2}, False),
    ],
    ids=str,
)
def test_generate_gives_what_transformers_gives(tiny_model, fast, monkeypatch, settings, natively):
    found = []
    steps = counted(fast, monkeypatch)
    for model in (tiny_model(), fast):
        torch.manual_seed(3)
        found.append(model.generate(IDS, **EXACTLY, **settings))
    assert torch.equal(*found)
    assert len(steps) == (29 if natively else 0)


def test_batches_and_padding_give_what_transformers_gives(tiny_model, fast):
    ids = torch.tensor([[0, 0, 5, 9], [4, 8, 1, 2]])
    mask = (ids > 0).long()
    expected = tiny_model().generate(ids, attention_mask=mask, do_sample=False, **EXACTLY)
    assert torch.equal(fast.generate(ids, attention_mask=mask, do_sample=False, **EXACTLY), expected)
    left, mask = torch.tensor([[0, 0, 5, 9]]), torch.tensor([[0, 0, 1, 1]])
    expected = tiny_model().generate(left, attention_mask=mask, do_sample=False, **EXACTLY)
    assert torch.equal(fast.generate(left, attention_mask=mask, do_sample=False, **EXACTLY), expected)


def test_a_text_longer_than_the_room_of_the_cache(tiny_model):
    plain = tiny_model(max_position_embeddings=2 * ROOM)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    count = ROOM + 20
    expected = plain.generate(IDS, do_sample=False, **(EXACTLY | {"max_new_tokens": count}))
    assert torch.equal(greedy(fast, IDS, count), expected)


def test_greedy_stops_tells_and_refuses(fast):
    whole = greedy(fast, IDS, 12)
    stop = int(whole[0, 10])
    first = whole[0, 7:].tolist().index(stop)
    assert torch.equal(greedy(fast, IDS, 12, stop_ids=[stop]), whole[:, : 7 + first + 1])
    told = []
    greedy(fast, IDS, 12, on_token=told.append)
    assert told == whole[0, 7:].tolist()
    assert torch.equal(greedy(fast, IDS, 0), IDS)
    with pytest.raises(HalfplateError, match=r"ids has shape \(2, 7\)"):
        greedy(fast, IDS.expand(2, -1), 3)


def test_nan_in_the_weights_is_seen_in_the_logits(fast):
    with torch.no_grad():
        fast.model.embed_tokens.weight[9] = float("nan")
    cache = GrowingCache(2)
    with torch.no_grad():
        fast(input_ids=IDS, **cached(fast, cache), use_cache=True)
        assert fast.native_decoder.step(10, cache).isfinite().all()
        assert fast.native_decoder.step(9, cache).isnan().all()
    with pytest.raises(HalfplateError, match="token=500 is outside the vocabulary of 128"):
        fast.native_decoder.step(500, cache)


def test_a_cache_is_cropped_and_reset_like_transformers_own(tiny_model):
    model, cache = tiny_model(), GrowingCache(2)
    with torch.no_grad():
        expected = model(IDS).logits[:, -1]
        model(input_ids=torch.cat([IDS, IDS], 1), **cached(model, cache), use_cache=True)
        with suppress(ValueError):  # later versions of transformers refuse a positive number
            cache.crop(12)
            assert cache.get_seq_length() == 12
        cache.crop(6 - cache.get_seq_length())
        assert cache.get_seq_length() == 6
        torch.testing.assert_close(model(input_ids=IDS[:, 6:], **cached(model, cache)).logits[:, -1], expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(input_ids=IDS, **cached(model, cache)).logits[:, -1], expected)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.layers[0].keys.shape[:3] == (2, 2, 7)
        assert cache.sequences == 2


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("opt", {}, "OPTForCausalLM has no native step"),
        ("llama", {"hidden_act": "relu"}, "the activation 'relu' has no native step"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
        ("olmo", {"clip_qkv": 0.5}, "clip_qkv=0.5 has no native step"),
        ("mixtral", {"num_local_experts": 4}, "the experts of layer 0 are not separate linears"),
    ],
)
def test_models_of_another_kind_say_why(tiny_model, architecture, options, reason):
    model = tiny_model(architecture, **options)
    expected = model.generate(IDS, do_sample=False, **EXACTLY)
    assert reason in accelerate(model).decoder
    assert torch.equal(greedy(model, IDS, 30), expected)


def test_what_is_saved_does_not_change(tiny_model, fast, tmp_path):
    for name, model in (("plain", tiny_model()), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    for file in sorted(Path(tmp_path / "plain").iterdir()):
        assert (tmp_path / "fast" / file.name).read_bytes() == file.read_bytes(), file.name


def test_restore_takes_the_native_step_away(tiny_model, fast):
    assert isinstance(fast, NativeDecoding)
    restore(fast)
    assert type(fast) is type(tiny_model())
    accelerate(fast)
    assert torch.equal(greedy(fast, IDS, 30), tiny_model().generate(IDS, do_sample=False, **EXACTLY))


def prefilled(model, ids):
    cache = GrowingCache(model.config.num_hidden_layers)
    model(input_ids=ids, **cached(model, cache), use_cache=True)
    return cache


@torch.no_grad()
def test_sequences_take_turns_and_caches_move(fast):
    texts = [IDS, IDS.flip(1)[:, :4]]
    expected = [greedy(fast, ids, 8)[0, ids.shape[1] :].tolist() for ids in texts]
    caches = [prefilled(fast, ids[:, :-1]) for ids in texts]
    tokens = [[int(ids[0, -1])] for ids in texts]
    for step in range(8):
        for cache, said in zip(caches, tokens, strict=True):
            # A buffer that moved is found again, whichever layer it belongs to.
            layer = cache.layers[step % 2]
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            said.append(int(fast.native_decoder.step(said[-1], cache).argmax()))
    assert [said[1:] for said in tokens] == expected


def test_threads_of_python_share_a_model(fast):
    texts = [IDS.roll(shift, 1) for shift in range(4)]
    expected = [greedy(fast, ids, 20) for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: greedy(fast, ids, 20), texts))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(fast, tiny_model):
    other = prefilled(tiny_model(num_key_value_heads=1), IDS)
    with pytest.raises(HalfplateError, match=r"layers of shapes .* expected 2 of fp32 \(1, 2, 256, 8\)"):
        fast.native_decoder.step(3, other)
    batch = prefilled(tiny_model(), IDS.expand(2, -1))
    with pytest.raises(HalfplateError, match="one sequence"):
        fast.native_decoder.step(3, batch)


@torch.no_grad()
def test_weights_that_change_between_texts_are_seen(fast, tiny_model):
    greedy(fast, IDS, 5)
    other = tiny_model(seed=1)
    accelerate(other)
    fast.set_submodule("model.layers.1.mlp.down_proj", other.model.layers[1].mlp.down_proj)
    fast.model.norm.weight = other.model.norm.weight
    restored = copy.deepcopy(fast)
    restore(restored)
    assert torch.equal(greedy(fast, IDS, 30), greedy(restored, IDS, 30))


@torch.no_grad()
def test_hooks_inside_the_model_are_called(fast, monkeypatch):
    expected, steps, seen = greedy(fast, IDS, 10), counted(fast, monkeypatch), []
    handle = fast.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(greedy(fast, IDS, 10), expected)
    assert torch.equal(fast.generate(IDS, do_sample=False, **(EXACTLY | {"max_new_tokens": 10})), expected)
    assert (len(seen), len(steps)) == (20, 0)
    handle.remove()
    assert torch.equal(greedy(fast, IDS, 10), expected)
    assert len(steps) == 9


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_decode_natively_on_their_own(fast, monkeypatch, duplicate):
    expected = greedy(fast, IDS, 30)
    twin = duplicate(fast)
    restore(fast)
    steps = counted(twin, monkeypatch)
    assert torch.equal(greedy(twin, IDS, 30), expected)
    assert len(steps) == 29


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float16), ("gemma3_text", torch.bfloat16), ("gemma2", torch.float16)],
)
@torch.no_grad()
def test_a_model_in_halves_decodes_natively(tiny_model, monkeypatch, architecture, dtype):
    plain = tiny_model(architecture).to(dtype)
    fast = copy.deepcopy(plain)
    assert accelerate(fast).decoder == "native"
    steps = counted(fast, monkeypatch)
    found = fast.generate(IDS, do_sample=False, output_logits=True, return_dict_in_generate=True, **EXACTLY)
    assert len(steps) == 29
    assert getattr(found, cache_argument(fast.forward)).layers[0].keys.dtype == dtype
    # The step itself is in fp32: nearer to the exact model than transformers in halves.
    exact = plain.float()(found.sequences).logits[0, IDS.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(found.logits), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    assert torch.equal(greedy(fast, IDS, 30), found.sequences)


@pytest.mark.slow
def test_assisted_decoding_works_both_ways(tiny_model, fast):
    plain = tiny_model()
    expected = plain.generate(IDS, do_sample=False, **EXACTLY)
    for main, assistant in ((fast, plain), (plain, fast)):
        assert torch.equal(main.generate(IDS, do_sample=False, assistant_model=assistant, **EXACTLY), expected)


@torch.no_grad()
def test_calls_that_ask_for_more_take_the_ordinary_path(tiny_model, fast, monkeypatch):
    plain, steps, token = tiny_model(), counted(fast, monkeypatch), torch.tensor([[5]])
    for options in (
        {"attention_mask": torch.tensor([[0] + [1] * 7])},
        {"position_ids": torch.tensor([[9]])},
        {"output_hidden_states": True},
        {"labels": token},
        {"return_dict": False},
        {"logits_to_keep": torch.tensor([0])},
    ):
        found, expected = (m(input_ids=token, **cached(m, prefilled(m, IDS)), **options) for m in (fast, plain))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not steps
    with torch.enable_grad():
        fast(input_ids=token, **cached(fast, prefilled(fast, IDS)))
    assert not steps
    fast(input_ids=token, **cached(fast, prefilled(fast, IDS)), attention_mask=torch.ones(1, 8))
    assert len(steps) == 1


def test_a_cache_outlives_inference_mode(fast):
    whole = greedy(fast, IDS, 6)
    with torch.inference_mode():
        found = fast.generate(IDS, do_sample=False, return_dict_in_generate=True, **(EXACTLY | {"max_new_tokens": 3}))
    sequence, cache = found.sequences.clone(), getattr(found, cache_argument(fast.forward))
    longer = fast.generate(sequence, **cached(fast, cache), do_sample=False, **(EXACTLY | {"max_new_tokens": 3}))
    assert torch.equal(longer, whole)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_trace_the_ordinary_forward(fast):
    expected = fast(IDS).logits
    torch.testing.assert_close(torch.compile(fast, backend="eager")(IDS).logits, expected)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_no_name_of_an_argument_is_out_of_date(fast):
    greedy(fast, IDS, 3)
    fast.generate(IDS, do_sample=False, **EXACTLY)


@torch.no_grad()
def test_a_cache_under_its_old_name_decodes_natively_too(fast, monkeypatch):
    steps, token = counted(fast, monkeypatch), torch.tensor([[5]])
    expected = fast(input_ids=token, **cached(fast, prefilled(fast, IDS))).logits
    cache = prefilled(fast, IDS)
    found = fast(input_ids=token, **{OLD_CACHE_ARGUMENT: cache})
    assert torch.equal(found.logits, expected)
    assert getattr(found, cache_argument(fast.forward)) is cache
    fast.generate(IDS, **{OLD_CACHE_ARGUMENT: GrowingCache(2)}, do_sample=False, **EXACTLY)
    assert len(steps) == 2 + 29
