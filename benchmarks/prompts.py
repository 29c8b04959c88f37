"""Reading prompts and decoding, side by side in one process: a checkpoint, its original in transformers, and GGUF files in llama.cpp.

    python benchmarks/prompts.py CHECKPOINT ORIGINAL --files Q4_K_M.gguf Q4_0.gguf --prompt 512

The checkpoint is timed with each mode of its activations. llama.cpp needs `pip install llama-cpp-python`; benchmarks/llama_types.py makes files of its
types. All take turns, and ratios are medians of ratios within a round. The table replaces the section `prompts` of RESULTS.md.
"""

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # read when torch is imported; the command line of halfplate does the same
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peers
import torch
from common import machine, table, write_section
from decode import Table

import halfplate
from halfplate.cli.console import silence_libraries
from halfplate.models.sources import load_dense

COLUMNS = ["model", "weights, MB", "prompt, tokens/s", "× original", "decode, tokens/s", "× original"]


def measured(options: argparse.Namespace, prompt: int) -> dict[str, Any]:
    """Figures of all models for a prompt of this length."""
    full = load_dense(options.original).model
    found = Table(prompt, full.config.vocab_size)
    found.dense(full, None)
    for activations in ("auto", "float"):
        found.ours(f"halfplate, activations {activations}", halfplate.load(options.checkpoint, activations=activations))
    with ExitStack() as opened:
        for file in options.files:
            peer = peers.LlamaCpp(file, options.threads, context=prompt + options.new_tokens + 8)
            opened.callback(peer.close)
            found.peer(f"llama.cpp {file.stem}", peer, full)
        return found.time(options.new_tokens, options.rounds)


def rows(result: dict[str, Any], prompt: int) -> list[list[str]]:
    """The rows of the table for one length of the prompt."""
    return [
        [
            f"{name}, {prompt} tokens",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['prefill_speedup']:.2f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['decode_speedup']:.2f}",
        ]
        for name, row in result["rows"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("original")
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="GGUF files of the same model")
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    lines = [row for prompt in options.prompt for row in rows(measured(options, prompt), prompt)]
    head = f"`python benchmarks/prompts.py`; {machine()}, {options.threads} threads, load {os.getloadavg()[0]:.1f}. *Original*: the faster of fp32 and bf16 in transformers."
    write_section("prompts", f"{head}\n\n{table(COLUMNS, lines)}")


if __name__ == "__main__":
    main()
