"""Generate text from a prompt by greedy decoding."""

import argparse

from halfplate.cli.parser import positive, typed_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Halfplate checkpoint, a Hugging Face folder, a Hub id or a .gguf file"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        default=64,
        help="maximum number of tokens to generate (default 64)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="format the prompt as a user message with the model's chat template"
    )
    parser.add_argument("--threads", type=positive, metavar="T", help="number of CPU threads")
    parser.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="int8 quantises activations for int8 and int4 cores (default float)",
    )


def run(args: argparse.Namespace) -> int:
    from halfplate import generate
    from halfplate.cli.console import silence_libraries

    silence_libraries()
    prompt = typed_text(args.prompt)
    print(generate(args.model, prompt, args.max_new_tokens, args.chat, args.threads, args.activations))
    return 0
