"""llama.cpp's own types of a model, measured on the text of benchmarks/rivals.py and timed beside the original."""

import json
from pathlib import Path
from typing import Any

import llama_types
import peers
import torch
from common import machine

from halfplate.evaluation import bench, speed
from halfplate.evaluation.bench import Entry, transformers_contender
from halfplate.models.sources import load_dense

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K")


def llama_rows(model: Path, folder: Path, sweep: dict[str, Any], measure: bool) -> list[dict[str, Any]]:
    """A row for each type with an importance matrix: name, nbytes, kl, top1_agreement, contents, speedup.

    measure: whether to make and measure types that no earlier call has; they are left out otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in TYPES:
        kept = folder / f"{name} row.json"
        if not kept.exists() and measure:
            kept.write_text(json.dumps(_measured(name, model, folder, sweep)))
        if kept.exists():
            rows.append(json.loads(kept.read_text()))
    return rows


def _measured(name: str, model: Path, folder: Path, sweep: dict[str, Any]) -> dict[str, Any]:
    found = llama_types.measured(name, True, model, folder, sweep)
    (scores,) = found["texts"].values()
    row = {"name": f"llama.cpp {name}", "nbytes": found["nbytes"], "contents": found["contents"], "machine": machine()}
    file = folder / "timed.gguf"
    means = llama_types.importance(model, folder, sweep["base"])
    llama_types.quantize(folder / "dense.gguf", file, llama_types.TYPES[name], means)
    try:
        row["speedup"] = speedup(file, model, **sweep["speed"])
    finally:
        file.unlink()
    return row | {key: scores[key] for key in ("kl", "top1_agreement", "perplexity")}


@torch.inference_mode()
def speedup(file: Path, model: Path, prompt: int, new_tokens: int, rounds: int, threads: int) -> float:
    """Decode speed of llama.cpp with `file`, relative to the faster original in transformers, in alternating rounds."""
    full = load_dense(str(model)).model
    ids = speed.random_prompt(full.config.vocab_size, prompt)
    memory = speed.PeakMemory()
    entries: dict[str, Entry] = {}
    for name, plain in (("fp32", full), ("bf16", bench.cast_copy(full, torch.bfloat16))):
        memory.start()
        entries[name] = bench.enter(transformers_contender(plain), plain, ids, memory)
    peer = peers.LlamaCpp(file, threads)
    try:
        peer(ids, bench.WARM_UP_TOKENS, lambda: None)
        entries["peer"] = Entry(peer, speed.WeightBytes(peer.nbytes, peer.nbytes, peer.nbytes))
        timed = bench.time_rounds(entries, ids, new_tokens, rounds)
    finally:
        peer.close()
    return min(speed.paired_ratio(timed.decode("peer"), timed.decode(name)) for name in ("fp32", "bf16"))
