"""The native step of every architecture against transformers' own forward: the logits of a prompt and of the tokens after it."""

import copy
import re
from unittest import mock

import pytest
import torch

import tiny_models
from causal_models import MOE
from conftest import ROOT, build_model
from decoding_cases import CASES, HEAD, close, decoding_model
from halfplate.kernels import native
from halfplate.models.arguments import cache_argument
from halfplate.models.experts import linear_experts
from halfplate.runtime import accelerate, greedy
from halfplate.runtime.architectures import ARCHITECTURES
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.native_step import NativeDecoder
from native_batches import batch_logits

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

# Models that also read images, with their model types.
WRAPPERS = {"Gemma3ForConditionalGeneration": "gemma3", "Mistral3ForConditionalGeneration": "mistral3"}
TEXT = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(0))
PROMPT = 9
EXACTLY = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def models(request):
    """A model as transformers runs it, and a copy that decodes natively."""
    kind, options = request.param
    plain = decoding_model(kind, options)
    fast = linear_experts(copy.deepcopy(plain))
    assert accelerate(fast).decoder == "native"
    return plain, fast


@torch.no_grad()
def single_logits(model, threads=1):
    """Logits after each token of TEXT behind its prompt, by the step."""
    torch.set_num_threads(threads)
    cache = GrowingCache(model.config.num_hidden_layers)
    model(input_ids=TEXT[:, :PROMPT], use_cache=True, **{cache_argument(model.forward): cache})
    return torch.stack([model.native_decoder.step(int(token), cache) for token in TEXT[0, PROMPT:]])


def padded(count):
    """Texts (count, 24) with padding on the left, and their mask."""
    ids = torch.randint(3, 128, (count, 24), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(24) >= torch.arange(count)[:, None] % 7 * 2).long()
    return ids * mask, mask


def test_every_architecture_has_a_case():
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    assert all(kind in CONFIG_MAPPING for kind, _ in CASES.values())
    assert {NAMES[kind] for kind, _ in CASES.values()} | WRAPPERS.keys() == set(ARCHITECTURES)


def test_the_document_names_every_class():
    text = (ROOT / "docs" / "decoding.md").read_text()
    assert set(re.findall(r"`(\w+For(?:CausalLM|ConditionalGeneration))`", text)) == set(ARCHITECTURES)


@torch.no_grad()
def test_decoded_tokens_have_the_logits_of_the_whole_forward(models):
    plain, fast = models
    close(single_logits(fast), plain(TEXT).logits[0, PROMPT:])


@pytest.mark.parametrize("count", [3, 19])
@torch.no_grad()
def test_padded_batches_have_the_logits_of_the_whole_forward(models, count):
    plain, fast = models
    ids, mask = padded(count)
    expected = plain(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for at_once in (1, 7):
        close(batch_logits(fast, ids, mask, at_once=at_once)[mask > 0], expected[mask > 0])


def test_any_number_of_threads_gives_the_same_bits(models):
    _, fast = models
    assert torch.equal(single_logits(fast), single_logits(fast, threads=3))
    for at_once in (1, 5):
        found = [batch_logits(fast, *padded(5), threads, at_once=at_once) for threads in (1, 3)]
        assert torch.equal(*found)


def test_generate_gives_what_transformers_gives(models):
    plain, fast = models
    plain.generation_config.eos_token_id = fast.generation_config.eos_token_id = None
    prompt = TEXT[:, :PROMPT]
    expected = plain.generate(prompt, **EXACTLY)
    assert torch.equal(greedy(fast, prompt, 12), expected)
    ids, mask = (part[:, -PROMPT:] for part in padded(4))
    expected = plain.generate(ids, attention_mask=mask, **EXACTLY)
    assert torch.equal(fast.generate(ids, attention_mask=mask, **EXACTLY), expected)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 5.0],
    "original_max_position_embeddings": 12,
}


