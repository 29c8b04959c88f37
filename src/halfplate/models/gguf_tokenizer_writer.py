"""A tokenizer as the metadata of a GGUF file, if llama.cpp produces the same tokens with it.

llama.cpp supports two kinds: byte-level vocabularies, split by one of its named pre-tokenizers, and SentencePiece
vocabularies, which it merges by score. It applies no normaliser, so text that is not in NFC form gives other tokens there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Any

from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.models.gguf_pre_tokenizers import BYTES, PRE_TOKENIZERS, Cut, PreTokenizer, read_steps, written_steps
from halfplate.models.gguf_special_tokens import (
    CONTROL_SPELLINGS,
    NOT_STRIPPED,
    ORDINARY_END,
    STRIPPING_NAMES,
    overlapping,
)

SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unk",
    "pad_token": "pad",
    "sep_token": "sep",
    "mask_token": "mask",
}
# Bytes that do not occur in UTF-8 text.
NEVER_IN_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}
# Control characters, and first bytes of planes of Unicode without characters: a vocabulary of real text may lack them.
HARDLY_IN_TEXT = {*range(0x20), 0x7F, 0xF1, 0xF2} - set(b"\t\n\r")
WITHOUT_MERGE = -1e6


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Add the vocabulary, its merges or scores, special tokens and chat templates to a gguf.GGUFWriter.

    Raises HalfplateError if llama.cpp would produce different tokens, and for a token id of `vocab_size` or more.
    """
    if not tokenizer.is_fast:
        raise HalfplateError("format='gguf': the tokenizer has no tokenizer.json; save its fast form beside the model")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    try:
        _add(writer, tokenizer, described, vocab_size)
    except ValueError as error:
        raise HalfplateError(
            f"format='gguf': llama.cpp cannot make the tokens of this tokenizer: {error}; export it as dense"
        ) from None


