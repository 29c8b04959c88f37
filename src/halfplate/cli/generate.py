"""Generate text from prompts by greedy decoding."""

import argparse

from halfplate.cli.parser import (
    add_activations_argument,
    add_decoding_arguments,
    add_fit_argument,
    add_output_arguments,
    positive,
    typed_text,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Halfplate checkpoint, a Hugging Face folder, a Hub id or a .gguf file"
    )
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="+", help="the text to continue; several are answered one by one"
    )
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
    add_fit_argument(parser)
    add_activations_argument(parser)
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="keep the keys and values of the prompt in FILE; a later prompt that begins with the same tokens reads only the rest",
    )
    add_decoding_arguments(parser)
    add_output_arguments(parser, progress=False)


def run(args: argparse.Namespace) -> int:
    from halfplate.cli.console import print_json, silence_libraries
    from halfplate.evaluation.generate import GenerateSettings, answers

    silence_libraries()
    prompts = [typed_text(prompt) for prompt in args.prompts]
    settings = GenerateSettings(args.max_new_tokens, args.chat, args.cache_dtype, args.prompt_cache, args.lookup)
    found = answers(args.model, prompts, settings, args.threads, args.activations, args.fit)
    if args.json:
        print_json([{"prompt": prompt, "text": text} for prompt, text in zip(prompts, found, strict=True)])
    else:
        print("\n\n".join(found))
    return 0