@pytest.fixture
def long_models():
    """The same for a model whose angles change at every position once a text is longer than 12 tokens."""
    entries = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12, "sliding_window": None}
    plain = build_model("phi3", **entries)
    fast = copy.deepcopy(plain)
    assert accelerate(fast).decoder == "native"
    plain.generation_config.eos_token_id = fast.generation_config.eos_token_id = None
    return plain, fast


@pytest.mark.parametrize("prompt", [5, 11, 12, 13, 20])
def test_texts_become_longer_than_the_short_angles_of_longrope(long_models, prompt):
    plain, fast = long_models
    expected = plain.generate(TEXT[:, :prompt], **EXACTLY)
    assert torch.equal(greedy(fast, TEXT[:, :prompt], 12), expected)
    assert torch.equal(fast.generate(TEXT[:, :prompt], **EXACTLY), expected)


@pytest.mark.parametrize("length", [8, 20])
@torch.no_grad()
def test_the_longest_text_of_a_batch_chooses_the_angles_of_longrope(long_models, length):
    ids, mask = (part[:, -length:] for part in padded(5))
    mask[0] = 1
    found = []
    for model in long_models:
        cache = GrowingCache(2)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        arguments = {
            cache_argument(model.forward): cache,
            "attention_mask": mask[:, :-1],
            "position_ids": positions[:, :-1],
        }
        model(input_ids=ids[:, :-1], **arguments)
        arguments |= {"attention_mask": mask, "position_ids": positions[:, -1:]}
        found.append(model(input_ids=ids[:, -1:], **arguments).logits)
    close(*found)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@torch.no_grad()
def test_nan_stays_in_its_sequence_of_a_mixture(kind):
    fast = linear_experts(build_model(kind, **MOE | HEAD))
    accelerate(fast)
    clean = batch_logits(fast, *padded(4))
    fast.model.embed_tokens.weight[padded(4)[0][2, -1]] = torch.nan
    fast._native_decoder = None
    found = batch_logits(fast, *padded(4))
    assert found[2, -1].isnan().all()
    others = torch.arange(4) != 2
    assert torch.equal(found[others, -1], clean[others, -1])


@pytest.fixture(params=WRAPPERS.items(), ids=WRAPPERS.keys())
def wrappers(request):
    """The same for a model that also reads images."""
    name, kind = request.param
    plain = tiny_models.build_model(kind, wrapper=True)
    assert type(plain).__name__ == name
    plain.generation_config.eos_token_id = None
    fast = copy.deepcopy(plain)
    assert accelerate(fast).decoder == "native"
    return plain, fast


def test_models_that_read_images_decode_text_natively(wrappers):
    plain, fast = wrappers
    prompt = TEXT[:, :PROMPT]
    expected = plain.generate(prompt, **EXACTLY)
    assert torch.equal(greedy(fast, prompt, 12), expected)
    ids, mask = (part[:, -PROMPT:] for part in padded(4))
    expected = plain.generate(ids, attention_mask=mask, **EXACTLY)
    with mock.patch.object(NativeDecoder, "step_rows", autospec=True, side_effect=NativeDecoder.step_rows) as step:
        assert torch.equal(fast.generate(ids, attention_mask=mask, **EXACTLY), expected)
    assert step.call_count == 11


@torch.no_grad()
def test_a_prompt_with_an_image_decodes_natively_afterwards():
    plain = tiny_models.build_model("gemma3", wrapper=True)
    fast = copy.deepcopy(plain)
    assert accelerate(fast).decoder == "native"
    image = plain.config.image_token_id
    ids = torch.tensor([[5, 9, *[image] * plain.config.mm_tokens_per_image, 7, 8]])
    size = plain.config.vision_config.image_size
    inputs = {"input_ids": ids, "token_type_ids": (ids == image).long(), "pixel_values": torch.randn(1, 3, size, size)}
    expected = plain.generate(**inputs, **EXACTLY)
    with mock.patch.object(NativeDecoder, "step", autospec=True, side_effect=NativeDecoder.step) as step:
        assert torch.equal(fast.generate(**inputs, **EXACTLY), expected)
    assert step.call_count == 11
