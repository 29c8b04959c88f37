"""Write a checkpoint or an original model in the format of another tool: a Hugging Face folder, a GGUF file, compressed-tensors, GPTQ or MLX."""

import argparse
import sys

from halfplate.cli.parser import typed_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", help="a Halfplate checkpoint, or an original model of any source")
    parser.add_argument(
        "--format",
        metavar="NAME",
        default="dense",
        help="dense (default): an ordinary Hugging Face folder of full size; gguf: one file for llama.cpp, which holds the codes of unpruned matrices as they are; "
        "compressed-tensors, gptq: a folder for vLLM and others, which holds them, too; mlx: a folder for Apple's machines",
    )
    parser.add_argument("-o", "--out", metavar="PATH", required=True, help="folder, or .gguf file, to write")
    parser.add_argument("--overwrite", action="store_true", help="replace PATH if it already holds a model")
    parser.add_argument(
        "--embedding-type",
        metavar="TYPE",
        help="gguf: type of an embedding and an output layer that are not compressed: f16 (default), f32, bf16, q8_0, q6_k, q5_k, q4_k or others (docs/export.md)",
    )
    parser.add_argument(
        "--verify-logits",
        metavar="TEXT",
        help="gguf: compute the logits of this text with llama-cpp-python, too, and compare them with those of the model",
    )


def run(args: argparse.Namespace) -> int:
    from halfplate import export
    from halfplate.cli.console import silence_libraries

    silence_libraries()
    options = {
        "embedding_type": args.embedding_type,
        "verify_logits": args.verify_logits and typed_text(args.verify_logits),
    }
    print(export(args.path, args.out, args.format, overwrite=args.overwrite, **options), file=sys.stderr)
    return 0
