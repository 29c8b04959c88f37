"""A conversation answers as greedy decoding of the whole prompt does, whatever it keeps from the turns before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.evaluation.conversation import Conversation
from halfplate.recipe import Recipe
from halfplate.runtime import explain, greedy

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def folder(compressed_once: Callable[[Recipe], Path]) -> str:
    """The tiny model (128 positions) with kernels."""
    return str(compressed_once(Recipe(method="magnitude", core_dtype="int8", samples=4, seq_len=32, threads=1)))


def talk_with(folder: str, most: int = 12, template: str | None = TEMPLATE) -> Conversation:
    talk = Conversation.with_model(folder, most, "float")  # a prompt that is read in parts must not be rounded in parts
    talk.tokenizer.chat_template = template
    return talk


def ignored(piece: str) -> None:
    """Say nothing."""


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "plain"])
def test_each_answer_is_that_of_the_whole_prompt(folder: str, template: str | None) -> None:
    talk = talk_with(folder, 8, template)
    assert explain(talk.model).decoder == "native"
    for message in ("Tom", "a bird", "Mia and Tom"):
        ids, _ = talk._prompt(message)
        prompt = torch.tensor([ids], dtype=torch.int64)
        expected = greedy(talk.model, prompt, 8, talk._stop_ids())[0, len(ids) :]
        pieces: list[str] = []
        answer = talk.answer(message, pieces.append)
        assert answer.text == "".join(pieces) == talk.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.tokens == len(expected)
        assert (answer.context, answer.dropped) == (len(ids) + len(expected), 0)
    assert len(talk.turns) == 3


def test_what_is_kept_of_the_turns_is_not_read_again(folder: str) -> None:
    talk = talk_with(folder)
    first = talk.answer("Tom", ignored)
    assert first.read == first.context - first.tokens
    second = talk.answer("Mia", ignored)
    assert 0 < second.read < second.context - second.tokens
    talk.reset()
    assert (talk.turns, talk.last) == ([], None)
    assert talk.answer("Tom", ignored).text == first.text


def test_the_type_of_the_cache_is_taken_where_nothing_is_kept_between_turns(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with longrope, whose keys depend on the length of the text."""
    monkeypatch.setattr("halfplate.evaluation.conversation.why_no_prompts", lambda model: "longrope")
    seen: list[Any] = []

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(args[5])
        return greedy(*args[:5], **options)  # heads of 8 numbers need a cache in fp32

    monkeypatch.setattr("halfplate.evaluation.conversation.greedy", recorded)
    talk = talk_with(folder)
    talk.cache_dtype = torch.bfloat16
    for message in ("Tom", "Mia"):
        answer = talk.answer(message, ignored)
        assert answer.read == answer.context - answer.tokens
    assert [{layer.kept_dtype for layer in cache.layers} for cache in seen] == [{torch.bfloat16}] * 2
    assert seen[0] is not seen[1]


def test_a_stopped_answer_is_kept_and_the_next_one_is_right(folder: str) -> None:
    talk = talk_with(folder)
    pieces: list[str] = []
    answer = talk.answer("Tom", pieces.append, lambda: len(pieces) >= 2)
    assert answer.ended == "stopped"
    assert 0 < answer.tokens < 12
    other = talk_with(folder)
    other.turns = list(talk.turns)
    assert talk.answer("Mia", ignored).text == other.answer("Mia", ignored).text


def test_a_failure_in_an_answer_forgets_what_was_kept(folder: str) -> None:
    def fail(piece: str) -> None:
        raise KeyboardInterrupt

    talk = talk_with(folder)
    first = talk.answer("Tom", ignored)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("Mia", fail)
    assert len(talk.turns) == 1
    assert talk.answer("Mia", ignored).read > first.context - first.tokens


def test_a_full_context_drops_the_oldest_turns(folder: str) -> None:
    talk = talk_with(folder, 8)
    answers = [talk.answer(f"Tom and Mia saw bird {number} today", ignored) for number in range(8)]
    assert sum(answer.dropped for answer in answers) > 0
    assert all(answer.context <= 128 for answer in answers)
    assert talk.turns[-1][0].endswith("7 today")
    assert len(talk.turns) == 8 - sum(answer.dropped for answer in answers)


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(folder: str) -> None:
    talk = talk_with(folder)
    talk.answer("Tom", ignored)
    turns = list(talk.turns)
    with pytest.raises(HalfplateError, match=r"message has \d+ tokens, and .* has 128 positions"):
        talk.answer("Mia saw the bird. " * 80, ignored)
    assert talk.turns == turns


def test_a_template_that_fails_is_one_line(folder: str) -> None:
    talk = talk_with(folder, template="{{ raise_exception('no such role') }}")
    with pytest.raises(HalfplateError, match=r"the chat template of .* fails .*no such role"):
        talk.answer("Tom", ignored)
    assert talk.turns == []


def test_an_uncompressed_model_answers(tiny_folder: Path) -> None:
    talk = talk_with(str(tiny_folder), 4)
    for message in ("Tom", "Mia"):
        assert talk.answer(message, ignored).tokens > 0
    assert "torch" in talk.paths()


def test_characters_of_several_tokens_are_passed_on_whole(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(folder)
    text = "été → ok"
    tokens = talk.tokenizer(text, add_special_tokens=False)["input_ids"]

    def told(
        model: Any, ids: Any, new: int, stop: Any, on_token: Callable[[int], None], *rest: Any, **more: Any
    ) -> None:
        for token in tokens:
            on_token(token)

    monkeypatch.setattr("halfplate.evaluation.conversation.greedy", told)
    pieces: list[str] = []
    talk._keep = lambda ids: 0  # type: ignore[method-assign]
    talk.answer("Tom", pieces.append)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
