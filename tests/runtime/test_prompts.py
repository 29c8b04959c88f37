"""Texts whose keys and values are used again, in memory and in a file."""

import json

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.models.arguments import cache_argument
from halfplate.runtime import accelerate, greedy
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.kept import CACHE_DTYPES
from halfplate.runtime.prompt_file import RECORD, PromptFile, model_fingerprint
from halfplate.runtime.prompts import Prompt, Prompts, Sequenced, begin, check_cache_dtype, side_by_side
from halfplate.storage.tensor_file import read_header, read_metadata, read_tensor, write_file

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

TEXT = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast(tiny_model):
    model = tiny_model("llama", head_dim=16)
    accelerate(model)
    return model


def read(model, tokens, dtype=None):
    cache = GrowingCache(2, dtype)
    with torch.no_grad():
        model(input_ids=tokens[None], use_cache=True, **{cache_argument(model.forward): cache})
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_text_that_begins_like_another_is_continued_in_the_same_way(fast, dtype):
    prompt = Prompt.of(read(fast, TEXT[:30], dtype), TEXT[:30])
    other = torch.cat([TEXT[:20], TEXT[:9]])
    for ids, shared in ((TEXT, 30), (other, 20), (TEXT[:30], 29), (TEXT[5:], 0)):
        cache = begin(fast, prompt, ids, dtype)
        assert cache.get_seq_length() == shared
        expected = greedy(fast, ids[None], 30, cache=GrowingCache(2, dtype))
        assert torch.equal(greedy(fast, ids[None], 30, cache=cache), expected)
        assert cache.kept_dtype == dtype
    # A cache is a copy.
    assert torch.equal(
        prompt.layers[1][0].numbers, Prompt.of(read(fast, TEXT[:30], dtype), TEXT[:30]).layers[1][0].numbers
    )


def test_the_oldest_texts_leave_and_longer_ones_take_the_place_of_shorter_ones(fast):
    cache = read(fast, TEXT)
    one = Prompt.of(cache, TEXT[:10])
    prompts = Prompts(3 * one.nbytes)
    others = [torch.cat([torch.tensor([start]), TEXT[1:10]]) for start in (3, 4, 5, 6)]
    for tokens in others[:3]:
        prompts.keep(Prompt.of(cache, tokens))
    assert prompts.shared(others[0]) == 9  # never all of them
    prompts.cache(fast, others[0])
    prompts.keep(Prompt.of(cache, others[3]))
    assert [prompts.shared(tokens) for tokens in others] == [9, 0, 9, 9]
    prompts.keep(Prompt.of(cache, torch.cat([others[3], TEXT[:5]])))
    assert len(prompts.kept) == 2
    assert prompts.nbytes <= prompts.most
    prompts.keep(Prompt.of(cache, others[3]))  # is known
    assert len(prompts.kept) == 2
    prompts.keep(Prompt.of(cache, torch.cat([others[0], TEXT[:30]])))  # too long
    assert prompts.shared(others[0]) == 9
    assert prompts.shared(torch.cat([others[0], TEXT[:30]])) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_caches_side_by_side_are_a_batch_with_padding(fast, dtype):
    texts = [TEXT[:12], TEXT[3:9], TEXT[20:40]]
    cache = side_by_side(fast, [Sequenced(read(fast, text[:-1], dtype)) for text in texts], 19)
    ids, mask = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 20, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, 20 - len(text) :], mask[row, 20 - len(text) :] = text, 1
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = fast.generate(ids, attention_mask=mask, **{cache_argument(fast.forward): cache}, **options)
    for row, text in enumerate(texts):
        expected = greedy(fast, text[None], 15, cache=GrowingCache(2, dtype))[0]
        assert torch.equal(found[row, 20 - len(text) :], expected)
        kept = Prompt.of(cache, expected[:-1], row, 20 - len(text))
        again = begin(fast, kept, expected, dtype)
        assert torch.equal(
            greedy(fast, expected[None], 5, cache=again), greedy(fast, text[None], 20, cache=GrowingCache(2, dtype))
        )


def continued(model, path, ids, dtype=torch.float32):
    """The continuation of `ids` with the file, and how many of them were in it."""
    file = PromptFile(model, path, dtype)
    cache = begin(model, file.prompt, ids, dtype)
    known = cache.get_seq_length()
    found = greedy(model, ids[None], 12, cache=cache)
    file.keep(cache, ids)
    file.write()
    return found, known


