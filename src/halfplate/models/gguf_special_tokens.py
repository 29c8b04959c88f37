"""Tokens that are cut out of a text before anything merges, as llama.cpp does it: which they are, and where it differs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

# Tokens that llama.cpp cuts out of a text by their spelling, whatever type the file gives them.
SPELLINGS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> "
    "[EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[ "
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> "
    "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> "
    "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|> "
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|> "
    "<|channel|> <|message|> <|start|> <|constrain|>"
)
CONTROL_SPELLINGS = frozenset(SPELLINGS.split())
# Vocabularies with one of these have an ordinary </s> (Gemma 4).
ORDINARY_END = ("<|tool_response>", "<|plamo:eos|>")
# llama.cpp strips spaces behind the special tokens of a model whose general.name holds one of these, except behind some.
STRIPPING_NAMES = ("phi-3", "phi3")
NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")


def overlapping(tokens: Collection[str]) -> tuple[str, str] | None:
    """Two tokens of which llama.cpp cuts others out of some text; None if there are none.

    It looks for the longest token everywhere, then for the next; `tokenizers` takes the first match, of several the longest.
    """
    by_start = defaultdict(list)
    for token in tokens:
        for length in range(1, len(token)):
            by_start[token[:length]].append(token)
    for first in tokens:
        for length in range(1, len(first)):
            for second in by_start.get(first[-length:], ()):
                if second != first and _cut_otherwise(first, second, length):
                    return first, second
    return None


def _cut_otherwise(first: str, second: str, shared: int) -> bool:
    """Whether both ways differ on `first` followed by what `second` adds to it."""
    text = first + second[shared:]
    if len(second.encode()) < len(first.encode()) or len(set(text)) == 1:  # runs of one character are cut alike
        return False
    one, other = re.escape(first), re.escape(second)
    leftmost = re.split(f"({other}|{one})", text)
    longest = [
        piece
        for part in re.split(f"({other})", text)
        for piece in ([part] if part == second else re.split(f"({one})", part))
    ]
    return list(filter(None, leftmost)) != list(filter(None, longest))
