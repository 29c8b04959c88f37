"""The tokenizer inside a GGUF file, as llama.cpp reads it.

Every `tokenizer.*` key is used, is known to have no effect on tokens (NO_EFFECT), or is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError
from halfplate.models.gguf_pre_tokenizers import BY_NAME, described
from halfplate.models.gguf_special_tokens import (
    CONTROL_SPELLINGS,
    NOT_STRIPPED,
    ORDINARY_END,
    STRIPPING_NAMES,
    overlapping,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Pieces that never occur in running text, because they are split off before merging.
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)

USED = {
    *(GGML + key for key in ("model", "pre", "tokens", "scores", "token_type", "merges")),
    *(GGML + key for key in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")),
    TEMPLATE,
    TEMPLATE + "s",
}
# Token ids with their names in transformers. (The misspelling is that of GGUF.)
SPECIAL_IDS = {
    GGML + "bos_token_id": "bos_token",
    GGML + "eos_token_id": "eos_token",
    GGML + "unknown_token_id": "unk_token",
    GGML + "padding_token_id": "pad_token",
    GGML + "seperator_token_id": "sep_token",
    GGML + "cls_token_id": "cls_token",
    GGML + "mask_token_id": "mask_token",
}
# Ids for generation and for fill-in-the-middle.
OTHER_IDS = {
    GGML + f"{key}_token_id"
    for key in (
        "eot",
        "eom",
        "prefix",
        "suffix",
        "middle",
        "fim_pre",
        "fim_suf",
        "fim_mid",
        "fim_pad",
        "fim_rep",
        "fim_sep",
    )
}
# llama.cpp reads these only for other vocabularies or for generation, or ignores them.
NO_EFFECT = {
    *(GGML + key for key in ("token_type_count", "add_sep_token", "suppress_tokens", "precompiled_charsmap")),
    *(GGML + key for key in ("normalizer.lowercase", "normalizer.strip_accents")),
    "tokenizer.huggingface.json",
}
MODELS = ("gpt2", "llama")


def read_tokenizer(path: Path, name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a `.gguf` file whose header is already checked. name: of the file, as the user gave it.

    Raises HalfplateError for an unknown kind of vocabulary, pre-tokenizer or key, and for inconsistent content.
    """
    from gguf import GGUFReader

    def refuse(reason: str) -> HalfplateError:
        return HalfplateError(f"model={name!r}: {reason}; pass the model as a safetensors folder instead")

    try:
        fields = GGUFReader(path).fields
        values = {
            key: fields[key].contents() for key in fields if key.startswith("tokenizer.") or key == "general.name"
        }
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise refuse(f"its tokenizer cannot be read ({str(error).partition(chr(10))[0]})") from None
    try:
        return _Vocabulary(values).tokenizer()
    except _Refused as error:
        raise refuse(str(error)) from None


class _Refused(Exception):
    """Raised with the reason why a vocabulary is not supported."""


