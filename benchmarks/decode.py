"""Whole models: tokens per second, bytes of weights and loading time, compared with the original model and llama.cpp.

    python benchmarks/decode.py --smollm2 CHECKPOINT ...    checkpoints of SmolLM2-135M, each with perplexity and KL
    python benchmarks/decode.py --llama                     a Llama of 1.1B random weights, and llama.cpp where installed
    python benchmarks/decode.py --load                      time to load a checkpoint of that shape

Each part writes its own section of RESULTS.md. All models of a table alternate in one process; ratios are medians of
ratios within a round. Checkpoints with cores of int8 and int4 are measured with float and with int8 activations, and
perplexity and KL are those of that mode. Give `--threads 1`, `2`, or both. The Llama needs 16 GB and about ten minutes a
number of threads.
"""

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # read when torch is imported; the command line of halfplate does the same
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from common import CACHE, DATA, machine, smollm2_gguf, table, write_section
from random_weights import compressed_llama, dense_llama, write_gguf

import halfplate
from halfplate.calibration import read_text
from halfplate.checkpoint.config import read_specs
from halfplate.checkpoint.write import write_checkpoint
from halfplate.cli.console import silence_libraries
from halfplate.evaluation import bench, evaluate, speed, token_windows
from halfplate.evaluation.bench import Entry, Rounds, greedy_contender, transformers_contender
from halfplate.formats import CompressedLinear
from halfplate.models.sources import load_dense
from halfplate.runtime import accelerate

SAME_LOOP = "original bf16, native decoder"
WINDOWS, SEQ_LEN = 16, 1024
CORES = {"bf16": ("bf16", "float"), "w8a8": ("int8", "int8"), "w4a8": ("int4", "int8")}
PEERS = ("Q8_0", "Q4_0")


class Table:
    """Contenders of one table, brought in one after the other; the prompt fits them all."""

    def __init__(self, prompt: int, vocabulary: int) -> None:
        self.ids = speed.random_prompt(vocabulary, prompt)
        self.entries: dict[str, Entry] = {}
        self._memory = speed.PeakMemory()

    def dense(self, full: Any, head_dtype: str | None) -> None:
        """The original model in transformers in fp32 and bf16, and packed for the kernels in the native decoder."""
        self._add("original fp32", transformers_contender(full), full)
        half = bench.cast_copy(full, torch.bfloat16)
        self._add("original bf16", transformers_contender(half), half)
        self.ours(SAME_LOOP, bench.packed_dense(full, head_dtype))

    def ours(self, name: str, model: Any, by_generate: bool = False) -> None:
        self._add(name, greedy_contender(model), model)
        if by_generate:
            self._add(f"{name}, through generate", transformers_contender(model), model)

    def peer(self, name: str, model: peers.LlamaCpp, dense: Any) -> None:
        """llama.cpp with a file of the shape of `dense`, all of whose matrices are of one type."""
        table = dense.model.embed_tokens.weight.numel()
        head = model.nbytes * table // sum(parameter.numel() for parameter in dense.parameters())
        model(self.ids, bench.WARM_UP_TOKENS, lambda: None)
        # The embedding is as large as the head and read one row a token.
        weights = speed.WeightBytes(model.nbytes, model.nbytes - 2 * head, model.nbytes - head)
        self.entries[name] = Entry(model, weights)

    def _add(self, name: str, contender: speed.Contender, model: Any) -> None:
        self._memory.start()
        self.entries[name] = bench.enter(contender, model, self.ids, self._memory)
        print(f"{name}: ready", flush=True)

    def time(self, new_tokens: int, rounds: int) -> dict[str, Any]:
        """Figures of every contender, with ratios to the faster original and to the original in the native decoder."""
        timed = bench.time_rounds(self.entries, self.ids, new_tokens, rounds)
        return {"read": median(timed.bandwidth), "rows": {name: self._row(name, timed) for name in self.entries}}

    def _row(self, name: str, timed: Rounds) -> dict[str, Any]:
        row = timed.figures(name, self.entries[name])
        for what, rates in (("decode", timed.decode), ("prefill", timed.prefill)):
            best = max(("original fp32", "original bf16"), key=lambda dense: median(rates(dense)))
            row[f"{what}_speedup"] = speed.paired_ratio(rates(name), rates(best))
            row[f"{what}_dense"] = best
        row["weights_speedup"] = speed.paired_ratio(timed.decode(name), timed.decode(SAME_LOOP))
        return row


