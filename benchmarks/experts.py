"""Mixtures of experts: how fast they decode, and how much memory their compression takes.

    python benchmarks/experts.py speed [qwen3|mixtral]     decoding, beside transformers and llama.cpp; about two minutes a shape, 3 GB of memory
    python benchmarks/experts.py memory [--method gptq]    the peak of `compress` with 4 and 8 layers, against the bound of the plan
    python benchmarks/experts.py calls [qwen3|mixtral]     experts in one native call against one by one, through transformers

Weights are random, about 1 GB in bf16 (`calls`: half). They are rounded to int4 in groups of 32, and the GGUF file holds the same codes (Q4_0).
`speed`: all models take turns, and ratios are medians of ratios within a round. `calls`: CPU times of one thread, which a busy machine
disturbs least. llama.cpp needs `pip install llama-cpp-python`. With --write the tables of `speed` and `memory` replace their sections of RESULTS.md.
"""

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "10000"
)  # read when torch is imported; the command line of halfplate does the same
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import peers
import torch
from common import ROOT, machine, table, write_section
from decode import Table
from transformers import AutoConfig, AutoModelForCausalLM

import halfplate
from halfplate.cli.console import silence_libraries
from halfplate.compression.compress import compress
from halfplate.evaluation import bench, speed
from halfplate.evaluation.bench import transformers_contender
from halfplate.recipe import Recipe

sys.path += [str(ROOT / "tests" / "stress"), str(ROOT / "tests" / "trained")]
import train as stories
from memory import peak_told, write_tokenizer

COMMON = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3 = COMMON | {"model_type": "qwen3_moe", "num_experts_per_tok": 8, "norm_topk_prob": True}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3 | {"num_experts": 64, "moe_intermediate_size": 320},
    "mixtral": COMMON | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 2560},
}  # fmt: skip
MANY = QWEN3 | {"num_experts": 128, "moe_intermediate_size": 160}
DEPTHS = (4, 8)
ROUNDS, TOKENS, PROMPT = 9, 24, 32
INT4 = Recipe(method="rtn", pattern="dense", core_dtype="int4", group_size=32, threads=1)
DENSE = "original bf16, transformers"
OURS = "int4, native step"


def random_model(shape: dict[str, Any]) -> Any:
    """The model in bf16. Tensors that start as random numbers are as transformers makes them."""
    torch.manual_seed(0)
    kind = shape["model_type"]
    config = AutoConfig.for_model(kind, **{key: value for key, value in shape.items() if key != "model_type"})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def saved(dense: Any, folder: Path) -> str:
    """The model and a tokenizer of one token a word, in a folder."""
    dense.save_pretrained(folder)
    write_tokenizer(folder, dense.config.vocab_size)
    return str(folder)


def made(shape: dict[str, Any], folder: Path) -> None:
    """Write the original, its checkpoint and its GGUF file to a folder, if it has none."""
    if (folder / "Q4_0.gguf").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    dense = random_model(shape)
    dense.save_pretrained(folder / "dense")
    stories.make_tokenizer().save_pretrained(folder / "dense")
    compress(str(folder / "dense"), folder / "out", INT4, benchmark=False, check=False, overwrite=True)
    halfplate.export(folder / "out", folder / "Q4_0.gguf", "gguf")


