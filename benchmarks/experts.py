"""Decoding mixtures of experts: experts together in one native call, one by one, and dense in transformers.

    python benchmarks/experts.py [qwen3|mixtral]    about two minutes on one core; 2 GB of disk in a temporary folder, 5 GB of memory

A model with random weights is compressed by rounding to int4 with groups of 32. All contenders decode the same random tokens, taking turns;
each round starts with another. Figures are CPU times of one thread, which a busy machine disturbs least, and medians over the rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import machine, table
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import halfplate
from halfplate.compression.compress import compress
from halfplate.recipe import Recipe

COMMON = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": COMMON | {"model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 384},
    "mixtral": COMMON | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 3072},
}  # fmt: skip
ROUNDS, TOKENS, PROMPT = 9, 24, 32


def random_model(shape: dict[str, Any]) -> Any:
    """The model in bf16. Tensors that start as random numbers are as transformers makes them."""
    torch.manual_seed(0)
    kind = shape["model_type"]
    config = AutoConfig.for_model(kind, **{key: value for key, value in shape.items() if key != "model_type"})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def seconds_a_token(model: Any, ids: torch.Tensor) -> float:
    """CPU time per token after a prompt."""
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
    start = time.process_time()
    for position in range(PROMPT, PROMPT + TOKENS):
        model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
    return (time.process_time() - start) / TOKENS


def one_by_one(model: Any) -> Callable[[torch.Tensor], float]:
    """The same checkpoint without grouped calls."""

    def seconds(ids: torch.Tensor) -> float:
        with mock.patch("halfplate.models.experts.module.rows_in_group", return_value=0):
            return seconds_a_token(model, ids)

    return seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("shapes", nargs="*", default=list(SHAPES))
    torch.set_num_threads(1)
    print(machine())
    for name in arguments.parse_args().shapes:
        dense = random_model(SHAPES[name])
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / "dense", Path(folder) / "out"
            dense.save_pretrained(source)
            # Not used, but a compressed model is never written without one.
            words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
            PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(source)
            recipe = Recipe(method="rtn", pattern="dense", core_dtype="int4", group_size=32, threads=1)
            compress(str(source), out, recipe, benchmark=False, check=False)
            size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            loaded, rounded = halfplate.load(out, activations="float"), halfplate.load(out, activations="int8")
        print(halfplate.runtime.explain(loaded))
        exact = AutoModelForCausalLM.from_config(dense.config, dtype=torch.float32).eval()
        exact.load_state_dict(dense.state_dict())
        contenders = {
            "int4, experts in one call": lambda ids: seconds_a_token(loaded, ids),  # noqa: B023
            "int4, experts one by one": one_by_one(loaded),
            "int4, int8 activations, experts in one call": lambda ids: seconds_a_token(rounded, ids),  # noqa: B023
            "int4, int8 activations, experts one by one": one_by_one(rounded),
            "transformers, bf16": lambda ids: seconds_a_token(dense, ids),  # noqa: B023
            "transformers, fp32": lambda ids: seconds_a_token(exact, ids),  # noqa: B023
        }
        ids = torch.randint(0, dense.config.vocab_size, (ROUNDS + 1, PROMPT + TOKENS))
        found: dict[str, list[float]] = {contender: [] for contender in contenders}
        for turn in range(ROUNDS + 1):
            order = list(contenders)[turn % len(contenders) :] + list(contenders)[: turn % len(contenders)]
            for contender in order:
                seconds = contenders[contender](ids[turn : turn + 1])
                if turn:  # the first round warms up
                    found[contender].append(seconds)
        medians = {contender: statistics.median(each) for contender, each in found.items()}
        first = next(iter(medians.values()))
        rows = [
            [contender, f"{1e3 * median:.2f}", f"{1 / median:.1f}", f"{median / first:.2f}"]
            for contender, median in medians.items()
        ]
        print(f"{name}, {size / 1e6:.0f} MB in int4")
        print(table(["", "ms of CPU a token", "tokens/s", "times the first"], rows))


if __name__ == "__main__":
    main()
