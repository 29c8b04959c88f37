"""Varied starts for text that a model generates: plain text, turns of a chat, code, and other languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of 8 sequences, the kinds in this order: half begin like `self`, with the start token alone.
PLAIN, CHAT, CODE, LANGUAGE = "plain", "chat", "code", "language"
ORDER = (PLAIN, CHAT, PLAIN, CODE, PLAIN, CHAT, PLAIN, LANGUAGE)

QUESTIONS = (
    "What is the capital of Portugal?",
    "Explain how a bicycle stays upright.",
    "Write a short story about a lost key.",
    "How do I cook rice?",
    "List five animals that live in the sea.",
    "What is the difference between a list and a tuple in Python?",
    "Give me some advice for a job interview.",
    "Why is the sky blue?",
    "Write an email to my landlord about a broken heater.",
    "Summarise the plot of Romeo and Juliet.",
    "What is 17 times 23? Explain each step.",
    "Translate 'good morning, my friend' into French.",
)
# None ends in a space: a tokenizer has the space at the beginning of the next word.
CODES = (
    "def",
    "import os\nimport sys\n",
    "#include <stdio.h>\n\nint main(",
    "class",
    "function",
    "SELECT",
    "<!DOCTYPE html>\n<html>\n",
    "#!/bin/bash\n",
    "package main\n\nimport (",
    "public class",
)
LANGUAGES = (
    "La ciudad de",
    "Il était une fois une",
    "Die Geschichte der",
    "L'acqua è",
    "Era uma vez um",
    "De stad",
    "В начале",
    "从前有一个",
    "日本の",
    "한국의",
    "في عام",
    "भारत में",
)


def varied_starts(tokenizer: PreTrainedTokenizerBase, first: int | None, samples: int, seed: int) -> list[list[int]]:
    """The first tokens of `samples` sequences, the same for the same seed; [] for a sequence that begins with the start token alone.

    first: the start token, put before a start that does not begin with it; None for none.
    A model without a chat template begins its turns like plain text.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = {CODE: CODES, LANGUAGE: LANGUAGES}
    begun = {CHAT: _turns(tokenizer)} | {
        kind: [_begun(_ids(tokenizer, text), first) for text in texts[kind]] for kind in texts
    }
    orders = {
        kind: torch.randperm(len(found), generator=generator, dtype=torch.int64, device="cpu").tolist()
        for kind, found in begun.items()
    }
    starts = list[list[int]]()
    used = dict.fromkeys(begun, 0)
    for number in range(samples):
        kind = ORDER[number % len(ORDER)]
        if not begun.get(kind):
            starts.append([])
            continue
        order = orders[kind]
        starts.append(begun[kind][order[used[kind] % len(order)]])
        used[kind] += 1
    return starts


def _turns(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        return []
    found = list[list[int]]()
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        found.append(list(encoded["input_ids"]))
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _begun(ids: list[int], first: int | None) -> list[int]:
    return ids if first is None or ids[:1] == [first] else [first, *ids]
