"""Requests of a server that begin like earlier ones, against the same requests alone."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.runtime import accelerate, greedy
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.kept import CACHE_DTYPES

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'halfplate[serve]')")
batches = pytest.importorskip("halfplate.serving.batches", reason="this transformers has another server")
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

from halfplate.serving.metrics import Metrics  # noqa: E402
from halfplate.serving.settings import ServeSettings  # noqa: E402

TEXT = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(0)).tolist()
NEW = 8


@pytest.fixture
def fast(tiny_model):
    model = tiny_model("llama", head_dim=16)
    accelerate(model)
    return model


class Server:
    """A manager, and the tokens of the prompts that its model has read."""

    def __init__(self, model, monkeypatch, **settings):
        self.model, self.read, self.metrics = model, [], Metrics()
        self.manager = batches.BatchManager(ServeSettings("model", **settings), self.metrics)
        # It takes longer than a batch waits for further requests.
        monkeypatch.setattr(batches, "_check_length", lambda *_: None)
        forward = type(model).forward

        def counted(inner, *args, **kwargs):
            self.read.append(kwargs["input_ids"].shape)
            return forward(inner, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", counted)

    def ask(self, *texts, new=NEW):
        """The answers to requests that arrive together, and the sizes of the calls that read more than a token of each."""
        self.read.clear()
        processor = SimpleNamespace(decode=lambda tokens, **options: list(tokens))

        async def all_of_them():
            settings = [
                GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0) for _ in texts
            ]
            return await asyncio.gather(
                *(
                    self.manager.generate_non_streaming(
                        self.model, processor, {"input_ids": torch.tensor([text])}, own, "id"
                    )
                    for text, own in zip(texts, settings, strict=True)
                )
            )

        found = [answer for answer, _, _ in asyncio.run(all_of_them())]
        return found, [tuple(shape) for shape in self.read if shape[1] > 1]


def alone(model, text, dtype=None):
    return greedy(model, torch.tensor([text]), NEW, cache=GrowingCache(2, dtype))[0, len(text) :].tolist()


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_chat_reads_only_what_is_new(fast, monkeypatch, cache_dtype):
    dtype = CACHE_DTYPES[cache_dtype]
    server, text = Server(fast, monkeypatch, cache_dtype=cache_dtype), TEXT[:20]
    for turn in range(4):
        (answer,), read = server.ask(text)
        assert answer == alone(fast, text, dtype)
        # All tokens but the last: of later turns the last one of the answer and four of the question.
        assert read == ([(1, 19)] if turn == 0 else [(1, 5)])
        text = text + answer + TEXT[20 + 5 * turn : 25 + 5 * turn]
    assert "halfplate_reused_prompt_tokens_total 120" in server.metrics.text()


def test_requests_that_share_a_beginning_run_together(fast, monkeypatch):
    server = Server(fast, monkeypatch)
    assert server.ask(TEXT[:30])[1] == [(1, 29)]
    texts = [TEXT[:30] + TEXT[40:44], TEXT[:25] + TEXT[50:52], TEXT[3:9], TEXT[:30] + TEXT[40:44] + TEXT[:3]]
    found, read = server.ask(*texts)
    assert found == [alone(fast, text) for text in texts]
    assert [shape[1] for shape in read] == [3, 5, 3]  # and of the second only its last token, with the others
    # Prompts that are new are read together, with padding.
    texts = [TEXT[10:20], TEXT[30:37]]
    found, read = server.ask(*texts)
    assert (found, read) == ([alone(fast, text) for text in texts], [(2, 9)])
    found, read = server.ask(*texts)
    assert (found, read) == ([alone(fast, text) for text in texts], [])


def test_without_memory_every_prompt_is_read(fast, monkeypatch):
    server = Server(fast, monkeypatch, prompt_cache=0, max_batch=1)
    for _ in range(2):
        assert server.ask(TEXT[:20]) == ([alone(fast, TEXT[:20])], [(1, 19)])


def test_texts_leave_if_there_is_no_room(fast, monkeypatch):
    server = Server(fast, monkeypatch, prompt_cache=20_000)
    for start in (0, 20, 0):
        assert server.ask(TEXT[start : start + 20])[1] == [(1, 19)]
    assert server.ask(TEXT[:20])[1] == []


def test_other_models_run_as_before(tiny_model, monkeypatch):
    plain = tiny_model()
    server = Server(plain, monkeypatch)
    expected = plain.generate(
        torch.tensor([TEXT[:20]]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert server.ask(TEXT[:20])[0] == [expected[0, 20:].tolist()]
    with pytest.raises(HalfplateError, match="cache_dtype='bf16' cannot be used with this model"):
        Server(plain, monkeypatch, cache_dtype="bf16").ask(TEXT[:20])


def test_a_negative_size_is_refused():
    with pytest.raises(HalfplateError, match="prompt_cache=-1 is out of range"):
        ServeSettings("model", prompt_cache=-1)