@pytest.mark.parametrize("dtype", CACHE_DTYPES.values())
def test_a_file_holds_the_last_prompt(fast, tmp_path, dtype):
    path = tmp_path / "prompt"
    for ids, known in ((TEXT[:20], 0), (TEXT[:20], 19), (TEXT, 20), (torch.cat([TEXT[:15], TEXT[:5]]), 15)):
        found, shared = continued(fast, path, ids, dtype)
        assert shared == known
        assert torch.equal(found, greedy(fast, ids[None], 12, cache=GrowingCache(2, dtype)))
    before = path.stat().st_mtime_ns
    continued(fast, path, TEXT[:15], dtype)  # the file begins with it
    assert path.stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompt"]


def test_a_file_of_another_model_version_or_type_is_refused_and_kept(fast, tiny_model, tmp_path):
    path = tmp_path / "prompt"
    continued(fast, path, TEXT)
    whole = path.read_bytes()
    with pytest.raises(HalfplateError, match="holds keys and values in fp32, and another --cache-dtype"):
        PromptFile(fast, path, torch.int8)
    other = tiny_model("llama", head_dim=16)
    accelerate(other)
    assert model_fingerprint(other) == model_fingerprint(fast)
    other.model.norm.weight.data[3] += 1
    with pytest.raises(HalfplateError, match=r"prompt' is of another model.*give another file, or delete"):
        PromptFile(other, path, torch.float32)
    tensors = {name: read_tensor(stored) for name, stored in read_header(path).items()}
    record = json.loads(read_metadata(path)[RECORD])

    def damaged(message, changed=tensors, **fields):
        write_file(path, changed, metadata={RECORD: json.dumps(record | fields)})
        with pytest.raises(HalfplateError, match=message):
            PromptFile(fast, path, torch.float32)

    damaged("is of version 2, and this halfplate writes version 1", version=2)
    damaged("its tokens are not those of its record", tensors | {"tokens": tensors["tokens"].flip(0)})
    damaged("it has no 1.values", {name: tensor for name, tensor in tensors.items() if name != "1.values"})
    damaged("layer 0 has torch.float32", tensors | {"0.keys": tensors["0.keys"][:, :, :5]})
    damaged("layer 1 has", tensors | {"1.values": tensors["1.values"].bfloat16()})
    damaged("layer 0 has", tensors | {"0.keys.scales": torch.ones(1, 2, 40)})
    damaged("its model computes in 'int8'", dtype="int8")
    damaged("is damaged", tensors | {"tokens": tensors["tokens"].int()})
    write_file(path, tensors)
    with pytest.raises(HalfplateError, match="is not a prompt cache"):
        PromptFile(fast, path, torch.float32)
    for data in (whole[: len(whole) // 2], b"something else", b""):
        path.write_bytes(data)
        with pytest.raises(HalfplateError):
            PromptFile(fast, path, torch.float32)
        assert path.read_bytes() == data


def test_models_and_places_that_cannot_be_used_are_refused(fast, tiny_model, tmp_path):
    with pytest.raises(HalfplateError, match="--prompt-cache cannot be used with this model"):
        PromptFile(tiny_model(), tmp_path / "prompt", torch.float32)
    with pytest.raises(
        HalfplateError, match="cache_dtype='int8' cannot be used with this model: it does not decode natively"
    ):
        check_cache_dtype(tiny_model(), "int8")
    with pytest.raises(HalfplateError, match="cache_dtype='fp8' is not one of fp32, bf16, int8"):
        check_cache_dtype(fast, "fp8")
    with pytest.raises(HalfplateError, match="is not a regular file"):
        PromptFile(fast, tmp_path, torch.float32)
    with pytest.raises(HalfplateError, match="cannot be written"):
        continued(fast, tmp_path / "no folder" / "prompt", TEXT)


def test_a_model_in_another_type_reads_its_own_keys(tiny_model, tmp_path):
    model = tiny_model("llama", head_dim=16).to(torch.bfloat16)
    accelerate(model)
    # The scales of codes are in fp16, and transformers takes the type of the last parameter for that of the model.
    model.register_parameter("scales", torch.nn.Parameter(torch.ones(1, dtype=torch.float16), requires_grad=False))
    for ids, known in ((TEXT[:20], 0), (TEXT, 20)):
        found, shared = continued(model, tmp_path / "prompt", ids)
        assert shared == known
        assert torch.equal(found, greedy(model, ids[None], 12))
