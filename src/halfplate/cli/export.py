"""Write a checkpoint or a dense model in a format of another tool: a dense folder or a GGUF file."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", help="a Halfplate checkpoint, or a dense model of any source")
    parser.add_argument(
        "--format",
        metavar="NAME",
        default="dense",
        help="dense (default): a Hugging Face folder with the zeros written out; gguf: one F16 file for llama.cpp",
    )
    parser.add_argument("-o", "--out", metavar="PATH", required=True, help="folder, or .gguf file, to write")
    parser.add_argument("--overwrite", action="store_true", help="replace PATH if it holds a model already")


def run(args: argparse.Namespace) -> int:
    from halfplate import export
    from halfplate.cli.console import silence_libraries

    silence_libraries()
    print(export(args.path, args.out, args.format, overwrite=args.overwrite), file=sys.stderr)
    return 0
