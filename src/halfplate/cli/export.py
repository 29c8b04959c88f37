"""Write a checkpoint, or a dense model of any source, as a plain dense model that any tool loads, or as a GGUF file."""

import argparse
import sys
from pathlib import Path

from halfplate.errors import HalfplateError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", help="a Halfplate checkpoint, or a dense model of any source")
    parser.add_argument(
        "--format",
        choices=("dense", "gguf"),
        default="dense",
        help="dense: a Hugging Face folder, the zeros written out (default); gguf: one F16 file for llama.cpp",
    )
    parser.add_argument("-o", "--out", metavar="PATH", required=True, help="folder, or .gguf file, to write")
    parser.add_argument("--overwrite", action="store_true", help="replace PATH if it holds a model already")


def run(args: argparse.Namespace) -> int:
    if args.format == "gguf" and not args.out.endswith(".gguf"):
        raise HalfplateError(f"--out {args.out!r} is no .gguf file; name one, e.g. model.gguf")
    from halfplate.checkpoint.export import export_dense
    from halfplate.cli.console import silence_libraries
    from halfplate.execution.convert import convert, export_gguf
    from halfplate.execution.output import check_result_folder
    from halfplate.models.sources import is_compressed

    silence_libraries()
    if args.format == "gguf":
        export_gguf(args.path, args.out, overwrite=args.overwrite)
        print(f"{args.out}: {args.path} in F16 for llama.cpp", file=sys.stderr)
        return 0
    check_result_folder(Path(args.out), args.overwrite, Path(args.path))
    write = export_dense if is_compressed(args.path) else convert
    write(args.path, Path(args.out), overwrite=args.overwrite)
    print(f"{args.out}: a dense copy of {args.path}", file=sys.stderr)
    return 0
