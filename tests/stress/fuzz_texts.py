"""Calibration texts in every form that is read, and a reading that finds more than crashes: reader `text` of `tests/stress/fuzz.py`."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfplate.calibration import calibration_tokens, characters, stream
from halfplate.calibration.documents import Text, token_stream
from halfplate.errors import HalfplateError

STORY = 'Tom saw 9 birds.\nCafé 中 🙂 near the house.\n\nMia was "very" happy.\n' * 3
CHAT = [{"role": "user", "content": "Who is Tom?"}, {"role": "assistant", "content": "A boy."}]
SHARE_GPT = [{"from": "human", "value": "Who is Mia?"}, {"from": "gpt", "value": "A girl."}]
ROWS = [
    {"text": STORY},
    None,
    {"id": 7, "text": "Tom\r\nand Mia"},
    {},
    {"text": None},
    "a row of its own",
    {"text": ""},
]
TALKS = [{"messages": CHAT}, {"conversations": SHARE_GPT}, {"messages": []}]
PAIRS = [
    {"question": STORY, "answer": "Yes.", "n": 1e3},
    {"question": None, "answer": None},
    {"question": "", "answer": "No"},
]
TEMPLATE = "{% for m in messages %}{% if loop.index0 % 2 != (m['role'] != 'user') %}{{ raise_exception('order') }}{% endif %}{{ m['content'] }}\n{% endfor %}"
FIELDS = {"pairs.jsonl": ":question+answer", "pairs.json": ":answer", "talks.json": ":messages"}
# What changes the meaning of a text where it stands.
WORDS = (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\xff\xfe\0\0",
    b"\xed\xa0\x80",
    b"\0",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\xe2\x80\xa8",
    b'"\\ud800"',
    b'"\\u0000"',
    b'{"text":null}',
    b'{"text":[{}]}',
    b'"messages":',
    b'"content":{}',
    b'"role":7,',
    b"<end>",
    b"[" * 3000,
    b"9" * 5000,
    b"-",
    b"1e999",
    b"]",
    b",",
    b"{",
    b'"',
    b"\\",
)
TOKENS = 316  # of the model; the tokenizer has more
TOKENISED = 3  # of so many inputs one is tokenised
SMALL = (5, 64)  # bytes of a block, of which a mark takes four
STREAM = {"PIECE": 256, "OVERLAP": 160}


def write_texts(folder: Path) -> list[Path]:
    """Texts of every suffix, encoding, mark, line end and form of row."""
    lines = {
        name: "\n".join(map(json.dumps, rows)) for name, rows in (("rows", ROWS), ("talks", TALKS), ("pairs", PAIRS))
    }
    wide = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    contents = {
        "plain.txt": STORY.encode(),
        "marked.txt": STORY.replace("\n", "\r\n").encode("utf-8-sig"),
        "wide.txt": STORY.replace("\n", "\r").encode("utf-16"),
        "widest.txt": STORY[:60].encode("utf-32"),
        "packed.txt.gz": gzip.compress(STORY.encode(), mtime=0),
        "rows.jsonl": lines["rows"].encode(),
        "wide.jsonl": wide.replace("\n", "\r\n").encode("utf-16"),
        "packed.jsonl.gz": gzip.compress(wide.encode("utf-8-sig"), mtime=0),
        "talks.jsonl": lines["talks"].encode(),
        "pairs.jsonl": lines["pairs"].encode(),
        "rows.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode("utf-8-sig"),
        "wide.json": json.dumps(ROWS).encode("utf-16"),
        "values.json": lines["rows"].encode(),
        "talks.json": json.dumps([{"messages": CHAT}, {"messages": []}]).encode(),
        "pairs.json": json.dumps(PAIRS).encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def text_reader() -> Callable[[Path], None]:
    """A reading of one file as calibration: at once, then in small blocks, and some tokenised, whole and in pieces.

    It raises HalfplateError where the file is refused, AssertionError where the readings differ or give what is no text.
    """
    tokenizer, model = _tokenizer(), _model()
    number = itertools.count()

    def read(path: Path) -> None:
        source, turn = f"{path}{FIELDS.get(path.name, '')}", next(number)
        writer = tokenizer if turn % 2 else None
        found = _outcome(lambda: list(Text(source).documents(writer)))
        with mock.patch.object(characters, "BLOCK_BYTES", SMALL[turn // 2 % 2]):
            again = _outcome(lambda: list(Text(source).documents(writer)))
        assert isinstance(found, list) == isinstance(again, list), f"at once {found!r}, in blocks {again!r}"
        if isinstance(found, HalfplateError):
            raise found
        assert found == again, f"at once {found!r}, in blocks {again!r}"
        for document in found:
            assert "\r" not in document
            document.encode()
        if turn % TOKENISED == 0:
            with _small_pieces():
                pieces = token_stream(tokenizer, Text(source))
            assert pieces.tolist() == tokenizer("\n\n".join(Text(source).documents(tokenizer)))["input_ids"]
            calibration_tokens(source, model, tokenizer, samples=2, seq_len=16, seed=turn)

    return read


def _outcome(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except HalfplateError as refusal:
        return refusal


@contextmanager
def _small_pieces() -> Iterator[None]:
    with mock.patch.multiple(stream, **STREAM):
        yield


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [STORY], trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=letters, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    # Beyond what the model knows.
    tokenizer.add_tokens(["<end>"] + [f"<more {index}>" for index in range(TOKENS)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _model() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, max_position_embeddings=64, **sizes))
