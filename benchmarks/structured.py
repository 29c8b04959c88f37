"""Measure structured pruning: KL and perplexity of the models that every method makes, in one table.

    python benchmarks/structured.py MODEL -o RESULTS --calibration TEXT --text TEXT [--keep 0.9 0.75] [--methods flap ...]
    python benchmarks/structured.py MODEL -o RESULTS --calibration TEXT --prepare --keep 0.75 --methods tyr depth
    python benchmarks/structured.py MODEL -o RESULTS --decode --keep 0.75 --methods tyr depth

The second command keeps the smaller models and writes them and the original as GGUF files (F16), and the third times both in transformers and in
llama.cpp, all in alternating rounds: section `structured-decode`.

RESULTS is a folder with one line of JSON for each finished row, so a second call continues. The calibration and the evaluation text are files
as `halfplate eval --text` reads them. The smaller models are removed after they are measured; the table goes into RESULTS.md.
"""

import argparse
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from common import machine, table, write_section

import halfplate
from halfplate.evaluation import bench, speed
from halfplate.evaluation.bench import Entry, Rounds, transformers_contender
from halfplate.models.sources import load_dense

METHODS = ("magnitude-structured", "wanda-structured", "flap", "cfsp", "tyr", "nirvana", "depth", "slicegpt", "modegpt")
HEADER = ["transform", "keep", "parameters", "share", "KL", "top-1", "perplexity", "seconds"]


def measured(model: str, name: str, keep: float, options: argparse.Namespace) -> dict[str, Any]:
    """One row: prune, evaluate, remove."""
    out = options.out / f"{name}-{keep:g}"
    made = halfplate.prune(
        model,
        out,
        keep,
        transforms=[name],
        calibration=options.calibration,
        samples=options.samples,
        seq_len=512,
        threads=1,
        overwrite=True,
        check=False,
    )
    scores = halfplate.evaluate(out, against=model, text=options.text, windows=options.windows, seq_len=512)
    shutil.rmtree(out)
    return {
        "keep": keep,
        "transform": name,
        "parameters": made["parameters"],
        "share": made["parameters"] / made["dense_parameters"],
        "told": made["pruned"]["told"],
        "seconds": made["seconds"]["total"],
        **{key: scores[key] for key in ("kl", "top1_agreement", "perplexity", "dense_perplexity")},
    }


def rendered(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the best of each size last."""
    lines = [
        [
            f"`{row['transform']}`",
            f"{row['keep']:g}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['share']:.1%}",
            f"{row['kl']:.3f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['perplexity']:,.1f}",
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(rows, key=lambda row: (-row["keep"], -row["kl"]))
    ]
    dense = rows[0]["dense_perplexity"]
    return f"{machine()}. Perplexity of the original: {dense:.1f}.\n\n{table(HEADER, lines)}"


def prepare(options: argparse.Namespace) -> None:
    """Keep what `decode` times: smaller models by method and size, and a GGUF file of each and of the original."""
    for out in _timed(options):
        if not out.exists() and out != Path(options.model):
            name, _, keep = out.name.rpartition("-")
            prune = {"samples": options.samples, "seq_len": 512, "threads": 1, "check": False, "resume": True}
            halfplate.prune(
                options.model, out, float(keep), transforms=[name], calibration=options.calibration, **prune
            )
        if not (file := options.out / f"{out.name}.gguf").exists():
            halfplate.export(out, file, format="gguf")


def _timed(options: argparse.Namespace) -> list[Path]:
    """The folders of the original, then of each smaller model."""
    return [
        Path(options.model),
        *(options.out / f"{name}-{keep:g}" for keep in options.keep for name in options.methods),
    ]


@torch.inference_mode()
def decode(options: argparse.Namespace) -> str:
    """Tokens per second of every model in transformers (fp32 and bf16) and in llama.cpp, in alternating rounds."""
    torch.set_num_threads(options.threads)
    where, entries, memory, models = machine(), {}, speed.PeakMemory(), _timed(options)
    with ExitStack() as opened:
        for folder in models:
            full = load_dense(str(folder)).model
            ids = speed.random_prompt(full.config.vocab_size, 16)
            for kind, model in (("fp32", full), ("bf16", bench.cast_copy(full, torch.bfloat16))):
                memory.start()
                entries[f"{folder.name} {kind}"] = bench.enter(transformers_contender(model), model, ids, memory)
            peer = peers.LlamaCpp(options.out / f"{folder.name}.gguf", options.threads)
            opened.callback(peer.close)
            peer(ids, bench.WARM_UP_TOKENS, lambda: None)
            entries[f"{folder.name} llama.cpp"] = Entry(peer, speed.WeightBytes(*[peer.nbytes] * 3))
        timed = bench.time_rounds(entries, ids, options.new_tokens, options.rounds)
    rows = [[folder.name, *_figures(folder.name, models[0].name, timed)] for folder in models]
    header = [
        "model",
        "fp32, tokens/s",
        "bf16, tokens/s",
        "faster type, × original",
        "llama.cpp F16, tokens/s",
        "× original",
    ]
    settings = f"prompt of 16 tokens, {options.new_tokens} new, {options.rounds} rounds"
    return f"{where}; {settings}.\n\n{table(header, rows)}"


def _figures(name: str, original: str, timed: Rounds) -> list[str]:
    """Tokens per second, and medians of ratios within a round to the original, in its own faster type."""

    def best(model: str) -> list[float]:
        return max((timed.decode(f"{model} {kind}") for kind in ("fp32", "bf16")), key=median)

    rates = {kind: median(timed.decode(f"{name} {kind}")) for kind in ("fp32", "bf16", "llama.cpp")}
    plain = speed.paired_ratio(best(name), best(original))
    ours, theirs = (timed.decode(f"{model} llama.cpp") for model in (name, original))
    peer = speed.paired_ratio(ours, theirs)
    return [f"{rates['fp32']:.1f}", f"{rates['bf16']:.1f}", f"{plain:.2f}", f"{rates['llama.cpp']:.1f}", f"{peer:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.75])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--prepare", action="store_true", help="keep the smaller models and write GGUF files, for --decode"
    )
    parser.add_argument("--decode", action="store_true", help="time what --prepare has made")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.prepare:
        prepare(options)
        return
    if options.decode:
        write_section("structured-decode", decode(options))
        return
    file = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["transform"], row["keep"]) for row in rows}
    for keep in options.keep:
        for name in options.methods:
            if (name, keep) not in done:
                rows.append(measured(options.model, name, keep, options))
                with file.open("a") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
    write_section("structured", rendered(rows))


if __name__ == "__main__":
    main()
