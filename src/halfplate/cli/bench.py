"""Measure prefill and decode speed, weight bytes and memory, alternating with the original model."""

import argparse
import sys
from typing import Any

from halfplate.cli.parser import add_activations_argument, add_output_arguments, positive
from halfplate.errors import HalfplateError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Halfplate checkpoint, a Hugging Face folder, a Hub id or a .gguf file"
    )
    parser.add_argument(
        "--against", metavar="ORIGINAL", help="original model to compare with; transformers runs it in fp32 and in bf16"
    )
    numbers = (
        ("--prompt", "N", 128, "number of tokens in the prompt"),
        ("--new-tokens", "N", 64, "number of tokens to generate"),
        ("--rounds", "R", 5, "number of rounds; every model runs once per round"),
    )
    for option, metavar, default, what in numbers:
        parser.add_argument(option, type=positive, metavar=metavar, default=default, help=f"{what} (default {default})")
    parser.add_argument("--threads", type=positive, metavar="T", help="number of CPU threads")
    add_activations_argument(parser)
    parser.add_argument(
        "--head-dtype",
        choices=("fp32", "bf16", "int8"),
        help="data type of the output head in memory (default bf16 if that is exact, else fp32)",
    )
    parser.add_argument(
        "--loops",
        action="store_true",
        help="also time the checkpoint in transformers' own generate, and the original model in the native decoder",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.new_tokens < 2:
        raise HalfplateError(
            f"--new-tokens {args.new_tokens} is too few, because the first token belongs to the prefill; expected at least 2"
        )
    from halfplate import bench
    from halfplate.cli.console import print_json, progress, silence_libraries
    from halfplate.limits import cores
    from halfplate.telemetry.machine import load_average

    silence_libraries()
    load = load_average()
    if load is not None and load > cores() / 2:
        print(
            f"halfplate: warning: load {load:.1f} on {cores()} cores; the machine is busy, so results may be noisy",
            file=sys.stderr,
        )
    options = ("prompt", "new_tokens", "threads", "activations", "head_dtype", "rounds", "loops")
    with progress(args) as report:
        result = bench(
            args.model, args.against, **{option: getattr(args, option) for option in options}, progress=report
        )
    if args.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    from halfplate.cli.console import megabytes, print_table

    dense = result.get("dense", {})
    rows = {_label(result): result}
    rows |= {f"original {dtype}, generate": figures for dtype, figures in dense.get("dtypes", {}).items()}
    rows |= {LOOPS[name]: figures for name, figures in result.get("loops", {}).items()}
    columns = ("", "decode tokens/s", "prefill tokens/s", "weights", "linears", "peak memory", "GB/s", "of read speed")
    print_table(
        f"{result['model']}: prompt of {result['prompt']} tokens, {result['new_tokens']} new tokens, "
        f"median of {result['rounds']} alternating rounds",
        columns,
        [
            (
                name,
                figures["decode_tokens_per_s"],
                figures["prefill_tokens_per_s"],
                megabytes(figures["weight_bytes"]),
                megabytes(figures["linear_bytes"]),
                None if figures["peak_rss_bytes"] is None else megabytes(figures["peak_rss_bytes"]),
                figures["gb_per_s"],
                figures["read_share"],
            )
            for name, figures in rows.items()
        ],
    )
    if dense:
        print(
            f"decode: {result['decode_speedup']:.2f} times {result['against']} in {dense['dtype']}; "
            f"prefill: {result['prefill_speedup']:.2f} times that in {dense['prefill_dtype']}"
        )
    if "weights_speedup" in result:
        print(
            f"from the smaller weights alone: {result['weights_speedup']:.2f} times the original weights in the same decoder"
        )
    for path in result["paths"]:
        print(path)
    print(f"memory read bandwidth: {result['read_gb_per_s']:.1f} GB/s; {result['machine']}")


LOOPS = {
    "generate": "halfplate, generate",
    "dense_same_loop": "original bf16, native decoder",
}


def _label(result: dict[str, Any]) -> str:
    if "dtype" in result:
        best = result["dtype"]
        reading = result["prefill_dtype"]
        return f"dense {best}, generate" + (f" (prefill {reading})" if reading != best else "")
    return f"halfplate, {result['activations']} activations"