def speed_of(name: str, options: argparse.Namespace) -> tuple[list[list[str]], str]:
    """Rows of the table of one shape, and how its checkpoint decodes."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as opened:
        folder = (options.folder or Path(place)) / name
        made(SHAPES[name], folder)
        dense = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
        found = Table(options.prompt, dense.config.vocab_size)
        models = {mode: halfplate.load(folder / "out", activations=mode) for mode in ("auto", "float")}
        explained = str(halfplate.runtime.explain(models["auto"]))
        found._add(DENSE, transformers_contender(dense), dense)
        found.ours(OURS, models["auto"])
        found.ours(f"{OURS}, activations float", models["float"])
        try:
            peer = peers.LlamaCpp(
                folder / "Q4_0.gguf", options.threads, context=options.prompt + options.new_tokens + 8
            )
            opened.callback(peer.close)
            found.peer("llama.cpp Q4_0", peer, dense)
        except ImportError:
            print("llama.cpp: llama-cpp-python is not installed", flush=True)
        timed = bench.time_rounds(found.entries, found.ids, options.new_tokens, options.rounds)
    rows = []
    for name, entry in found.entries.items():
        figures = timed.figures(name, entry)
        ratios = [speed.paired_ratio(timed.decode(name), timed.decode(other)) for other in (DENSE, "llama.cpp Q4_0") if other in found.entries]  # fmt: skip
        rows.append([name, f"{figures['weight_bytes'] / 1e6:.0f}", f"{figures['decode_tokens_per_s']:.1f}", *(f"{ratio:.2f}" for ratio in ratios), f"{figures['prefill_tokens_per_s']:.0f}"])  # fmt: skip
    return rows, explained


def tell_speed(options: argparse.Namespace) -> None:
    """Print or write the table of every shape."""
    torch.set_num_threads(options.threads)
    text = [f"`python benchmarks/experts.py speed` · {machine()}; prompt of {options.prompt} tokens, {options.new_tokens} new, {options.rounds} rounds. 8 layers, hidden 1024, 1 GB in bf16: 64 experts with 8 active (Qwen3-MoE), or 8 with 2 active (Mixtral)."]  # fmt: skip
    header = ["model", "weights, MB", "decode, tokens/s", "× original", "× llama.cpp", f"prompt of {options.prompt}, tokens/s"]  # fmt: skip
    for name in options.shapes:
        rows, explained = speed_of(name, options)
        print(explained, flush=True)
        text += [f"{name}:", table(header if len(rows[0]) == len(header) else header[:4] + header[5:], rows)]
    tell(options, "mixtures", "\n\n".join(text))


def tell(options: argparse.Namespace, name: str, text: str) -> None:
    """Write a section of RESULTS.md, or print it."""
    if options.write:
        write_section(name, text)
    else:
        print(text)


def peak_of(depth: int, options: argparse.Namespace) -> list[str]:
    """The row of a model of so many layers: its bytes, the peak of `compress`, and what the plan says."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense = random_model(MANY | {"num_hidden_layers": depth})
        nbytes = 2 * sum(parameter.numel() for parameter in dense.parameters())
        model = saved(dense, folder / "dense")
        del dense
        words = torch.randint(3, 4096, (40_000,), generator=torch.Generator().manual_seed(1)).tolist()
        (folder / "text.txt").write_text(" ".join(f"w{word}" for word in words))
        settings = ["--method", options.method, "--pattern", "dense", "--core-dtype", "int4", "--group-size", "32", "--threads", "1", "--no-benchmark"]  # fmt: skip
        settings += ["--calibration", str(folder / "text.txt"), "--samples", "16", "--seq-len", "128"]
        if options.last_layer:
            settings += ["--include", f"model.layers.{depth - 1}.*"]
        settings += options.more
        run = [sys.executable, "-m", "halfplate"]
        plan = json.loads(subprocess.run([*run, "plan", model, *settings, "--json"], check=True, stdout=subprocess.PIPE).stdout)  # fmt: skip
        start = time.monotonic()
        subprocess.run([*run, "compress", model, "-o", str(folder / "out"), *settings], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        seconds, peak = time.monotonic() - start, peak_told(folder / "out" / "log.jsonl")
    figures = (nbytes, peak, plan["peak_memory_bytes_estimate"], plan["memory_bound_bytes"])
    return [f"{depth} layers", *(f"{figure / 1e9:.3f}" for figure in figures), f"{seconds:.0f}"]


def tell_memory(options: argparse.Namespace) -> None:
    """Print or write the table of every depth."""
    told = " ".join(["--method", options.method, *["--last-layer"][: options.last_layer], *options.more])
    text = f"`python benchmarks/experts.py memory {told}` · {machine()}. Qwen3-MoE, hidden 1024, 128 experts of 160, 8 active; dense int4, 16 samples of 128 tokens, one thread."
    rows = []
    for depth in options.depths:
        rows.append(peak_of(depth, options))
        print(rows[-1], flush=True)
    header = ["", "in bf16, GB", "peak, GB", "estimate of the plan, GB", "bound, GB", "seconds"]
    tell(options, "expert_memory", f"{text}\n\n{table(header, rows)}")


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


def tell_calls(options: argparse.Namespace) -> None:
    """Print the table of every shape with half of its layers."""
    torch.set_num_threads(1)
    print(machine())
    for name in options.shapes:
        dense = random_model(SHAPES[name] | {"num_hidden_layers": 4})
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            compress(saved(dense, Path(folder) / "dense"), out, INT4, benchmark=False, check=False)
            loaded, rounded = halfplate.load(out, activations="float"), halfplate.load(out, activations="int8")
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
        print(f"{name}:\n\n{table(['', 'ms of CPU a token', 'tokens/s', 'times the first'], rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    parts = parser.add_subparsers(required=True)
    for name, run in (("speed", tell_speed), ("calls", tell_calls), ("memory", tell_memory)):
        part = parts.add_parser(name)
        part.set_defaults(run=run)
        if name == "memory":
            part.add_argument("--method", default="gptq")
            part.add_argument("--depths", type=int, nargs="+", default=DEPTHS, metavar="LAYERS")
            part.add_argument(
                "--last-layer", action="store_true", help="compress the last layer alone; all are read, run and written"
            )
            part.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="more options of compress")
        else:
            part.add_argument("shapes", nargs="*", default=list(SHAPES))
        if name == "speed":
            part.add_argument("--prompt", type=int, default=64, metavar="N")
            part.add_argument("--new-tokens", type=int, default=48, metavar="N")
            part.add_argument("--rounds", type=int, default=5, metavar="R")
            part.add_argument("--threads", type=int, default=2, metavar="T")
            part.add_argument("--folder", type=Path, help="keep the models here for the next run")
    options = parser.parse_args()
    silence_libraries()
    options.run(options)


if __name__ == "__main__":
    main()
