"""What is gained by keys and values of an earlier prompt, by caches in fewer bits, and by drafts from the text.

    python benchmarks/prefix.py MODEL          about ten minutes on one core; MODEL is a checkpoint with a chat template

Figures are CPU times of one thread. The two sides of a ratio take turns, and ratios are medians of ratios within a turn. Texts are those of
WikiText-2 (validation), and the answers to requests of each kind.
"""

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DATA, ROOT, machine, table, write_section
from torch import Tensor

import halfplate
from halfplate.checkpoint.read import load_tokenizer
from halfplate.runtime import explain, greedy
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.kept import CACHE_DTYPES
from halfplate.runtime.native_step import NativeDecoder
from halfplate.runtime.prompt_file import PromptFile
from halfplate.runtime.prompts import begin

WINDOWS, WINDOW = 6, 512
TURNS, KNOWN, NEW = 5, (128, 512, 1024), 32  # tokens of a prompt that are known, and that are not
ANSWER, DRAFT = 160, 7
SUBJECTS = ("a lighthouse", "a lost dog", "a train at night", "two sisters", "a stone", "winter", "a baker", "the sea")


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def articles() -> str:
    with gzip.open(DATA / "wikitext2" / "valid.jsonl.gz", "rt") as lines:
        texts = [json.loads(line) for line in lines]
    return "".join(text if isinstance(text, str) else text["text"] for text in texts)


def first_tokens(model: Any, ids: Tensor) -> list[list[str]]:
    """Until the first token of prompts that begin with a known text: the whole prompt, with the file, with memory."""
    rows = []
    for known in KNOWN:
        prompt, found = ids[: known + NEW], []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompt"
            file = PromptFile(model, path, torch.float32)
            cache = begin(model, None, prompt)
            greedy(model, prompt[None, :known], 1, cache=cache)
            file.keep(cache, prompt[:known])
            file.write()
            ways = (
                lambda prompt=prompt: greedy(model, prompt[None], 1),
                lambda prompt=prompt, path=path: greedy(
                    model, prompt[None], 1, cache=begin(model, PromptFile(model, path, torch.float32).prompt, prompt)
                ),
                lambda prompt=prompt, file=file: greedy(
                    model, prompt[None], 1, cache=begin(model, file.prompt, prompt)
                ),
            )
            for turn in range(TURNS + 1):
                times = {}
                for way in (0, 1, 2) if turn % 2 else (2, 1, 0):
                    times[way] = seconds(ways[way])
                if turn:  # the first one warms up
                    found.append([times[way] for way in range(3)])
            size = path.stat().st_size
        whole, by_file, by_memory = (statistics.median(each) for each in zip(*found, strict=True))
        ratios = [statistics.median(each[0] / each[way] for each in found) for way in (1, 2)]
        rows.append(
            [
                f"{known} + {NEW}",
                f"{whole:.3f}",
                f"{by_file:.3f}",
                f"{by_memory:.3f}",
                f"{ratios[0]:.1f}",
                f"{ratios[1]:.1f}",
                f"{size / 1e6:.0f}",
            ]
        )
    return rows


def cache_types(model: Any, ids: Tensor) -> list[list[str]]:
    """KL of the logits against those with a cache in fp32, and the time of a token after a long text."""
    decoder: NativeDecoder = model.native_decoder
    traits = decoder.traits

    def empty(room: int, dtype: torch.dtype) -> GrowingCache:
        return GrowingCache.with_room(len(traits.layers), 1, traits.kv_heads, room, traits.head_dim, dtype)

    exact, rows = [], []
    times = {name: [] for name in CACHE_DTYPES}
    caches = {name: empty(2048, dtype) for name, dtype in CACHE_DTYPES.items()}
    for cache in caches.values():
        decoder.step_rows(ids[None, :1500], cache, wanted=0)
    for _ in range(4 * TURNS):
        for name, cache in caches.items():
            times[name].append(seconds(lambda cache=cache: decoder.step(5, cache)))
            cache.crop(-1)
    for name, dtype in CACHE_DTYPES.items():
        losses = []
        for window in range(WINDOWS):
            part = ids[None, WINDOW * window : WINDOW * (window + 1)]
            logits = torch.log_softmax(decoder.step_rows(part, empty(WINDOW, dtype))[0], -1)
            if name == "fp32":
                exact.append(logits)
            losses.append(float((exact[window].exp() * (exact[window] - logits)).sum(-1).mean()))
        each = sum(
            keys.nbytes + values.nbytes for keys, values in ((y.kept_keys, y.kept_values) for y in caches[name].layers)
        )
        ratio = statistics.median(a / b for a, b in zip(times["fp32"], times[name], strict=True))
        rows.append(
            [
                name,
                f"{each / 2048:,.0f}",
                f"{statistics.mean(losses):.6f}",
                f"{max(losses):.6f}",
                f"{1e3 * statistics.median(times[name]):.2f}",
                f"{ratio:.2f}",
            ]
        )
    return rows