def smollm2(options: argparse.Namespace) -> dict[str, Any]:
    """Checkpoints of SmolLM2 given on the command line."""
    dense = load_dense(str(smollm2_gguf()))
    quality = Quality(dense, options.fresh)
    found = Table(options.prompt, dense.model.config.vocab_size)
    found.dense(dense.model, None)
    scores = {}
    for folder in options.smollm2:
        dtypes = sorted({spec.core_dtype for spec in read_specs(Path(folder)).values()})
        modes = ("float", "int8") if set(dtypes) <= {"int8", "int4"} else ("float",)
        for activations in modes:
            name = f"{Path(folder).name} ({'/'.join(dtypes)}), {activations} activations"
            model = halfplate.load(folder, activations=activations)
            scores[name] = quality.of(name, Path(folder), model)
            found.ours(name, model, by_generate=activations == "float")
    result = found.time(options.new_tokens, options.rounds)
    for name, score in scores.items():
        result["rows"][name] |= score
    return result | {"dense_perplexity": next(iter(scores.values()))["dense_perplexity"] if scores else None}


class Quality:
    """Perplexity and KL on the first windows of WikiText-2 test, kept in the cache by name."""

    def __init__(self, dense: Any, fresh: bool) -> None:
        self._dense = dense.model
        documents = read_text(str(DATA / "wikitext2" / "test.jsonl.gz"))
        self._windows = token_windows(dense.tokenizer, documents, seq_len=SEQ_LEN, windows=WINDOWS)
        self._file = CACHE / "decode_quality.json"
        self._known = json.loads(self._file.read_text()) if self._file.exists() and not fresh else {}

    def of(self, name: str, folder: Path, model: Any) -> dict[str, float]:
        # A folder may have been written anew under its name.
        key = f"{name} {max(file.stat().st_mtime_ns for file in folder.glob('*.safetensors'))}"
        if key not in self._known:
            scores = evaluate(model, self._windows, self._dense)
            kept = ("perplexity", "kl", "top1_agreement", "dense_perplexity")
            self._known[key] = {measure: scores[measure] for measure in kept}
            self._file.write_text(json.dumps(self._known))
            print(name, self._known[key], flush=True)
        found: dict[str, float] = self._known[key]
        return found


def llama(options: argparse.Namespace, threads: int, wrapper_dtype: str, head_dtype: str) -> dict[str, Any]:
    """The Llama of random weights with one type of wrappers and head, and llama.cpp."""
    full = dense_llama(torch.float32, options.blocks)
    found = Table(options.prompt, full.config.vocab_size)
    found.dense(full, head_dtype)
    for name, (core_dtype, activations) in CORES.items():
        model = compressed_llama(full, core_dtype, wrapper_dtype)
        accelerate(model, activations=activations, head_dtype=head_dtype)
        found.ours(f"ARMOR 128, {name}", model, by_generate=name == "bf16")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        for kind in PEERS:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, kind, options.blocks)
            try:
                peer = peers.LlamaCpp(path, threads)
            except ImportError:
                print(f"llama.cpp {kind}: llama-cpp-python is not installed", flush=True)
                continue
            opened.callback(peer.close)
            found.peer(f"llama.cpp {kind}", peer, full)
        return found.time(options.new_tokens, options.rounds)


def load_times(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to load a checkpoint of the Llama shape, against reading its tensors and copying them once.

    Each load is the first of a fresh process, whose memory nobody has touched, with its imports done before.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "llama"
        # fp32, because every tensor that is not compressed is rounded in place.
        model = compressed_llama(dense_llama(torch.float32, options.blocks), "bf16", "bf16")
        specs = {name: m.spec for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
        write_checkpoint(model, None, folder, specs, {}, torch.bfloat16)
        del model
        tasks = {name: partial(_fresh_seconds, code, folder) for name, code in LOADS.items()}
        speed.alternate(tasks, 1)  # the files into the page cache
        times = speed.alternate(tasks, options.rounds)
        nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {"nbytes": nbytes} | {name: median(seconds) for name, seconds in times.items()}


LOADS = {
    "load_file": """
from safetensors.torch import load_file
def load(folder):
    return [{name: tensor.clone() for name, tensor in load_file(f).items()} for f in sorted(folder.glob("*.safetensors"))]
""",
    "halfplate": """
import halfplate, halfplate.runtime
from transformers import LlamaForCausalLM
load = halfplate.load
""",
}


def _fresh_seconds(code: str, folder: Path) -> float:
    timed = f"{code}\nimport sys, time\nfrom pathlib import Path\nstart = time.perf_counter()\nkept = load(Path(sys.argv[1]))\nprint(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", timed, folder], capture_output=True, text=True, check=True)
    return float(run.stdout)


