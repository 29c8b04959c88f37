"""Decoding with the native step: one sequence, against the same checkpoint through transformers, and against the original model.

    python benchmarks/native_step.py [gemma3|qwen3_moe ...]    about five minutes on one core; 5 GB of memory, 1 GB of disk in a temporary folder

Models have random weights: Gemma 3 in the shape of 270M, Qwen3-MoE in a small shape (benchmarks/experts.py). They are compressed by rounding to
int4 with groups of 32; embedding and head to int8. All contenders decode the same random tokens, taking turns; each round starts with
another. Figures are CPU times of one thread, medians over the rounds, and ratios are medians of ratios within a round.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, table, write_section
from experts import SHAPES as MIXTURES
from experts import random_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import halfplate
from halfplate.compression.compress import compress
from halfplate.models.arguments import cache_argument
from halfplate.recipe import Recipe
from halfplate.runtime import explain
from halfplate.runtime.cache import GrowingCache

SHAPES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "sliding_window": 512,
        "max_position_embeddings": 2048,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    },
    "qwen3_moe": MIXTURES["qwen3"],
}
ROUNDS, TOKENS, PROMPT = 9, 24, 64


@torch.no_grad()
def seconds_a_token(model: Any, ids: torch.Tensor, cache: Any) -> float:
    """CPU time per token after a prompt. cache: None for that of transformers."""
    name = cache_argument(model.forward)
    cache = getattr(model(input_ids=ids[:, :PROMPT], use_cache=True, **{name: cache}), name)
    start = time.process_time()
    for position in range(PROMPT, PROMPT + TOKENS):
        model(input_ids=ids[:, position : position + 1], use_cache=True, **{name: cache})
    return (time.process_time() - start) / TOKENS


def compressed(dense: Any) -> Any:
    """The folder of a checkpoint is not needed after loading."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "dense", Path(folder) / "out"
        dense.save_pretrained(source)
        # Not used, but a compressed model is never written without one.
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(source)
        tables = {"embedding_dtype": "int8", "head_dtype": "int8"}
        recipe = Recipe(method="rtn", pattern="dense", core_dtype="int4", group_size=32, threads=1, **tables)
        compress(str(source), out, recipe, benchmark=False, check=False)
        return halfplate.load(out)


def figures(shape: dict[str, Any]) -> list[list[str]]:
    """The rows of the table of one model."""
    dense = random_model(shape)
    layers = dense.config.num_hidden_layers
    loaded = compressed(dense)
    print(explain(loaded), flush=True)
    exact = AutoModelForCausalLM.from_config(dense.config, dtype=torch.float32).eval()
    exact.load_state_dict(dense.state_dict())
    contenders = {
        "int4, native step": lambda ids: seconds_a_token(loaded, ids, GrowingCache(layers)),
        "int4, transformers with native linears": lambda ids: seconds_a_token(loaded, ids, None),
        "original bf16, transformers": lambda ids: seconds_a_token(dense, ids, None),
        "original fp32, transformers": lambda ids: seconds_a_token(exact, ids, None),
    }
    names = list(contenders)
    ids = torch.randint(0, dense.config.vocab_size, (ROUNDS + 1, PROMPT + TOKENS))
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = contenders[name](ids[turn : turn + 1])
            if turn:  # the first round warms up
                found[name].append(seconds)
    rows = []
    for name, seconds in found.items():
        ratios = [each / first for each, first in zip(seconds, found[names[0]], strict=True)]
        median = statistics.median(seconds)
        rows.append([name, f"{1e3 * median:.2f}", f"{1 / median:.1f}", f"{statistics.median(ratios):.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES))
    torch.set_num_threads(1)
    parts = [f"`python benchmarks/native_step.py` on {machine()}"]
    for name in parser.parse_args().shapes:
        parts += [f"{name}:", table(["", "ms of CPU a token", "tokens/s", "times the first"], figures(SHAPES[name]))]
        print("\n".join(parts[-2:]), flush=True)
    write_section("native step", "\n\n".join(parts))


if __name__ == "__main__":
    main()
