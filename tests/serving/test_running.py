"""Requests that join and leave while others run, against the same requests alone."""

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.runtime import accelerate, greedy

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'halfplate[serve]')")
batches = pytest.importorskip("halfplate.serving.batches", reason="this transformers has another server")
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

from halfplate.serving.choosing import is_known  # noqa: E402
from halfplate.serving.metrics import Metrics  # noqa: E402
from halfplate.serving.reading import Reading  # noqa: E402
from halfplate.serving.request import Request  # noqa: E402
from halfplate.serving.running import Running  # noqa: E402
from halfplate.serving.settings import ServeSettings  # noqa: E402

TEXT = torch.randint(3, 128, (80,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fast():
    from conftest import build_model

    model = build_model("llama", head_dim=16)
    accelerate(model)
    return model


def request(start, length, most, **options):
    """A request for the tokens of TEXT from `start` on, whose answer ends up in `found`."""
    found = []
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": most} | options
    made = Request(
        TEXT[start : start + length], GenerationConfig(**options), most, None, lambda token: None, found.append
    )
    made.found = found
    return made


def running(**options):
    return Running(Reading(ServeSettings("model", **options), Metrics()))


def alone(model, one):
    return greedy(model, one.ids[None], one.most)[0, len(one.ids) :].tolist()


@given(
    plan=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=8
    ),
    prompt_cache=st.sampled_from([0, 10**8]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_request_gets_the_answer_that_it_gets_alone(fast, plan, prompt_cache):
    """plan: start and length of each prompt, tokens of its answer, and the step before which it joins."""
    together, asked = running(prompt_cache=prompt_cache), [request(*entry[:3]) for entry in plan]
    step = 0
    while step <= 6 or len(together):
        joining = [one for one, entry in zip(asked, plan, strict=True) if entry[3] == step]
        if joining:
            together.join(fast, joining)
        if len(together):
            together.step(fast)
        step += 1
    for one in asked:
        assert one.found == [alone(fast, one)]


def test_sampling_is_that_of_generate(fast):
    for options in (
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6, "temperature": 1.5},
        {"min_p": 0.1, "top_k": 0},
        {"repetition_penalty": 1.4},
    ):
        one, together = request(0, 20, 12, do_sample=True, **options), running()
        assert together.takes(fast, one.settings)
        torch.manual_seed(3)
        together.join(fast, [one])
        while len(together):
            together.step(fast)
        torch.manual_seed(3)
        expected = fast.generate(one.ids[None], generation_config=one.settings)
        assert one.found == [expected[0, 20:].tolist()]


def test_requests_with_different_settings_run_together(fast):
    asked = [request(0, 20, 6), request(3, 9, 6, repetition_penalty=1.8), request(30, 12, 6, do_sample=True, top_k=1)]
    together = running()
    together.join(fast, asked)
    assert len(together) == 3
    while len(together):
        together.step(fast)
    penalised = fast.generate(asked[1].ids[None], generation_config=asked[1].settings)[0, 9:].tolist()
    assert [one.found[0] for one in asked] == [alone(fast, asked[0]), penalised, alone(fast, asked[2])]


def test_settings_that_are_not_known_run_in_generate(fast):
    assert is_known(request(0, 5, 5).settings)
    for options in (
        {"num_beams": 3},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"sequence_bias": {(3,): 1.0}},
    ):
        assert not running().takes(fast, request(0, 5, 5, **options).settings)


def test_positions_are_not_wasted_when_the_longest_text_has_left(fast):
    together = running(prompt_cache=0)
    together.join(fast, [request(0, 60, 2), request(0, 5, 20)])
    for _ in range(2):
        together.step(fast)
    assert together._cache.get_seq_length() == 61
    together.join(fast, [request(9, 4, 3)])
    assert together._cache.get_seq_length() == 6  # of the request that is left; padding of all rows is gone


def test_a_request_joins_while_another_runs_and_the_thread_ends(fast):
    manager = batches.BatchManager(ServeSettings("model", max_batch=4), Metrics())
    first_token, go_on, ended = threading.Event(), threading.Event(), [threading.Event() for _ in range(2)]
    found = {}

    def said(token):
        first_token.set()
        assert go_on.wait(30)

    def add(number, start, most, said):
        one = request(start, 20, most)

        def done(tokens):
            found[number] = tokens
            ended[number].set()

        manager._add(fast, None, {"input_ids": one.ids[None]}, one.settings, said, done)
        return one

    long = add(0, 0, 40, said)
    assert first_token.wait(30)
    short = add(1, 7, 2, lambda token: None)
    go_on.set()
    assert ended[1].wait(30)
    assert ended[0].wait(30)
    assert list(found) == [1, 0]
    assert found == {0: alone(fast, long), 1: alone(fast, short)}
    add(0, 0, 30, lambda token: (first_token.set(), go_on.wait(0.2)))
    first_token.clear()
    go_on.clear()
    assert first_token.wait(30)
    manager.stop()
    assert not manager._worker.is_alive()
    assert isinstance(found[0], HalfplateError)


def test_a_failure_ends_the_requests_that_run_and_no_others(fast, monkeypatch):
    manager = batches.BatchManager(ServeSettings("model", max_batch=4), Metrics())
    found, ended = [], threading.Event()

    def done(tokens):
        found.append(tokens)
        ended.set()

    def ask():
        ended.clear()
        one = request(0, 20, 3)
        manager._add(fast, None, {"input_ids": one.ids[None]}, one.settings, lambda token: None, done)
        assert ended.wait(30)
        return one

    step = Running.step
    monkeypatch.setattr(Running, "step", lambda *_: 1 / 0)
    ask()
    monkeypatch.setattr(Running, "step", step)
    one = ask()
    assert isinstance(found[0], ZeroDivisionError)
    assert found[1] == alone(fast, one)
    manager.stop()
