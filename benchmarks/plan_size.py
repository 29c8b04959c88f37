"""The time to plan a model with many matrices: a small Llama whose linears are listed many times, as experts would be.

python benchmarks/plan_size.py --matrices 1000 10000 100000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfplate.models.linears import FoundLinear
from halfplate.planning import make_plan, making
from halfplate.planning.room import refusal
from halfplate.recipe import Recipe


@contextmanager
def repeated(matrices: int) -> Iterator[None]:
    """Context manager in which a plan finds each linear under many names, so that there are at least `matrices`."""
    find = making.find_linears

    def many(*args: Any) -> tuple[list[FoundLinear], Any]:
        found, skipped = find(*args)
        copies = -(-matrices // len(found))
        return [replace(one, name=f"{one.name}.{copy}") for one in found for copy in range(copies)], skipped

    making.find_linears = many  # type: ignore[assignment]
    try:
        yield
    finally:
        making.find_linears = find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, nargs="+", default=[1000, 10_000, 100_000])
    options = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        print(
            "| matrices | seconds for `make_plan` | seconds for its JSON and the check of memory and disk |\n|---:|---:|---:|"
        )
        for matrices in options.matrices:
            with repeated(matrices):
                begin = time.perf_counter()
                plan = make_plan(folder, Recipe(seq_len=16))
                made = time.perf_counter()
                plan.to_json()
                refusal(plan, Path(folder) / "out", 1)
            print(f"| {len(plan.specs):,} | {made - begin:.1f} | {time.perf_counter() - made:.1f} |", flush=True)


if __name__ == "__main__":
    main()