class _Vocabulary:
    """The metadata of one file, which is checked when it is read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.kind = self._value("model", str)
        if self.kind is None:
            raise _Refused("it holds no tokenizer (tokenizer.ggml.model is missing)")
        if self.kind not in MODELS:
            raise _Refused(f"tokenizer.ggml.model={self.kind!r} is not read, only {', '.join(MODELS)}")
        self._check_keys()
        self.tokens = self._tokens()
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        self.types = self._types()
        if pair := overlapping([token for number, token in enumerate(self.tokens) if self._is_whole(number)]):
            raise _Refused(
                f"its special tokens {pair[0]!r} and {pair[1]!r} can overlap, and llama.cpp splits such text differently"
            )
        self.special = {key: self._id(key) for key in SPECIAL_IDS}
        for key in OTHER_IDS:
            self._id(key)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            **(self._byte_level() if self._is_byte_level() else self._pieces()),
            "post_processor": self._post_processor(),
        }
        try:
            backend = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises plain Exceptions
            raise _Refused(f"its tokenizer cannot be built ({str(error).partition(chr(10))[0]})") from None
        named = {
            SPECIAL_IDS[key]: self.tokens[number]
            for key, number in self.special.items()
            if number is not None and self._is_whole(number)
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_input_names=["input_ids", "attention_mask"],
            chat_template=self._chat_template(),
            **named,
        )

    # Reading and checking keys

    def _value(self, key: str, kind: type) -> Any:
        """The value of a key, None if it is missing; raises _Refused if it has another type."""
        value = self.values.get(GGML + key)
        if value is not None and type(value) is not kind:
            raise _Refused(f"{GGML}{key} is of type {type(value).__name__}, expected {kind.__name__}")
        return value

    def _check_keys(self) -> None:
        known = USED | SPECIAL_IDS.keys() | OTHER_IDS | NO_EFFECT
        for key in self.values:
            named_template = key.startswith(TEMPLATE + ".")
            if key.startswith("tokenizer.") and key not in known and not named_template:
                raise _Refused(f"the key {key} is not known")
        if self._value("remove_extra_whitespaces", bool):
            raise _Refused("tokenizer.ggml.remove_extra_whitespaces=true is not read for this kind of vocabulary")

    def _list(self, key: str, kind: type | tuple[type, ...], length: int | None = None) -> list[Any] | None:
        values: list[Any] | None = self._value(key, list)
        if values is None:
            return None
        if not all(isinstance(value, kind) for value in values):
            raise _Refused(f"{GGML}{key} holds values of another type than expected")
        if length is not None and len(values) != length:
            raise _Refused(f"{GGML}{key} has {len(values)} entries, tokenizer.ggml.tokens {length}")
        return values

    def _tokens(self) -> list[str]:
        tokens = self._list("tokens", str)
        if not tokens:
            raise _Refused("tokenizer.ggml.tokens is missing or empty")
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        ((token, count),) = Counter(tokens).most_common(1)
        if count > 1:
            raise _Refused(f"tokenizer.ggml.tokens holds {token[:40]!r} {count} times")
        return tokens

    def _types(self) -> list[int]:
        types = self._list("token_type", int, len(self.tokens)) or [NORMAL] * len(self.tokens)
        for number, kind in enumerate(types):
            if not NORMAL <= kind <= BYTE:
                raise _Refused(f"tokenizer.ggml.token_type is {kind} at {number}, expected 1 to 6")
        ordinary_end = any(token in self.ids for token in ORDINARY_END)
        for token in CONTROL_SPELLINGS & self.ids.keys():
            number = self.ids[token]
            if types[number] not in WHOLE:
                types[number] = CONTROL
            if token == "</s>" and ordinary_end:
                types[number] = NORMAL
        return types

    def _is_whole(self, number: int) -> bool:
        return self.types[number] in WHOLE

    def _id(self, key: str) -> int | None:
        number: int | None = self._value(key.removeprefix(GGML), int)
        if number is not None and not 0 <= number < len(self.tokens):
            raise _Refused(f"{key}={number} is outside of its {len(self.tokens)} tokens")
        return number

    def _flag(self, key: str, otherwise: bool) -> bool:
        value: bool | None = self._value(key, bool)
        return otherwise if value is None else value

    # Parts of the tokenizer.json

    def _is_byte_level(self) -> bool:
        return bool(self.kind == "gpt2")

    def _vocabulary(self) -> dict[str, int]:
        """Tokens and their ids, without padding tokens."""
        return {
            token: number
            for number, token in enumerate(self.tokens)
            if not (self.types[number] == UNUSED and token == f"[PAD{number}]")
        }

    def _added_tokens(self) -> list[dict[str, Any]]:
        model = str(self.values.get("general.name", "")).lower()
        strips = any(part in model for part in STRIPPING_NAMES)
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": strips and token not in NOT_STRIPPED,
                "normalized": False,
                "special": self.types[number] != USER_DEFINED,
            }
            for number, token in enumerate(self.tokens)
            if self._is_whole(number)
        ]

    def _merges(self) -> list[tuple[str, str]]:
        listed = self._list("merges", str)
        if listed is None:
            raise _Refused("tokenizer.ggml.merges is missing")
        merges = []
        for place, merge in enumerate(listed):
            middle = merge.find(" ", 1)
            left, right = (merge[:middle], merge[middle + 1 :]) if middle > 0 else (merge, "")
            for piece in (left, right, left + right):
                if piece not in self.ids:
                    raise _Refused(
                        f"tokenizer.ggml.merges[{place}]={merge[:40]!r} needs the piece {piece[:40]!r}, "
                        "which is not one of tokenizer.ggml.tokens"
                    )
            merges.append((left, right))
        return merges

    def _byte_level(self) -> dict[str, Any]:
        name = self._pre()
        entry = BY_NAME.get(name)
        if entry is None:
            raise _Refused(f"tokenizer.ggml.pre={name!r} is not one of {', '.join(sorted(BY_NAME))}")
        return {
            "normalizer": None,
            "pre_tokenizer": described(entry),
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "model": _bpe(self._vocabulary(), self._merges(), ignore_merges=entry.ignore_merges),
        }

    def _pre(self) -> str:
        return self._value("pre", str) or "default"

    def _pieces(self) -> dict[str, Any]:
        """A SentencePiece vocabulary: spaces are written as ▁, and unknown characters as bytes."""
        prefix = self._flag("add_space_prefix", True)
        normalizer: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, normalizer]}
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self.special[GGML + "unknown_token_id"]
        if unknown is None:
            unknown = 0
        return {
            "normalizer": normalizer,
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _bpe(
                self._vocabulary(),
                self._merges_of_scores(),
                byte_fallback=True,
                fuse_unk=True,
                unk_token=self.tokens[unknown],
            ),
        }

    def _merges_of_scores(self) -> list[tuple[str, str]]:
        """Every way to make a piece from two others, best score first, because llama.cpp merges any two neighbours that make a piece."""
        scores = self._list("scores", (int, float), len(self.tokens))
        if scores is None:
            raise _Refused("tokenizer.ggml.scores is missing")
        if not all(map(math.isfinite, scores)):
            raise _Refused("tokenizer.ggml.scores holds values that are not finite")
        pieces = [number for number in range(len(self.tokens)) if not self._is_whole(number)]
        parts = {self.tokens[number] for number in pieces}
        pieces.sort(key=lambda number: -scores[number])  # stable: equal scores are sorted by id
        return [
            (token[:cut], token[cut:])
            for token in (self.tokens[number] for number in pieces)
            for cut in range(1, len(token))
            if token[:cut] in parts and token[cut:] in parts
        ]

    def _post_processor(self) -> dict[str, Any] | None:
        """The tokens that llama.cpp adds before and after every text."""
        entry = BY_NAME.get(self._pre()) if self._is_byte_level() else None
        add_bos = self._flag("add_bos_token", entry.add_bos if entry else True)
        ends = {}
        for side, key, otherwise, wanted in (
            ("bos", "bos_token_id", 1, add_bos),
            ("eos", "eos_token_id", 2, self._flag("add_eos_token", False)),
        ):
            if not wanted:
                continue
            number = self.special[GGML + key]
            if number is None and self.kind == "llama" and otherwise < len(self.tokens):
                number = self.special[GGML + key] = otherwise
            if number is None:
                raise _Refused(f"tokenizer.ggml.add_{side}_token=true without tokenizer.ggml.{key}")
            ends[side] = number
        if not ends:
            return None
        texts = [{"Sequence": {"id": "A", "type_id": 0}}], [{"Sequence": {"id": "B", "type_id": 1}}]
        for type_id, text in enumerate(texts):
            for side, number in ends.items():
                token = {"SpecialToken": {"id": self.tokens[number], "type_id": type_id}}
                text.insert(0 if side == "bos" else len(text), token)
        return {
            "type": "TemplateProcessing",
            "single": texts[0],
            "pair": texts[0] + texts[1],
            "special_tokens": {
                self.tokens[number]: {"id": self.tokens[number], "ids": [number], "tokens": [self.tokens[number]]}
                for number in ends.values()
            },
        }

    def _chat_template(self) -> str | dict[str, str] | None:
        """The chat template, or several templates by name."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        templates = {
            key.removeprefix(TEMPLATE).removeprefix(".") or "default": template
            for key, template in self.values.items()
            if key == TEMPLATE or key.startswith(TEMPLATE + ".")
        }
        for label, template in templates.items():
            if not isinstance(template, str):
                raise _Refused(f"its chat template {label!r} is of type {type(template).__name__}, expected str")
            try:
                _compile_jinja_template(template)
            except (TemplateError, RecursionError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise _Refused(f"its chat template {label!r} is not valid ({reason})") from None
        return templates["default"] if templates.keys() == {"default"} else templates or None


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "type": "BPE",
        **plain,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": vocabulary,
        "merges": merges,
    }