def _add(writer: Any, tokenizer: Any, described: dict[str, Any], vocab_size: int) -> None:
    from gguf import TokenType

    model, added = described["model"], {token["id"]: token for token in described["added_tokens"]}
    _check_model(model)
    vocabulary = {text: number for text, number in tokenizer.get_vocab().items() if number not in added}
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for text, number in [*vocabulary.items(), *((token["content"], number) for number, token in added.items())]:
        if number >= vocab_size:
            raise HalfplateError(
                f"format='gguf': the tokenizer has {text!r} at {number}, the model {vocab_size} embeddings; "
                "give it the tokenizer it was trained with, or export it as dense"
            )
        tokens[number], kinds[number] = text, TokenType.NORMAL
    for number, token in added.items():
        kinds[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    _check_tokens(tokens, vocabulary)
    _check_added(writer, added.values(), vocabulary.keys() | set(tokens), described["normalizer"])
    pieces = model.get("byte_fallback", False)
    if pieces:
        for number, text in enumerate(tokens):
            if len(text) == 6 and text.startswith("<0x"):
                kinds[number] = TokenType.BYTE
            elif number == tokenizer.unk_token_id:
                kinds[number] = TokenType.UNKNOWN
        _add_pieces(writer, described, vocabulary, tokens)
    else:
        _add_byte_level(writer, described, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special_tokens(writer, tokenizer)
    _add_chat_template(writer, tokenizer.chat_template)


def _check_model(model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise ValueError(f"its type is {model['type']}, expected byte-level BPE or BPE with byte fallback")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"its model has {option}={model[option]!r}")


def _check_tokens(tokens: list[str], vocabulary: dict[str, int]) -> None:
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"two of its tokens are {next(t for t in tokens if tokens.count(t) > 1)!r}")
    ordinary = CONTROL_SPELLINGS & vocabulary.keys()
    if any(token in tokens for token in ORDINARY_END):
        ordinary -= {"</s>"}
    if ordinary:
        raise ValueError(
            f"{min(ordinary)!r} is an ordinary token of it, which llama.cpp takes for a special one: add it as a special token"
        )


def _check_added(
    writer: Any, added: Iterable[dict[str, Any]], texts: set[str], normalizer: dict[str, Any] | None
) -> None:
    """Check that added tokens are matched in the unchanged text, and that they strip no spaces, except for Phi-3."""
    added = list(added)
    for token in added:
        for flag in ("single_word", "lstrip"):
            if token[flag]:
                raise ValueError(f"the token {token['content']!r} has {flag}")
        # After normalisation, it may match other text.
        if token["normalized"] and _prepends(normalizer):
            raise ValueError(f"the token {token['content']!r} is matched in normalised text (normalized)")
    if pair := overlapping([token["content"] for token in added]):
        raise ValueError(
            f"its tokens {pair[0]!r} and {pair[1]!r} can overlap, and llama.cpp splits such text differently"
        )
    stripping = [token for token in added if token["rstrip"]]
    if not stripping:
        return
    like_phi3 = {"</s>", *NOT_STRIPPED} <= texts and all(
        token["rstrip"] or token["content"] in NOT_STRIPPED for token in added
    )
    if not like_phi3 or any(token["content"] in NOT_STRIPPED for token in stripping):
        raise ValueError(f"the token {stripping[0]['content']!r} has rstrip")
    _name_phi3(writer)


def _name_phi3(writer: Any) -> None:
    """Write a name that contains Phi-3, for which llama.cpp strips the spaces after special tokens."""
    names = [entries["general.name"].value for entries in writer.kv_data if "general.name" in entries]
    if not names:
        writer.add_name("phi-3")
    elif not any(part in str(names[0]).lower() for part in STRIPPING_NAMES):
        raise ValueError(f"its special tokens strip spaces as in Phi-3, but the name of the model is {names[0]!r}")


def _prepends(normalizer: dict[str, Any] | None) -> bool:
    return '"Prepend"' in json.dumps(normalizer)


# Byte-level vocabularies


def _add_byte_level(writer: Any, described: dict[str, Any], vocabulary: dict[str, int]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    normalizer = _steps(described["normalizer"], "normalizers")
    if any(step["type"] != "NFC" for step in normalizer):
        raise ValueError(f"it normalises text by {', '.join(step['type'] for step in normalizer)}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    steps = read_steps(described["pre_tokenizer"])
    if BYTES not in steps:
        raise ValueError("its pre-tokenizer has no step ByteLevel, and its model no byte fallback")
    alphabet = set(ByteLevel.alphabet()) - vocabulary.keys()
    lacked = {byte for byte in range(256) if byte not in NEVER_IN_TEXT and _spelled(bytes([byte])) in alphabet}
    if missing := lacked - HARDLY_IN_TEXT:
        raise ValueError(f"it has no token for {len(missing)} of the 256 bytes")
    if lacked:
        # Both leave such a byte out, but llama.cpp does not merge what stands around it.
        warnings.warn(
            f"format='gguf': the vocabulary lacks {len(lacked)} control characters and unused bytes ({', '.join(f'0x{byte:02X}' for byte in sorted(lacked))}); "
            "llama.cpp may make different tokens of text with them",
            HalfplateWarning,
            stacklevel=2,
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name(steps, described, vocabulary))
    writer.add_token_merges(merges)


def _name(steps: tuple[str, ...], described: dict[str, Any], vocabulary: dict[str, int]) -> str:
    """llama.cpp's name for the steps; raises ValueError if it has none, or if it merges differently under that name."""
    candidates = [entry for entry in PRE_TOKENIZERS if _fits(entry, steps, vocabulary)]
    if not candidates:
        for entry in PRE_TOKENIZERS:
            if any((*meant, BYTES) == steps for meant in entry.meant):
                raise ValueError(f"llama.cpp's {entry.names[0]!r} splits some text differently: {entry.differs}")
        raise ValueError(f"it splits text by {written_steps(steps)}, which is not one of llama.cpp's pre-tokenizers")
    whole = bool(described["model"].get("ignore_merges"))
    for entry in candidates:
        if entry.ignore_merges == whole:
            return entry.names[0]
    # ignore_merges only matters for tokens that the merges do not produce.
    lost = _unreachable(described["model"], vocabulary)
    if lost is None:
        return candidates[0].names[0]
    raise ValueError(
        f"llama.cpp's {candidates[0].names[0]!r} has ignore_merges={not whole}, with which {lost!r} is split differently"
    )


def _fits(entry: PreTokenizer, steps: tuple[str, ...], vocabulary: dict[str, int]) -> bool:
    return entry.steps == steps or any(cut.steps == steps and not _crossed(cut, vocabulary) for cut in entry.cuts)


def _crossed(cut: Cut, vocabulary: dict[str, int]) -> bool:
    """Whether a token extends over the ends of a match of the cut."""
    from tokenizers import Regex, decoders
    from tokenizers.pre_tokenizers import Split

    split, decoder = Split(Regex(cut.pattern), "isolated"), decoders.ByteLevel()
    texts = vocabulary if cut.on_bytes else (decoder.decode([token]) for token in vocabulary)
    return any(len(split.pre_tokenize_str(text)) > 1 for text in texts)


def _unreachable(model: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """A token that merging its characters does not produce; None if there is none."""
    from tokenizers.models import BPE

    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merging = BPE(model["vocab"], [(first, second) for first, second in pairs])
    return next((token for token in vocabulary if len(merging.tokenize(token)) > 1), None)


def _spelled(text: bytes) -> str:
    """Bytes as the 256 characters of GPT-2."""
    return "".join(_ALPHABET[byte] for byte in text)


def _alphabet() -> list[str]:
    """The 256 characters of GPT-2: printable bytes are themselves, the others are characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_ALPHABET = _alphabet()


# SentencePiece vocabularies


def _add_pieces(writer: Any, described: dict[str, Any], vocabulary: dict[str, int], tokens: list[str]) -> None:
    """Write the scores of a SentencePiece vocabulary: llama.cpp merges the pair whose union has the highest score, so earlier merges get higher scores."""
    prefix = _space_prefix(described, vocabulary)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in described["model"]["merges"]]
    if described["model"].get("ignore_merges") and (lost := _unreachable(described["model"], vocabulary)) is not None:
        raise ValueError(f"its ignore_merges makes the token {lost!r} without merging, which llama.cpp cannot do")
    missing = [byte for byte in range(256) if byte not in NEVER_IN_TEXT and f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise ValueError(f"it has no token for {len(missing)} of the 256 bytes")
    scores = _scores(merges, vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores.get(text, WITHOUT_MERGE) for text in tokens])
    writer.add_add_space_prefix(prefix)


def _scores(merges: list[tuple[str, ...]], vocabulary: dict[str, int]) -> dict[str, float]:
    """A score for every merged piece; raises ValueError if merging by score would not reproduce the merges.

    llama.cpp merges any two neighbours whose union is a piece. So the merges must list every such pair, and all pairs of one
    piece before any pair of the next.
    """
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece in scores and piece != last:
            raise ValueError(f"its merges make {piece!r} at two ranks")
        scores.setdefault(piece, -float(rank))
        last = piece
    listed = set(merges)
    for piece in vocabulary:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in listed:
                raise ValueError(f"its merges do not make {piece!r} of {pair[0]!r} and {pair[1]!r}, llama.cpp does")
    return scores


def _space_prefix(described: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Whether a space is added before the text; raises ValueError for steps that do more than replace spaces by ▁."""
    normalizer = _steps(described["normalizer"], "normalizers")
    marked = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    if marked in normalizer:
        # After the replacement there is no space to split at.
        steps = [step for step in steps if not (step["type"] == "Split" and step["pattern"] == {"String": " "})]
    match normalizer, steps:
        case [{"type": "Prepend", "prepend": "▁"}, replace], [] if replace == marked:
            return True
        case [replace], [] if replace == marked:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}]:
            if split and any("▁" in piece[1:] for piece in vocabulary):
                raise ValueError("it splits text at spaces (Metaspace with split) and has pieces over several words")
            if scheme == "never":
                return False
            # Like SentencePiece, with which such models were trained, and unlike transformers 5.
            warnings.warn(
                "format='gguf': llama.cpp writes a space before every text, also after special tokens and before a space; "
                f"this tokenizer (Metaspace, {scheme}) writes none there, so llama.cpp makes different tokens of such text",
                HalfplateWarning,
                stacklevel=2,
            )
            return True
    kinds = [step["type"] for step in (*normalizer, *steps)]
    raise ValueError(f"it prepares text by {', '.join(kinds) or 'nothing'}, expected spaces replaced by ▁")


def _steps(description: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer as a flat list."""
    if description is None:
        return []
    if description["type"] != "Sequence":
        return [description]
    return [step for one in description[inner] for step in _steps(one, inner)]


# Special tokens and templates


def _add_special_tokens(writer: Any, tokenizer: Any) -> None:
    """Write the ids of special tokens, and which tokens are added before and after every text."""
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no eos_token, and llama.cpp would take one of its own: set tokenizer.eos_token")
    for attribute, key in SPECIAL.items():
        number = getattr(tokenizer, f"{attribute}_id")
        if number is not None:
            getattr(writer, f"add_{key}_token_id")(number)
    bare, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    bos = len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id
    eos = len(whole) > len(bare) + bos and whole[-1] == tokenizer.eos_token_id
    if whole != [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
        raise ValueError(f"it makes {whole} of 'a', which is {bare} between other tokens than bos and eos")
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)


def _add_chat_template(writer: Any, template: str | dict[str, str] | None) -> None:
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template is not None:
        writer.add_chat_template(template)
