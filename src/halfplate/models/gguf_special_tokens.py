"""Special tokens, which are split off before any merging: which they are in llama.cpp, and where llama.cpp and tokenizers differ."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

# Tokens that llama.cpp treats as special because of their spelling, whatever type the file gives them.
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
# In vocabularies with one of these, </s> is an ordinary token (Gemma 4).
ORDINARY_END = ("<|tool_response>", "<|plamo:eos|>")
# If general.name contains one of these, llama.cpp strips spaces after special tokens, with some exceptions.
STRIPPING_NAMES = ("phi-3", "phi3")
NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")


def overlapping(tokens: Collection[str]) -> tuple[str, str] | None:
    """A pair of special tokens that llama.cpp and tokenizers split differently in some text; None if there is none.

    llama.cpp searches the whole text for the longest token, then for the next. `tokenizers` takes the first match, and the longest of several.
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
    """Whether the two algorithms differ on `first` followed by the part of `second` that it lacks."""
    text = first + second[shared:]
    if len(second.encode()) < len(first.encode()) or len(set(text)) == 1:  # runs of one character are split equally
        return False
    one, other = re.escape(first), re.escape(second)
    leftmost = re.split(f"({other}|{one})", text)
    longest = [
        piece
        for part in re.split(f"({other})", text)
        for piece in ([part] if part == second else re.split(f"({one})", part))
    ]
    return list(filter(None, leftmost)) != list(filter(None, longest))
