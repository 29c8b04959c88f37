"""Assisted decoding: the compressed model drafts for the dense one, which keeps what it would have written itself.

    python benchmarks/assisted.py SmolLM2 SmolLM2-2of4 --threads 2

For every prompt the dense model writes alone and with the draft, in turns that alternate; the draft is timed alone too. Acceptance
is the share of drafted tokens that the dense model kept; the speed ratio is the median over prompts of the ratio within a pair. Both
write greedily, so the texts are the same up to ties in rounding, which are counted.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, machine, table, write_section
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from halfplate.checkpoint.loading import load_any

PROMPTS = (
    "The history of the city begins with",
    "Water boils at a lower temperature on a mountain because",
    "To make a simple vegetable soup, first",
    "The main difference between a virus and a bacterium is",
    "Once upon a time there was a small bird who",
    "A list of things to pack for a week by the sea:",
    "In physics, energy is",
    "def fibonacci(n):",
)


class Drafts:
    """How many tokens were drafted, and how many of them kept."""

    def __init__(self) -> None:
        self.drafted = 0
        self.kept = 0


@contextmanager
def counted() -> Iterator[Drafts]:
    """While inside, the drafts of every assisted generation are counted."""
    drafts = Drafts()
    draft, learn = AssistedCandidateGenerator.get_candidates, AssistedCandidateGenerator.update_candidate_strategy

    def get_candidates(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = draft(self, input_ids, *args, **kwargs)
        drafts.drafted += found[0].shape[1] - input_ids.shape[1]
        return found

    def update(self: Any, input_ids: Tensor, scores: Tensor, num_matches: int, *args: Any, **kwargs: Any) -> Any:
        drafts.kept += int(num_matches)
        return learn(self, input_ids, scores, num_matches, *args, **kwargs)

    with (
        patch.object(AssistedCandidateGenerator, "get_candidates", get_candidates),
        patch.object(AssistedCandidateGenerator, "update_candidate_strategy", update),
    ):
        yield drafts


def written(model: Any, ids: Tensor, new_tokens: int, assistant: Any = None) -> tuple[Tensor, float]:
    """The continuation (new_tokens,) of `ids` (1, length), and the seconds that it took."""
    helped = {} if assistant is None else {"assistant_model": assistant}
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            **helped,
        )
    return out[0, ids.shape[1] :], time.perf_counter() - start


def measure(dense: Any, draft: Any, prompts: list[Tensor], new_tokens: int, draft_tokens: int) -> dict[str, Any]:
    """Acceptance, and the speed of the dense model with a draft over alone, of each prompt and in the median."""
    draft.generation_config = GenerationConfig.from_dict(draft.generation_config.to_dict())
    draft.generation_config.num_assistant_tokens = draft_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0  # always as many as were asked for
    for model, assistant in ((dense, None), (draft, None), (dense, draft)):
        written(model, prompts[0], min(4, new_tokens), assistant)  # not counted
    rows = []
    for number, ids in enumerate(prompts):
        found: dict[str, tuple[Tensor, float]] = {}
        with counted() as drafts:
            runs = [("alone", dense, None), ("draft", draft, None), ("assisted", dense, draft)]
            for name, model, assistant in runs if number % 2 == 0 else reversed(runs):
                found[name] = written(model, ids, new_tokens, assistant)
        rows.append(
            {
                "acceptance": drafts.kept / max(drafts.drafted, 1),
                "drafted": drafts.drafted,
                "speed_ratio": found["alone"][1] / found["assisted"][1],
                "draft_alone_ratio": found["alone"][1] / found["draft"][1],
                "same_text": torch.equal(found["alone"][0], found["assisted"][0]),
            }
        )
    return {
        "draft_tokens": draft_tokens,
        "new_tokens": new_tokens,
        "prompts": rows,
        "acceptance": sum(row["acceptance"] * row["drafted"] for row in rows) / sum(row["drafted"] for row in rows),
        "speed_ratio": median(row["speed_ratio"] for row in rows),
        "draft_alone_ratio": median(row["draft_alone_ratio"] for row in rows),
        "same_text": sum(row["same_text"] for row in rows),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dense", help="the dense model: a folder or a .gguf file")
    parser.add_argument("draft", help="the checkpoint that was made of it")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8], help="drafted a turn")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the dense model")
    parser.add_argument("--activations", default="float", choices=("float", "int8"), help="of the draft")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print, and leave RESULTS.md as it is")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose section is replaced")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dense, tokenizer = load_any(args.dense)
    dense = dense.to(getattr(torch, args.dtype)).eval()
    draft, _ = load_any(args.draft, activations=args.activations)
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    results = [measure(dense, draft, prompts, args.new_tokens, count) for count in args.draft_tokens]
    if args.json:
        print(json.dumps(results))
        return
    header = [
        "drafted a turn",
        "kept of the drafted",
        "dense with draft, × dense alone",
        "draft alone, × dense",
        "same text",
    ]
    rows = [
        [
            str(found["draft_tokens"]),
            f"{found['acceptance']:.1%}",
            f"{found['speed_ratio']:.2f}",
            f"{found['draft_alone_ratio']:.2f}",
            f"{found['same_text']} of {len(prompts)}",
        ]
        for found in results
    ]
    text = f"{args.new_tokens} tokens a prompt, dense in {args.dtype} · {machine()}\n\n{table(header, rows)}"
    write_section("assisted", text, args.results)


if __name__ == "__main__":
    main()