def drafts(model: Any, tokenizer: Any, text: str) -> list[list[str]]:
    """Greedy decoding with drafts against greedy decoding without."""
    parts = [part.strip() for part in text.split("\n") if 600 < len(part) < 900][: len(SUBJECTS)]
    kinds = {
        "repeat a paragraph": ["Repeat the following text exactly, word for word:\n\n" + part for part in parts],
        "summarise it": [
            "Summarise the following text in a few sentences, with quotations from it:\n\n" + part for part in parts
        ],
        "a short story": ["Write a short story about " + subject for subject in SUBJECTS],
    }
    rows = []
    for kind, requests in kinds.items():
        ratios, same, tokens, steps, drafted = [], 0, 0, 0, 0
        for turn, request in enumerate(requests):
            chat = [{"role": "user", "content": request}]
            ids = torch.tensor(
                [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]]
            )
            found = {most: answer(model, ids, most) for most in ((0, DRAFT) if turn % 2 else (DRAFT, 0))}
            ratios.append(found[0][1] / found[DRAFT][1])
            same += torch.equal(found[0][0], found[DRAFT][0])
            counts = found[DRAFT][2]
            tokens, steps = tokens + found[0][0].shape[1] - ids.shape[1] - 1, steps + len(counts)
            drafted += sum(counts) - len(counts)
        share = f"{(tokens - steps) / drafted:.0%}" if drafted else "none"
        rows.append(
            [
                kind,
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{tokens / steps:.2f}",
                share,
                f"{same} of {len(requests)}",
            ]
        )
    return rows


def answer(model: Any, ids: Tensor, most: int) -> tuple[Tensor, float, list[int]]:
    """The text, the seconds after its first token, and the tokens of each step."""
    times, counts = [], []
    one, many = NativeDecoder.step, NativeDecoder.step_rows
    NativeDecoder.step = lambda self, *rest: counts.append(1) or one(self, *rest)
    NativeDecoder.step_rows = lambda self, rows, *rest: counts.append(rows.shape[1]) or many(self, rows, *rest)
    ends = model.generation_config.eos_token_id
    stop = [ends] if isinstance(ends, int) else ends or []
    try:
        found = greedy(model, ids, ANSWER, stop, on_token=lambda _: times.append(time.process_time()), lookup=most)
    finally:
        NativeDecoder.step, NativeDecoder.step_rows = one, many
    return found, times[-1] - times[0], counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    name = parser.parse_args().model
    torch.set_num_threads(1)
    model, tokenizer = halfplate.load(name), load_tokenizer(name)
    text = articles()
    ids = torch.tensor(tokenizer(text[:40_000])["input_ids"])
    print(explain(model), flush=True)
    parts = [
        f"`python benchmarks/prefix.py` with SmolLM2-135M-Instruct, {explain(model).linears[0].path}, on {machine()}"
    ]
    for title, header, rows in (
        (
            "Seconds of CPU until the first token of a prompt",
            [
                "tokens known + new",
                "whole prompt",
                "with the file",
                "from memory",
                "ratio of the file",
                "ratio of memory",
                "file, MB",
            ],
            lambda: first_tokens(model, ids),
        ),
        (
            f"Types of the cache: KL of {WINDOWS} windows of {WINDOW} tokens, and the time of a token after 1,500",
            ["type", "bytes a token", "KL, mean", "KL, worst window", "ms a token", "times fp32"],
            lambda: cache_types(model, ids),
        ),
        (
            f"Drafts of up to {DRAFT} tokens, answers of up to {ANSWER}",
            [
                "request",
                "tokens/s, times those without",
                "range",
                "tokens a step",
                "guesses that were right",
                "same text",
            ],
            lambda: drafts(model, tokenizer, text),
        ),
    ):
        parts += [f"{title}:", table(header, rows())]
        print("\n".join(parts[-2:]), flush=True)
    write_section("prefix", "\n\n".join(parts), ROOT / "docs" / "decoding.md")


if __name__ == "__main__":
    main()