def speed_table(result: dict[str, Any], scored: bool) -> str:
    """One table of contenders."""
    header = ["", "decode, tokens/s", "× faster original", "× original in the native decoder"]
    header += ["prefill, tokens/s", "× faster original"]
    header += ["weights, MB", "linears, MB", "of original bf16", "GB/s", "of read bandwidth"]
    rows = []
    bf16_linears = result["rows"]["original bf16"]["linear_bytes"]
    for name, row in result["rows"].items():
        cells = [
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['decode_speedup']:.2f}",
            f"{row['weights_speedup']:.2f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['prefill_speedup']:.2f}",
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{row['linear_bytes'] / 1e6:.0f}",
            f"{row['linear_bytes'] / bf16_linears:.3f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['read_share']:.2f}",
        ]
        if scored:
            dense = name.startswith("original")
            through = name.removesuffix(", through generate")
            score = result["rows"][through]
            cells += ["", "0"] if dense else [f"{score['perplexity']:.2f}", f"{score['kl']:.3f}"]
            if dense and result["dense_perplexity"]:
                cells[-2] = f"{result['dense_perplexity']:.2f}"
        rows.append([name, *cells])
    header += ["perplexity", "KL"] if scored else []
    first = next(iter(result["rows"].values()))
    return (
        f"Memory read {result['read'] / 1e9:.1f} GB/s; faster original: {first['decode_dense']} in decoding, "
        f"{first['prefill_dense']} in prefill.\n\n" + table(header, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", nargs="+", metavar="CHECKPOINT", help="checkpoints made of SmolLM2-135M")
    parser.add_argument("--llama", action="store_true", help="the Llama of random weights")
    parser.add_argument("--load", action="store_true", help="time to load a checkpoint")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="T")
    parser.add_argument("--prompt", type=int, default=128, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="R")
    parser.add_argument("--blocks", type=int, default=22, metavar="N", help="of the Llama; fewer for a smoke run")
    parser.add_argument("--fresh", action="store_true", help="measure perplexities again that the cache holds")
    parser.add_argument("--dry", action="store_true", help="print sections instead of writing RESULTS.md")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    silence_libraries()
    write = (lambda name, text: print(text)) if options.dry else write_section
    settings = f"prompt of {options.prompt} tokens, {options.new_tokens} new, {options.rounds} rounds"
    with torch.inference_mode():
        if options.smollm2:
            parts = []
            for threads in options.threads:
                torch.set_num_threads(threads)
                where = machine()
                parts += [f"{where}; {settings}", speed_table(smollm2(options), True)]
            write("decode_smollm2", "\n\n".join(["`python benchmarks/decode.py --smollm2 CHECKPOINT ...`", *parts]))
        if options.llama:
            parts = []
            for threads in options.threads:
                torch.set_num_threads(threads)
                for wrapper_dtype, head_dtype in (("bf16", "bf16"), ("int8", "int8")):
                    where = machine()
                    result = llama(options, threads, wrapper_dtype, head_dtype)
                    parts += [f"Wrappers {wrapper_dtype}, lm_head {head_dtype}; {where}; {settings}"]
                    parts += [speed_table(result, False)]
            write("decode_llama", "\n\n".join(["`python benchmarks/decode.py --llama`", *parts]))
        if options.load:
            where, found = machine(), load_times(options)
            limit = 1.5 * found["load_file"] + 1
            rows = [
                [
                    f"{found['nbytes'] / 1e9:.2f} GB",
                    *(f"{found[k]:.2f}" for k in ("load_file", "halfplate")),
                    f"{limit:.2f}",
                ]
            ]
            header = ["files", "safetensors.load_file and one copy, s", "halfplate.load, s", "1.5 of the first + 1 s"]
            write("load", f"`python benchmarks/decode.py --load` · {where}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
