"""Where the time of a decoded token goes: linears, other operations, Python between them.

    python benchmarks/profile_decode.py CHECKPOINT DENSE

writes the section `profile` of docs/decoding.md. Times are medians over the tokens of alternating runs, two threads or as
many as torch takes.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import ROOT, machine, table, write_section

import halfplate
from halfplate.models.sources import load_dense
from halfplate.runtime import greedy
from halfplate.runtime.decoder import NativeDecoder

TOKENS, ROUNDS = 64, 5


class Stopwatch:
    """Seconds spent inside a function while it stands in the place of another."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.inside, self.spent = owner, name, getattr(owner, name), 0.0

    def __enter__(self) -> "Stopwatch":
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return self.inside(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - start

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.inside)


def decode_seconds(run: Callable[[int], Any], owner: Any, name: str) -> tuple[float, float]:
    """Seconds a token, all and inside `owner.name`, the prefill taken off by a run of one token."""
    with Stopwatch(owner, name) as short:
        start = time.perf_counter()
        run(1)
        prefill = time.perf_counter() - start
    with Stopwatch(owner, name) as long:
        start = time.perf_counter()
        run(TOKENS)
        whole = time.perf_counter() - start
    return (whole - prefill) / (TOKENS - 1), (long.spent - short.spent) / (TOKENS - 1)


def main() -> None:
    checkpoint, dense = sys.argv[1:]
    torch.set_grad_enabled(False)
    full = load_dense(dense).model
    half = load_dense(dense).model.to(torch.bfloat16)
    ours = halfplate.load(checkpoint)
    ids = torch.randint(3, full.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))

    def generate(model: Any) -> Callable[[int], Any]:
        settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        return lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **settings)

    runs: dict[str, tuple[Callable[[int], Any], Any, str]] = {
        "dense fp32, `generate`": (generate(full), torch.nn.functional, "linear"),
        "dense bf16, `generate`": (generate(half), torch.nn.functional, "linear"),
        "Halfplate, `generate`": (generate(ours), NativeDecoder, "step"),
        "Halfplate, own loop": (lambda n: greedy(ours, ids, n), NativeDecoder, "step"),
    }
    for run, _, _ in runs.values():
        run(2)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, arguments in runs.items():
            found[name].append(decode_seconds(*arguments))
    rows = []
    for name, (_, owner, _) in runs.items():
        whole = median(seconds for seconds, _ in found[name])
        inside = median(seconds for _, seconds in found[name])
        what = "its linears" if owner is torch.nn.functional else "the native step"
        rows.append(
            [
                name,
                f"{whole * 1e3:.2f}",
                f"{inside * 1e3:.2f} ({what})",
                f"{(whole - inside) * 1e3:.2f}",
                f"{inside / whole:.0%}",
            ]
        )
    header = ["", "ms a token", "of it inside", "everything between", "share inside"]
    text = f"`python benchmarks/profile_decode.py` on SmolLM2-135M, ARMOR block 16, bf16 · {machine()}\n\n{table(header, rows)}"
    write_section("profile", text, ROOT / "docs" / "decoding.md")


if __name__ == "__main__":
    main()
