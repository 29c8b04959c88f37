"""List every matrix of a checkpoint: format, shape, bytes, relative error."""

import argparse
import re
from typing import Any

from halfplate.cli.parser import add_output_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", help="a Halfplate checkpoint")
    parser.add_argument("--verify", action="store_true", help="compare every tensor with its checksum")
    add_output_arguments(parser, progress=False)


def run(args: argparse.Namespace) -> int:
    from halfplate import inspect
    from halfplate.cli.console import megabytes, print_json, print_table, silence_libraries

    silence_libraries()
    found = inspect(args.path, verify=args.verify)
    if args.json:
        print_json(found)
        return 0
    error = f"relative error{', before tuning' * found['tuned']}"
    # Only experts have a number of tokens of their own.
    routed = ["tokens"] * any(matrix["tokens"] is not None for matrix in found["matrices"])
    print_table(
        f"{args.path}: linears {megabytes(found['nbytes'])}, original {megabytes(found['dense_nbytes'])}",
        ("name", "format", "core", "shape", "bytes", "original bytes", error, *routed),
        [
            (
                m["name"],
                m["format"],
                f"{m['pattern']} {m['core_dtype']}",
                "×".join(map(str, m["shape"])),
                m["nbytes"],
                m["dense_nbytes"],
                m["relative_error"],
                *(m[key] for key in routed),
            )
            for m in sorted(found["matrices"], key=_by_block)
        ],
    )
    print(f"kernels: {found['without_kernel'] or 'every matrix has one'}")
    if args.verify:
        print("all checksums are correct")
    return 0


def _by_block(matrix: dict[str, Any]) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", matrix["name"])]
