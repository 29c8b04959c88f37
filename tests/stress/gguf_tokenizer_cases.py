"""Small tokenizers of every kind that GGUF files hold, trained here, and the hard text that they are checked on."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from halfplate.models.gguf_pre_tokenizers import BY_NAME, PRE_TOKENIZERS, PreTokenizer, described
from halfplate.models.gguf_tokenizer_writer import add_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<|end|>", "<|user|>")
USER_DEFINED = ("<think>", "[IMG]")
ARCHITECTURE = "llama"  # of the file; it says nothing about tokens

PLAIN = (
    "",
    " ",
    "The quick brown fox, it's 2024 and we'LL pay 1234567.89 or -12,345.",
    " leading,  two,   three    four spaces and some at the end   ",
    "\ttab\t\ttabs\n\nlines\r\n \n  indented\n\n\n\tmore\r\r\n",
    "Crème brûlée, naïve façade, Ångström, Größe, İstanbul, Ελληνικά, Привет мир, e\u0301 decomposed",
    "😀 👩‍💻👍🏽 ❤️🇫🇷 ☃ ✔️",
    "中文分词和日本語のひらがなカタカナ、한국어도 있다。ภาษาไทย हिन्दी العربية עברית ১২৩ ٣٤٥",
    "def f(x: int) -> str:\n    return f'{x!r}' + \"\\n\"  # x**2 != y && z || ~w\n",
    '<div class="a-b_c">&nbsp;</div> http://example.org/a?b=1&c=%20#d $x^2 + \\frac{1}{2}$ `code` ```py',
    "CamelCase HTTPServer iPhone X1Y2z3 don't DON'T we've I'd y'all'd've 'tis ''quoted''",
    "zero\u200bwidth no\u00a0break \u3000wide\u2028line½ ² Ⅳ ① €5 £6 …—“”",
    "<s> begin</s> <|user|>hello<|end|>\n<|user|>  spaces <think>why?</think> [IMG][IMG] <unk>x<s><s>",
)
# Tokens of byte-level vocabularies that no merges lead to: whether they are made is up to ignore_merges.
WHOLE = ("Zebra", "ĠZebra", "QUARTZ", "9876", "zebraFish")
PARTS = (
    *("a", "B", "é", "ß", "ñ", "İ", "Ω", "ж", "Hello", "WORLD", "camelCase", "don't", "WE'LL", "'s", "'Re", "'", '"'),
    *(
        "1",
        "12",
        "345",
        "67890",
        "٣",
        "½",
        "²",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " \n",
        "\u00a0",
        "\u3000",
    ),
    *("中", "文字", "かな", "カナ", "한글", "ไทย", "हि", "ع", "😀", "👩‍💻", "e\u0301", "\u200b", "，", "。", "“", "…"),
    *(".", ",", "!", "?", "-", "_", "/", "\\", "(", ")", "{", "}", "[", "]", "<", ">", "=", "+", "$", "€", "%", "&"),
    *("*", "#", "@", "^", "~", "|", "`", ":", ";"),
)
SHOWN = (2, 3, 5, 12)  # texts whose tokens are stored
NEVER_LEARNT = ("Zebra", " Zebra", "QUARTZ", "9876", "zebraFish", *SPECIAL, *USER_DEFINED)


@cache
def texts(count: int = 400) -> tuple[str, ...]:
    """The texts that are compared: written ones, and parts put together at random from a fixed seed."""
    choose = random.Random(16)
    return (*PLAIN, *("".join(choose.choices(PARTS + NEVER_LEARNT, k=choose.randint(2, 14))) for _ in range(count)))


@cache
def _training(count: int = 1500) -> list[str]:
    """What tokenizers are trained on: other texts of the same parts, without special tokens."""
    choose = random.Random(3)
    return [*PLAIN[:-1], *("".join(choose.choices(PARTS, k=choose.randint(2, 14))) for _ in range(count))]


@dataclass(frozen=True)
class TokenizerCase:
    """How to build a tokenizer; `names` are those of llama.cpp that a file may hold for it, the first is written.

    skips: texts that docs/export.md says llama.cpp takes otherwise
    """

    name: str
    names: tuple[str, ...]
    build: Callable[[], Any]
    model_name: str | None = None  # general.name
    skips: Callable[[str], bool] = lambda text: False

    @property
    def texts(self) -> list[str]:
        return [text for text in texts() if not self.skips(text)]


def _not_composed(text: str) -> bool:
    """Not in the form NFC, to which llama.cpp does not bring it."""
    return not unicodedata.is_normalized("NFC", text)


def _wide_space_behind_special(text: str) -> bool:
    """llama.cpp strips ASCII spaces alone."""
    return re.search(rf"({'|'.join(map(re.escape, SPECIAL + USER_DEFINED))})\s*[^\S\x00-\x7f]", text) is not None


def _fast(backend: Any, special: tuple[Any, ...] = SPECIAL, template: bool = False, strips: bool = False) -> Any:
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(token, normalized=False, rstrip=strips) for token in USER_DEFINED])
    if template:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@cache
def _byte_level_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trained without any splits, so that a split that differs shows in the tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_training(), trainer)
    return _vocabulary_and_merges(backend)


def _vocabulary_and_merges(backend: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _byte_level(entry: PreTokenizer, composes: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models

    vocabulary, merges = _byte_level_vocabulary()
    vocabulary = vocabulary | {word: len(vocabulary) + number for number, word in enumerate(WHOLE)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=entry.ignore_merges))
    backend.decoder = decoders.ByteLevel()
    description = json.loads(backend.to_str()) | {"pre_tokenizer": described(entry)}
    if composes:
        description["normalizer"] = {"type": "NFC"}
    return _fast(Tokenizer.from_str(json.dumps(description)), template=entry.add_bos)


@cache
def _piece_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """As SentencePiece trains: words after ▁, every way to make a piece of two others is a merge."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=list(SPECIAL), show_progress=False)
    backend.train_from_iterator([text for text in _training() if "中" not in text], trainer)
    learnt = [left + right for left, right in _vocabulary_and_merges(backend)[1]]
    learnt = [*("▁" * length for length in range(2, 9)), *(piece for piece in learnt if piece.strip("▁"))]
    pieces = list(dict.fromkeys(learnt))
    single = sorted({character for piece in pieces for character in piece})
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *single]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    parts = {*pieces, *single}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in parts and piece[cut:] in parts
    ]
    return vocabulary, merges


