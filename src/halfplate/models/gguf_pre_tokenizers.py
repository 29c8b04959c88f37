"""How byte-level vocabularies split text before merging, and llama.cpp's names for it (`tokenizer.ggml.pre`).

A GGUF file holds only the name; a tokenizer.json holds the steps. The patterns are what llama.cpp computes for each name, in
the syntax of the `tokenizers` library. For most names they equal the tokenizer.json; otherwise `meant` has its steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}+"
THREE_DIGITS = r"\p{N}{1,3}"
THREE_ASCII_DIGITS = "[0-9][0-9][0-9]"
# Groups of three counted from the right, as in 1,234,567.
THREE_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
# llama.cpp splits after the first group and not before it.
THREE_WITH_TEXT_BEFORE = rf"[^\p{{N}}]*{THREE_FROM_THE_RIGHT}"
PUNCTUATION = r"[\p{P}$+<=>^~|`]+"  # the step Punctuation with the behaviour Contiguous

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
QWEN2 = rf"{_SUFFIX}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
QWEN35 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
NO_SUFFIX = rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
SEED_CODER = rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
EXAONE_MOE = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
JAIS2 = (
    rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+"
    + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
MINICPM5 = rf"{_SUFFIX}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    """Words that are split where a capital follows a small letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


TEKKEN = _cased("", r"\p{N}")
GPT4O = _cased(f"{_SUFFIX}?", r"\p{N}{1,3}")
YOUTU = _cased(f"{_SUFFIX}?", r"\p{N}")

_ASCII_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"


def _cased_by_llama(suffix: str, digits: str) -> str:
    """`_cased` as llama.cpp computes it: letters beyond ASCII count as both capital and small, and marks are not part of words."""
    start, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
    words = f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


def _caseless(digits: str) -> str:
    """`_cased` as llama.cpp computes it from the expression of the tokenizer.json: it ignores case."""
    words = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_ASCII_SUFFIX}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"

_ASCII_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
DEEPSEEK_V3 = rf"{_ASCII_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
SPARK = rf"{_ASCII_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
HAN_AND_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
HAN_AND_HANGUL = "[一-龥ࠀ-一가-\ud7ff]+"
HAN_AND_HANGUL_NO_SPACES = r"[[一-龥ࠀ-一가-\ud7ff]&&[^\s]]+"
AFMOE_SCRIPTS = "[一-鿿㐀-䶿豈-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+"
# Letters with case, by Unicode blocks, as DeepSeek LLM lists them.
CASED_LETTERS = (
    r"\s?"
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴ"
    "ᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
PUNCTUATION_BLOCKS = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
PUNCTUATION_BLOCKS_NO_SPACES = r"\s?[!-/:-~！-／：-～‘-‟、-。]+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
COHERE_DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"


@dataclass(frozen=True)
class Cut:
    """An additional step of a tokenizer.json that llama.cpp does not have: `pattern` on the text, or on its bytes if `on_bytes`.

    It has no effect if no token of the vocabulary crosses it.
    """

    steps: tuple[str, ...]
    pattern: str
    on_bytes: bool


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split text: regular expressions that are applied in sequence, where each match becomes a piece.

    names: the names in llama.cpp; an export writes the first
    ignore_merges: a whole piece that is a token is used without merging
    add_bos: whether llama.cpp adds the bos token if the file does not say
    cuts: additional steps of some tokenizer.json files
    meant: the steps of the tokenizer.json, if llama.cpp splits differently; such a pre-tokenizer is not written
    differs: the text that is split differently, for the message
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    cuts: tuple[Cut, ...] = ()
    meant: tuple[tuple[str, ...], ...] = ()
    differs: str = ""

    @property
    def steps(self) -> tuple[str, ...]:
        return (*self.patterns, BYTES)


BYTES = "bytes"  # the step that maps bytes to the 256 characters of GPT-2; it has no regular expression in the table
_DEEPSEEK_LLM = ("[\r\n]", CASED_LETTERS, PUNCTUATION_BLOCKS, r"\s+$", HAN_AND_HANGUL)
_DEEPSEEK_LLM_BY_LLAMA = (
    *("[\r\n]", CASED_LETTERS, PUNCTUATION_BLOCKS_NO_SPACES, r"\s+$", HAN_AND_HANGUL_NO_SPACES),
    DIGITS,
)
_MARKS = "words with combining marks (as of Hindi and Thai) and with capitals beyond ASCII"
_WIDE_SPACES = "around spaces beyond ASCII, as U+3000"

PRE_TOKENIZERS = (
    PreTokenizer(("default",), (PUNCTUATION.replace("`", ""), GPT2, DIGITS, THREE_ASCII_DIGITS)),
    PreTokenizer(
        (
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ),
        (GPT2,),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), (DIGIT, GPT2)
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("glm4", "glm5"), (LLAMA3,), ignore_merges=True),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe"), (LLAMA3,)),
    PreTokenizer(
        (
            *("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo"),
            *("f2llmv2", "bailingmoe", "bailingmoe2", "llada-moe"),
        ),
        (QWEN2,),
    ),
    PreTokenizer(("qwen35",), (QWEN35,)),
    PreTokenizer(
        ("tekken",),
        (_cased_by_llama("", DIGIT),),
        ignore_merges=True,
        add_bos=True,
        meant=((TEKKEN,),),
        differs=_MARKS,
    ),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        (_cased_by_llama(_ASCII_SUFFIX, THREE_DIGITS),),
        meant=((GPT4O,),),
        differs=_MARKS,
    ),
    PreTokenizer(
        ("tiny_aya", "cohere2moe"),
        (THREE_WITH_TEXT_BEFORE, _caseless(THREE_DIGITS)),
        meant=((COHERE_DIGITS, GPT4O),),
        differs="words like camelCase, and text before numbers",
    ),
    PreTokenizer(
        ("deepseek-llm",),
        _DEEPSEEK_LLM_BY_LLAMA,
        meant=((*_DEEPSEEK_LLM, DIGIT), (*_DEEPSEEK_LLM, DIGITS)),
        differs=_WIDE_SPACES,
    ),
    PreTokenizer(
        ("deepseek-coder",),
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_AND_HANGUL_NO_SPACES, DIGIT),
        meant=(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_AND_HANGUL, DIGIT),),
        differs=_WIDE_SPACES,
    ),
    PreTokenizer(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), (THREE_DIGITS, HAN_AND_KANA, DEEPSEEK_V3)),
    PreTokenizer(("spark2_5",), (THREE_DIGITS, HAN_AND_KANA, SPARK, DIGIT)),
    PreTokenizer(
        ("youtu",),
        (YOUTU_SCRIPTS, _caseless(DIGIT)),
        ignore_merges=True,
        meant=((YOUTU_SCRIPTS, YOUTU),),
        differs="words like camelCase",
    ),
    PreTokenizer(
        ("falcon",),
        (PUNCTUATION, GPT2, THREE_ASCII_DIGITS),
        cuts=(Cut((PUNCTUATION, GPT2, BYTES, DIGITS, THREE_ASCII_DIGITS), DIGITS, on_bytes=True),),
    ),
    PreTokenizer(("bloom", "poro-chat", "gpt3-finnish"), (BLOOM,)),
    PreTokenizer(("viking",), (BLOOM, DIGIT)),
    PreTokenizer(("seed-coder",), (SEED_CODER,)),
    PreTokenizer(
        ("superbpe",),
        (DIGITS, "(?=([0-9]{3})+(?![0-9]))"),
        meant=((DIGITS, r"(?=(\d{3})+(?!\d))"),),
        differs="numbers with digits beyond ASCII",
    ),
    PreTokenizer(("ufakzeka",), (NO_SUFFIX,)),
    PreTokenizer(
        ("afmoe",),
        (THREE_WITH_TEXT_BEFORE, AFMOE_SCRIPTS, DEEPSEEK_V3),
        meant=((THREE_FROM_THE_RIGHT, AFMOE_SCRIPTS, DEEPSEEK_V3),),
        differs="spaces before numbers",
    ),
    PreTokenizer(("laguna",), (r"[^\n]+|[\n]+", QWEN2)),
    PreTokenizer(("exaone-moe",), (EXAONE_MOE,)),
    PreTokenizer(("jais-2",), (JAIS2,)),
    PreTokenizer(("minicpm5",), (THREE_DIGITS, MINICPM5), ignore_merges=True),
)
BY_NAME = {name: entry for entry in PRE_TOKENIZERS for name in entry.names}

