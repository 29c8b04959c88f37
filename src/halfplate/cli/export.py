"""Write a checkpoint, or a .gguf file, as a plain dense Hugging Face model that any tool loads."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", help="a Halfplate checkpoint, or a dense model of any source")
    parser.add_argument("--format", choices=("dense",), default="dense", help="dense: the zeros written out")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it holds a model already")


def run(args: argparse.Namespace) -> int:
    from halfplate.checkpoint.export import export_dense
    from halfplate.cli.console import silence_libraries
    from halfplate.execution.convert import convert
    from halfplate.execution.output import check_result_folder
    from halfplate.models.sources import is_compressed

    silence_libraries()
    check_result_folder(Path(args.out), args.overwrite, Path(args.path))
    write = export_dense if is_compressed(args.path) else convert
    write(args.path, Path(args.out), overwrite=args.overwrite)
    print(f"{args.out}: a dense copy of {args.path}", file=sys.stderr)
    return 0
