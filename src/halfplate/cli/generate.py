"""Generate text from a prompt by greedy decoding."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfplate.cli.parser import positive, typed_text
from halfplate.errors import HalfplateError
from halfplate.limits import use_threads

if TYPE_CHECKING:
    from torch import Tensor


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

    from halfplate.calibration.vocabulary import check_tokens
    from halfplate.checkpoint.loading import load_any
    from halfplate.cli.console import silence_libraries
    from halfplate.runtime import greedy
    from halfplate.runtime.limits import check_generation

    silence_libraries()
    args.prompt = typed_text(args.prompt)
    use_threads(args.threads)
    model, tokenizer = load_any(args.model, activations=args.activations)
    ids = _token_ids(args, tokenizer)
    length = ids.shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length == 0:
        raise HalfplateError(f"prompt={args.prompt!r} has no tokens; give some text")
    if limit is not None and length + args.max_new_tokens > limit:
        raise HalfplateError(
            f"max_new_tokens={args.max_new_tokens} after {length} tokens of prompt exceeds the {limit} positions of {args.model!r}; "
            f"try {'--max-new-tokens ' + str(limit - length) if length < limit else 'a shorter prompt'}"
        )
    check_tokens(ids, model, f"prompt={args.prompt!r}", tokenizer)
    check_generation(model.config, length, args.max_new_tokens)
    tokens = greedy(model, ids, args.max_new_tokens, _stop_ids(model))
    print(tokenizer.decode(tokens[0, length:] if args.chat else tokens[0], skip_special_tokens=True))
    return 0


def _token_ids(args: argparse.Namespace, tokenizer: Any) -> Tensor:
    """The prompt as int64 (1, tokens)."""
    import torch

    from halfplate.calibration.documents import check_unicode

    check_unicode(args.prompt, "prompt")

    if not args.chat:
        return torch.tensor([tokenizer(args.prompt)["input_ids"]], dtype=torch.int64, device="cpu")
    if not tokenizer.chat_template:
        raise HalfplateError(
            f"--chat needs a chat template, and the tokenizer of {args.model!r} has none; leave --chat out"
        )
    message = [{"role": "user", "content": args.prompt}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return torch.tensor([encoded["input_ids"]], dtype=torch.int64, device="cpu")


def _stop_ids(model: Any) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
