"""Tokenizers written to GGUF files and read from them, against tokens of llama.cpp (`tests/stress/gguf_check.py --store`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import gguf_tokenizer_cases as cases
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.models.gguf_pre_tokenizers import BY_NAME, PRE_TOKENIZERS, split_step
from halfplate.models.gguf_special_tokens import overlapping
from halfplate.models.gguf_tokenizer_reader import read_tokenizer
from halfplate.models.gguf_tokenizer_writer import add_tokenizer
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import load_dense

STORED = json.loads((Path(__file__).parent / "data" / "gguf_tokens.json").read_text())


CASES = {case.name: case for case in cases.CASES}
BYTE_LEVEL = CASES["byte-level, gpt-2"]
PIECES = CASES["pieces, prefix"]


def test_every_pre_tokenizer_is_checked() -> None:
    assert STORED.keys() == CASES.keys()
    checked = {name for case in cases.CASES for name in case.names}
    assert checked == BY_NAME.keys()


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    case, stored, path = CASES[name], STORED[name], tmp_path / "model.gguf"
    tokenizer = case.build()
    cases.write(tokenizer, path, case.model_name)
    assert cases.digest(path) == stored["digest"]  # the file that llama.cpp was given
    read = read_tokenizer(path, path.name)
    for one in (tokenizer, read):
        assert cases.kept_tokens(one(case.texts)["input_ids"]) == stored["tokens"]
    cases.write(read, tmp_path / "again.gguf", case.model_name)
    assert cases.digest(tmp_path / "again.gguf") == stored["digest"]


@pytest.mark.parametrize("name", ["smollm", "starcoder", "llama3", "glm4", "tekken", "gpt-4o"])
def test_what_a_name_implies(name: str, tmp_path: Path) -> None:
    """Without a word in the file about the token before a text."""
    tokenizer = CASES[f"byte-level, {BY_NAME[name].names[0]}"].build()
    cases.write(tokenizer, tmp_path / "model.gguf", pre=name)
    read = read_tokenizer(tmp_path / "model.gguf", "model.gguf")
    assert read(list(cases.PLAIN))["input_ids"] == tokenizer(list(cases.PLAIN))["input_ids"]


class Recorded:
    """In the place of a gguf.GGUFWriter: what was added, by the name of the method."""

    kv_data: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        return lambda value: self.values.__setitem__(name, value)


def written(tokenizer: Any, vocab_size: int | None = None) -> dict[str, Any]:
    writer = Recorded()
    add_tokenizer(writer, tokenizer, vocab_size or len(tokenizer))
    return writer.values


@pytest.mark.parametrize("entry", PRE_TOKENIZERS, ids=lambda entry: entry.names[0])
def test_the_name_that_is_written_splits_and_merges_so(entry: Any) -> None:
    found = BY_NAME[written(CASES[f"byte-level, {entry.names[0]}"].build())["add_tokenizer_pre"]]
    assert found.steps == entry.steps
    assert found.ignore_merges == entry.ignore_merges


def described(case: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """The tokenizer of a case with something changed in its tokenizer.json."""
    tokenizer = case.build()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    change(description)
    backend = Tokenizer.from_str(json.dumps(description))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def steps(*more: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return lambda whole: whole.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [*more, to_bytes]})


def with_added(case: Any, *tokens: AddedToken) -> Any:
    tokenizer = case.build()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def added(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, normalized=flags.pop("normalized", False), **flags)


@pytest.mark.parametrize(
    ("meant", "name"), [(meant, entry.names[0]) for entry in PRE_TOKENIZERS for meant in entry.meant]
)
def test_what_llama_cpp_splits_otherwise_is_not_written_under_its_name(meant: tuple[str, ...], name: str) -> None:
    tokenizer = described(BYTE_LEVEL, steps(*map(split_step, meant)))
    with pytest.raises(HalfplateError, match=f"llama.cpp's '{name}' splits some text differently: "):
        written(tokenizer)


def _lowercase(whole: dict[str, Any]) -> None:
    whole["normalizer"] = {"type": "Lowercase"}


def _no_bytes(whole: dict[str, Any]) -> None:
    whole["pre_tokenizer"] = split_step(r"\p{N}")


def _prefix_space(whole: dict[str, Any]) -> None:
    whole["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def _lacks(token: str) -> Callable[[dict[str, Any]], None]:
    def change(whole: dict[str, Any]) -> None:
        model = whole["model"]
        del model["vocab"][token]
        model["merges"] = [pair for pair in model["merges"] if token not in pair and token != "".join(pair)]

    return change


def _model(**options: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda whole: whole["model"].update(options)


def _ordinary(token: str) -> Callable[[dict[str, Any]], Any]:
    return lambda whole: whole["model"]["vocab"].__setitem__(token, 4000)


def _last_merge_first(whole: dict[str, Any]) -> None:
    """The second way to make some piece becomes the first merge of all."""
    merges = whole["model"]["merges"]
    second = next(now for now, before in zip(merges[1:], merges, strict=False) if "".join(now) == "".join(before))
    merges.remove(second)
    merges.insert(0, second)


def _without_a_merge(whole: dict[str, Any]) -> None:
    whole["model"]["merges"].pop()


def _metaspace(scheme: str, split: bool = False) -> Callable[[dict[str, Any]], Any]:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return lambda whole: whole.update(normalizer=None, pre_tokenizer=step)


def _bert(whole: dict[str, Any]) -> None:
    whole["post_processor"] = {"type": "BertProcessing", "sep": ["<|end|>", 3], "cls": ["<s>", 1]}


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        (BYTE_LEVEL, _lowercase, "it normalises text by Lowercase"),
        (BYTE_LEVEL, _no_bytes, "no step ByteLevel, and its model no byte fallback"),
        (BYTE_LEVEL, _prefix_space, "add_prefix_space"),
        (BYTE_LEVEL, _lacks("Ċ"), "no token for 1 of the 256 bytes"),
        (BYTE_LEVEL, steps(split_step("[a-z]+")), r"splits text by '\[a-z\]\+', then bytes, which is not one"),
        (BYTE_LEVEL, steps({"type": "Whitespace"}), "Whitespace.* is not one of llama.cpp's"),
        (
            BYTE_LEVEL,
            _model(ignore_merges=True),
            "'gpt-2' has ignore_merges=False, with which '.*' is split differently",
        ),
        (BYTE_LEVEL, _model(dropout=0.1), "its model has dropout=0.1"),
        (BYTE_LEVEL, _model(end_of_word_suffix="</w>"), "its model has end_of_word_suffix"),
        (BYTE_LEVEL, _ordinary("<|im_end|>"), "is an ordinary token of it, which llama.cpp takes for a special one"),
        (BYTE_LEVEL, _bert, r"which is .* between other tokens than bos and eos"),
        (PIECES, _lowercase, "it prepares text by Lowercase, expected spaces replaced by ▁"),
        (PIECES, _lacks("<0x0A>"), "no token for 1 of the 256 bytes"),
        (PIECES, _last_merge_first, "its merges make .* at two ranks"),
        (PIECES, _without_a_merge, "its merges do not make .* llama.cpp does"),
        (PIECES, _metaspace("never", split=True), "has pieces over several words"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(case: Any, change: Any, words: str) -> None:
    with pytest.raises(HalfplateError, match=words) as caught:
        written(described(case, change), 4001)
    assert "\n" not in str(caught.value)


def test_control_characters_without_a_token_are_said() -> None:
    with pytest.warns(HalfplateWarning, match=r"lacks 1 control characters and unused bytes \(0x04\)"):
        written(described(BYTE_LEVEL, _lacks("\u0104")), 4001)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_space_that_llama_cpp_writes_in_more_places_is_said(scheme: str) -> None:
    with pytest.warns(HalfplateWarning, match=rf"\(Metaspace, {scheme}\)"):
        file = written(described(PIECES, _metaspace(scheme)), 4001)
    assert file["add_add_space_prefix"] is True


@pytest.mark.parametrize(
    ("case", "tokens", "words"),
    [
        (BYTE_LEVEL, [added("<x>", single_word=True)], "'<x>' has single_word"),
        (BYTE_LEVEL, [added("<x>", lstrip=True)], "'<x>' has lstrip"),
        (BYTE_LEVEL, [added("<x>", rstrip=True)], "'<x>' has rstrip"),
        (BYTE_LEVEL, [added("[ab"), added("bcd]")], r"its tokens '\[ab' and 'bcd\]' can overlap"),
        (PIECES, [added("<x>", normalized=True)], "'<x>' is matched in normalised text"),
        (CASES["pieces, as Phi-3"], [added("<x>")], "has rstrip"),
    ],
)
def test_added_tokens_that_llama_cpp_cuts_out_otherwise(case: Any, tokens: list[AddedToken], words: str) -> None:
    with pytest.raises(HalfplateError, match=words):
        written(with_added(case, *tokens))


def test_stripping_tokens_of_a_model_of_another_name() -> None:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name("Something")
    tokenizer = CASES["pieces, as Phi-3"].build()
    with pytest.raises(HalfplateError, match="strip spaces as in Phi-3, but the name of the model is 'Something'"):
        add_tokenizer(writer, tokenizer, len(tokenizer))


def test_other_kinds_of_tokenizers() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(HalfplateError, match="its type is WordPiece"):
        written(PreTrainedTokenizerFast(tokenizer_object=words))
    without_end = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL.build().backend_tokenizer)
    with pytest.raises(HalfplateError, match="it has no eos_token"):
        written(without_end)
    tokenizer = BYTE_LEVEL.build()
    with pytest.raises(HalfplateError, match=f"the model {len(tokenizer) - 1} embeddings"):
        written(tokenizer, len(tokenizer) - 1)
    with pytest.raises(HalfplateError, match=r"no tokenizer\.json"):
        written(SimpleNamespace(is_fast=False), 4)


def test_the_same_splits_in_other_words() -> None:
    """Tokenizer.json files spell GPT-2's and single digits as steps of their own types."""
    digits = {"type": "Digits", "individual_digits": True}
    own = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for step, name in (((own,), "gpt-2"), ((digits, own), "smollm")):
        tokenizer = described(
            BYTE_LEVEL,
            lambda whole, step=step: whole.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(step)}),
        )
        assert written(tokenizer)["add_tokenizer_pre"] == name


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (["<s>", "</s>", "<|user|>"], None),
        (["  ", "   ", "    ", "\n", "\n\n"], None),
        (["ab", "bcd"], ("ab", "bcd")),
        (["bcd", "ab"], ("ab", "bcd")),
        (["ab", "abcd"], None),  # the longer one begins where the shorter one does
        (["abc", "cd"], None),  # the longer one comes first in both
    ],
)
def test_overlapping_tokens(tokens: list[str], found: tuple[str, str] | None) -> None:
    assert overlapping(tokens) == found