def _pieces(prefix: bool, split: bool = False, metaspace: bool = False, strips: bool = False) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = _piece_vocabulary()
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    mark = normalizers.Replace(" ", "▁")
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), mark]) if prefix else mark
    if split:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    kept = ("<unk>", "<s>", "<|endoftext|>")
    special = (*SPECIAL, "<|endoftext|>") if strips else SPECIAL
    added = tuple(AddedToken(token, normalized=False, rstrip=strips and token not in kept) for token in special)
    return _fast(backend, added, template=True, strips=strips)


def _cases() -> tuple[TokenizerCase, ...]:
    return (
        *(
            TokenizerCase(f"byte-level, {entry.names[0]}", entry.names, partial(_byte_level, entry))
            for entry in PRE_TOKENIZERS
        ),
        TokenizerCase(
            "byte-level, NFC",
            ("qwen2",),
            partial(_byte_level, BY_NAME["qwen2"], composes=True),
            skips=_not_composed,
        ),
        TokenizerCase("pieces, prefix", ("default",), partial(_pieces, prefix=True)),
        TokenizerCase("pieces, no prefix", ("default",), partial(_pieces, prefix=False)),
        TokenizerCase("pieces, no prefix, as Gemma", ("default",), partial(_pieces, prefix=False, split=True)),
        TokenizerCase("pieces, no prefix, Metaspace", ("default",), partial(_pieces, prefix=False, metaspace=True)),
        TokenizerCase(
            "pieces, as Phi-3",
            ("default",),
            partial(_pieces, prefix=True, strips=True),
            "Phi-3 mini",
            _wide_space_behind_special,
        ),
    )


CASES = _cases()


def write(tokenizer: Any, path: Path, model_name: str | None = None, pre: str | None = None) -> None:
    """A GGUF file of the vocabulary alone; `pre`: call the pre-tokenizer so, and do not say what stands before a text."""
    import gguf

    class Renaming(gguf.GGUFWriter):  # type: ignore[misc]
        def add_tokenizer_pre(self, name: str) -> None:
            super().add_tokenizer_pre(pre or name)

        def add_add_bos_token(self, value: bool) -> None:
            if pre is None:
                super().add_add_bos_token(value)

    writer = Renaming(str(path), ARCHITECTURE)
    if model_name is not None:
        writer.add_name(model_name)
    add_tokenizer(writer, tokenizer, len(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def digest(path: Path) -> str:
    """What a file says of the tokenizer: SHA-256 over the metadata in an order of its own."""
    import gguf

    fields, total = gguf.GGUFReader(path).fields, hashlib.sha256()
    for key in sorted(key for key in fields if key.startswith(("tokenizer.", "general."))):
        total.update(f"{key}={fields[key].contents()!r};".encode())
    return total.hexdigest()


def kept_tokens(ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What is stored of llama.cpp's tokens of texts(): SHA-256 of them all, and those of some texts to be read."""
    total = hashlib.sha256(json.dumps([list(one) for one in ids]).encode()).hexdigest()
    return {"sha256": total, **{str(number): list(ids[number]) for number in SHOWN}}
