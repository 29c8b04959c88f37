"""Decoding several sequences at once, side by side in one process: a checkpoint, its original in transformers, and GGUF files in llama.cpp.

    python benchmarks/batches.py CHECKPOINT ORIGINAL --files Q4_0.gguf Q4_K_M.gguf --batches 1 4 16 64

All models take turns, and ratios are medians of ratios within a round. llama.cpp decodes with as many parallel sequences, each token of all of them in one
call (`pip install llama-cpp-python`). Every sequence has a prompt of its own. On a machine with other work, `--cpu --threads 1` counts seconds of the
processor instead of those of the clock: several threads would wait for each other at every barrier. `--keep` adds the rows to those of earlier calls, so that each call stays short;
the table replaces the section `batches` of RESULTS.md.
"""

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # read when torch is imported; the command line of halfplate does the same
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peers
import torch
from common import CACHE, machine, table, write_section
from torch import Tensor

import halfplate
from halfplate.cli.console import silence_libraries
from halfplate.evaluation import bench, speed
from halfplate.models.sources import load_dense
from halfplate.runtime.prompts import new_cache

DENSE = ("original fp32", "original bf16")
COLUMNS = ["model", "sequences", "new tokens", "rounds", "tokens/s, all together", "× original", "× original, range"]


def native_loop(model: Any) -> speed.Contender:
    """The native step alone, greedily, as `halfplate serve` and `generate` call it."""

    def run(ids: Tensor, new_tokens: int, first: Callable[[], None]) -> None:
        decoder, cache = model.native_decoder, new_cache(model)
        tokens = decoder.read(ids, cache, None, None, 1)[:, 0].argmax(-1)
        first()
        for _ in range(new_tokens - 1):
            tokens = decoder.step_batch(tokens, cache).argmax(-1)

    return run


class Parallel(peers.LlamaCpp):
    """llama.cpp with a number of sequences side by side."""

    def __init__(self, path: Path, threads: int, sequences: int, length: int) -> None:
        super().__init__(path, threads, context=sequences * length, sequences=sequences)
        self._batch = self._lib.llama_batch_init(sequences * length, 0, 1)

    def __call__(self, ids: Any, new_tokens: int, first: Callable[[], None]) -> None:
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        tokens = self._next(ids.tolist(), 0)
        first()
        for place in range(ids.shape[1], ids.shape[1] + new_tokens - 1):
            tokens = self._next([[token] for token in tokens], place)

    def _next(self, rows: list[list[int]], start: int) -> list[int]:
        """The most likely token of each sequence after its row of new tokens, which begin at position `start`."""
        batch, at, last = self._batch, 0, []
        for sequence, row in enumerate(rows):
            for place, token in enumerate(row):
                batch.token[at], batch.pos[at] = token, start + place
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = int(place == len(row) - 1)
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp failed to decode")
        rows_of = (self._lib.llama_get_logits_ith(self._context, place) for place in last)
        return [int(np.ctypeslib.as_array(one, shape=(self._vocabulary,)).argmax()) for one in rows_of]

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        super().close()


def measured(options: argparse.Namespace, sequences: int, models: dict[str, speed.Contender]) -> list[list[str]]:
    """Rows of the table for this number of sequences."""
    length, clock = options.prompt + options.new_tokens + 8, time.process_time if options.cpu else time.perf_counter
    ids = torch.randint(3, 40_000, (sequences, options.prompt), generator=torch.Generator().manual_seed(0))
    with ExitStack() as opened, torch.inference_mode():
        own = dict(models)
        for file in options.files:
            peer = Parallel(file, options.threads, sequences, length)
            opened.callback(peer.close)
            own[f"llama.cpp {file.stem}"] = peer
        for name, contender in own.items():
            contender(ids, bench.WARM_UP_TOKENS, lambda: None)
            print(f"{name}: ready", flush=True)
        tasks: dict[str, Callable[[], float]] = {
            name: lambda one=one: speed.time_generation(one, ids, options.new_tokens, clock).decode * sequences  # type: ignore[misc]
            for name, one in own.items()
        }
        rates = speed.alternate(tasks, options.rounds)
    best = max(DENSE, key=lambda name: median(rates[name]))
    rows = []
    for name, found in rates.items():
        ratios = sorted(a / b for a, b in zip(found, rates[best], strict=True))
        rows.append(
            [
                name,
                str(sequences),
                str(options.new_tokens),
                str(options.rounds),
                f"{median(found):.0f}",
                f"{median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="checkpoints, and last the original model")
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="GGUF files of the same model")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="count seconds of the processor")
    parser.add_argument("--keep", action="store_true", help="add to the rows of earlier calls")
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    *checkpoints, original = options.checkpoints
    models: dict[str, speed.Contender] = {}
    for folder in checkpoints:
        name = Path(folder).name
        for activations in ("auto", "float"):
            model = halfplate.load(folder, activations=activations)
            models[f"{name}, {activations}"] = native_loop(model)
            if activations == "auto":
                models[f"{name}, {activations}, `generate`"] = bench.transformers_contender(model)
    full = load_dense(original).model
    for name, dense in zip(DENSE, (full, bench.cast_copy(full, torch.bfloat16)), strict=True):
        models[name] = bench.transformers_contender(dense)
    CACHE.mkdir(exist_ok=True)
    kept = CACHE / "batches.json"
    lines = json.loads(kept.read_text()) if options.keep and kept.exists() else []
    for sequences in options.batches:
        lines += measured(options, sequences, models)
    kept.write_text(json.dumps(lines))
    head = (
        f"`python benchmarks/batches.py`; {machine()}, prompts of {options.prompt} tokens{', seconds of CPU' if options.cpu else ''}. "
        "*Original*: the faster of fp32 and bf16 in transformers with as many sequences."
    )
    write_section("batches", f"{head}\n\n{table(COLUMNS, lines)}")


if __name__ == "__main__":
    main()
