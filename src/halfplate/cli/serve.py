"""Serve a model over an OpenAI-compatible API: transformers' own server with Halfplate registered, behind a key and limits."""

import argparse
import sys

from halfplate.cli.parser import add_activations_argument, positive
from halfplate.errors import HalfplateError
from halfplate.serving.settings import CACHE_DTYPES, KEY_VARIABLE, ServeSettings, found_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Halfplate checkpoint, a Hugging Face folder or a Hub id")
    parser.add_argument(
        "--host", metavar="NAME", default="localhost", help="host name to listen on (default localhost)"
    )
    parser.add_argument("--port", type=positive, metavar="N", default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="device to compute on: cpu (default) or cuda")
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        default="auto",
        help="data type of the activations (default auto: that of the checkpoint)",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the key that clients must send (default: the environment variable HALFPLATE_API_KEY, or no key)",
    )
    for option, default, what in (
        ("--max-tokens", ServeSettings.max_tokens, "most tokens of an answer"),
        (
            "--max-requests",
            ServeSettings.max_requests,
            "requests that may run or wait; more are answered with status 429",
        ),
        ("--max-batch", ServeSettings.max_batch, "requests that run together; 1 runs them one after another"),
    ):
        parser.add_argument(option, type=positive, metavar="N", default=default, help=f"{what} (default {default})")
    parser.add_argument("--max-body", metavar="SIZE", default="1MB", help="largest request (default 1MB)")
    parser.add_argument(
        "--prompt-cache",
        metavar="SIZE",
        default="256MB",
        help="memory for keys and values of recent requests; one that begins like them reads only the rest (default 256MB; 0 for none)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        default=ServeSettings.cache_dtype,
        help="type of keys and values; int8 has one scale per vector (default fp32)",
    )
    add_activations_argument(parser)


def run(args: argparse.Namespace) -> int:
    from halfplate.arguments import size_in_bytes

    settings = ServeSettings(
        model=args.model,
        host=args.host,
        port=args.port,
        device=args.device,
        dtype=args.dtype,
        key=found_key(args.api_key_file),
        max_tokens=args.max_tokens,
        max_body=size_in_bytes("--max-body", args.max_body),
        max_requests=args.max_requests,
        max_batch=args.max_batch,
        prompt_cache=size_in_bytes("--prompt-cache", args.prompt_cache),
        cache_dtype=args.cache_dtype,
        activations=args.activations,
    )
    _check_model(settings)
    _warn_of_tokens(args.model)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise HalfplateError("serve needs the server of transformers; run `pip install 'halfplate[serve]'`")
    from halfplate.serving.server import serve

    if settings.open_to_others:
        said = f"everyone who reaches {args.host} can use this server; set {KEY_VARIABLE} or --api-key-file to ask for a key"
        print(f"halfplate: warning: {said}", file=sys.stderr)
    print(f"{args.model}: http://{args.host}:{args.port}/v1, until Ctrl-C", file=sys.stderr)
    serve(settings)
    return 0


def _check_model(settings: ServeSettings) -> None:
    """Raise HalfplateError now, and not at the first request, for a model that the server cannot load."""
    from pathlib import Path

    from halfplate.checkpoint.loading import check_activations
    from halfplate.checkpoint.read import read_checked_headers
    from halfplate.models.sources import is_compressed, open_source

    model = settings.model
    if is_compressed(model):
        read_checked_headers(Path(model))
        return
    check_activations(model, settings.activations)
    source = open_source(model)
    kind = "a GGUF file" if source.gguf_header is not None else source.quantised
    if kind is not None:
        raise HalfplateError(
            f"model={model!r} is {'' if source.quantised is None else 'quantised by '}{kind}, which the server does not read; compress it, or write it in floats with "
            f"`halfplate export {model} -o FLOATS` and serve that"
        )


def _warn_of_tokens(model: str) -> None:
    """Warn of tokens beyond the vocabulary, which the server of transformers reports as an internal error."""
    from transformers import AutoConfig, AutoTokenizer

    from halfplate.calibration.vocabulary import check_tokenizer

    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    # The server reads both again, and reports their errors.
    except Exception:
        return
    warning = check_tokenizer(tokenizer, config.get_text_config().vocab_size)
    if warning is not None:
        print(f"halfplate: warning: {warning}", file=sys.stderr)