# An equivalent expression.
_TIKTOKEN_SUFFIX = r"'(?i:[sdmt]|ll|ve|re)"
SPELLINGS = {
    _TIKTOKEN_SUFFIX
    + r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": LLAMA3,
    _TIKTOKEN_SUFFIX + r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": QWEN2,
    GPT2.removesuffix(r"|\s+"): GPT2,
}


def split_step(pattern: str) -> dict[str, Any]:
    """A step of tokenizer.json for one regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def described(entry: PreTokenizer) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json."""
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*map(split_step, entry.patterns), to_bytes]}


def read_steps(description: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps of a tokenizer.json's pre-tokenizer, in the form of the table.

    Raises ValueError for a step that the table cannot express.
    """
    return tuple(_flat(description))


def written_steps(steps: tuple[str, ...]) -> str:
    """The steps as text for a message."""
    return ", then ".join(step if step == BYTES else repr(step[:80]) for step in steps)


def _flat(step: dict[str, Any] | None) -> Iterable[str]:
    match step:
        case {"type": "Sequence", "pretokenizers": [*inner]}:
            for one in inner:
                yield from _flat(one)
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            if rest.get("use_regex", True):
                yield GPT2
            yield BYTES
        case {"type": "ByteLevel"}:
            raise ValueError("llama.cpp writes no space before a byte-level text (add_prefix_space)")
        case {"type": "Split", "pattern": {"Regex": str() as pattern}, "behavior": behaviour, "invert": invert}:
            known = SPELLINGS.get(pattern, pattern)
            # Removing the text that does not match changes nothing if everything matches.
            if (behaviour, invert) != ("Isolated", False) and not (
                (behaviour, invert) == ("Removed", True) and known.endswith(r"|\s+")
            ):
                raise ValueError(f"a split with behavior={behaviour!r}, invert={invert} is not one of llama.cpp's")
            yield known
        case {"type": "Digits", "individual_digits": individual}:
            yield DIGIT if individual else DIGITS
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            yield PUNCTUATION
        case _:
            raise ValueError(f"the step {str(step)[:100]} is not one of llama.cpp's")