def test_overlapping_tokens_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_added(BYTE_LEVEL, added("[ab"), added("bcd]"))
    with monkeypatch.context() as patch:
        patch.setattr("halfplate.models.gguf_tokenizer_writer.overlapping", lambda tokens: None)
        cases.write(tokenizer, tmp_path / "model.gguf")
    with pytest.raises(HalfplateError, match=r"its special tokens '\[ab' and 'bcd\]' can overlap"):
        read_tokenizer(tmp_path / "model.gguf", "model.gguf")


@pytest.mark.parametrize("name", ["byte-level, llama-bpe", "byte-level, tekken", "pieces, prefix", "pieces, as Phi-3"])
def test_reading_an_own_export_gives_the_model_back(name: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = CASES[name].build()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = tiny_model("llama", vocab_size=len(tokenizer) + 5)  # more embeddings than tokens
    write_gguf(model, tokenizer, tmp_path / "model.gguf", half=False)
    read = load_dense(str(tmp_path / "model.gguf"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(read.model.state_dict()[key], tensor), key
    assert read.tokenizer.chat_template == tokenizer.chat_template
    for token in ("bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(read.tokenizer, token) == getattr(tokenizer, token)
    for text in cases.PLAIN:
        ids = tokenizer(text)["input_ids"]
        assert read.tokenizer(text)["input_ids"] == ids
        assert read.tokenizer.decode(ids) == tokenizer.decode(ids)
