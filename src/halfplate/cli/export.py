"""Write a checkpoint or an original model in the format of another tool: a Hugging Face folder or a GGUF file."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", help="a Halfplate checkpoint, or an original model of any source")
    parser.add_argument(
        "--format",
        metavar="NAME",
        default="dense",
        help="dense (default): an ordinary Hugging Face folder of full size; gguf: one F16 file for llama.cpp",
    )
    parser.add_argument("-o", "--out", metavar="PATH", required=True, help="folder, or .gguf file, to write")
    parser.add_argument("--overwrite", action="store_true", help="replace PATH if it already holds a model")


def run(args: argparse.Namespace) -> int:
    from halfplate import export
    from halfplate.cli.console import silence_libraries

    silence_libraries()
    print(export(args.path, args.out, args.format, overwrite=args.overwrite), file=sys.stderr)
    return 0
