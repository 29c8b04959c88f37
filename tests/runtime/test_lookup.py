"""Drafts from the text itself, and greedy decoding with them against decoding without."""

import pytest
import torch

from halfplate.kernels import native
from halfplate.runtime import accelerate, greedy
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.lookup import Drafts
from halfplate.runtime.native_step import NativeDecoder

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def drafts(tokens, most=7):
    found = Drafts(most)
    found.extend(tokens)
    return found


def test_a_draft_is_what_followed_the_longest_match():
    text = [*range(10, 80), 1, 2, *range(10, 60)]
    assert drafts(text).propose(100) == list(range(60, 67))
    assert drafts(text).propose(2) == [60, 61]
    assert drafts(text, most=3).propose(100) == [60, 61, 62]
    assert drafts(text).propose(0) == []
    assert drafts(range(50)).propose(7) == []


def test_a_text_that_repeats_itself_is_continued_beyond_its_end():
    assert drafts([5, 6, 7] * 20).propose(7) == [5, 6, 7, 5, 6, 7, 5]
    assert drafts([4] * 60).propose(7) == [4] * 7


def test_wrong_guesses_end_the_drafts_and_right_ones_bring_them_back():
    # After 1, 2 and 3 comes another number each time, and fifty right tokens follow later on.
    found = drafts([token for n in range(40) for token in (1, 2, 3, 100 + n)])
    found.extend([1, 2, 3])
    assert found.propose(7) == []
    found.extend(list(range(300, 360)) + list(range(300, 350)))
    assert found.propose(7) == list(range(350, 357))


@pytest.fixture
def fast(tiny_model):
    model = tiny_model()
    accelerate(model)
    return model


def counted(monkeypatch):
    """The numbers of tokens of each step of several from here on."""
    steps, step = [], NativeDecoder.step_rows
    monkeypatch.setattr(
        NativeDecoder,
        "step_rows",
        lambda self, rows, *rest, **named: steps.append(rows.shape[1]) or step(self, rows, *rest, **named),
    )
    return steps


def prompts():
    generator = torch.Generator().manual_seed(5)
    yield torch.randint(3, 128, (1, 9), generator=generator)
    yield torch.randint(3, 128, (1, 12), generator=generator).repeat(1, 4)
    yield torch.tensor([[7, 8] * 15])


@needs_native
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "qwen3"])
def test_text_is_that_of_plain_decoding(tiny_model, architecture, monkeypatch):
    model = tiny_model(architecture)
    accelerate(model)
    steps = counted(monkeypatch)
    for ids in prompts():
        told, cache = [], GrowingCache(model.config.num_hidden_layers)
        expected = greedy(model, ids, 60)
        found = greedy(model, ids, 60, on_token=told.append, cache=cache, lookup=7)
        assert torch.equal(found, expected)
        assert told == expected[0, ids.shape[1] :].tolist()
        assert cache.get_seq_length() == expected.shape[1] - 1
    assert max(steps) >= 4  # tiny random models repeat themselves


@needs_native
def test_every_draft_that_is_wrong_is_taken_back(fast, monkeypatch):
    monkeypatch.setattr(Drafts, "propose", lambda self, room: [3, 4, 5][:room])
    steps = counted(monkeypatch)
    for ids in prompts():
        assert torch.equal(greedy(fast, ids, 20, lookup=3), greedy(fast, ids, 20))
    assert set(steps) == {2, 3, 4}


@needs_native
def test_the_cache_fits_the_text_wherever_it_stops(fast):
    ids = torch.tensor([[7, 8] * 15])
    whole = greedy(fast, ids, 60)

    class Enough(Exception):
        pass

    for count in range(1, 30):
        cache, told = GrowingCache(2), []

        def say(token, told=told, count=count):
            told.append(token)
            if len(told) == count:
                raise Enough

        with pytest.raises(Enough):
            greedy(fast, ids, 60, on_token=say, cache=cache, lookup=7)
        assert told == whole[0, 30 : 30 + count].tolist()
        assert cache.get_seq_length() == 30 + count - 1
        assert torch.equal(greedy(fast, whole[:, : 30 + count], 10, cache=cache, lookup=7), whole[:, : 40 + count])
