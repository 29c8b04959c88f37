"""Serve a model over an OpenAI-compatible API: transformers' own server with Halfplate registered."""

import argparse
import sys

from halfplate.cli.parser import positive
from halfplate.errors import HalfplateError


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


def run(args: argparse.Namespace) -> int:
    if args.port > 65535:
        raise HalfplateError(f"--port {args.port} is not a port; expected 1 to 65535")
    # Errors in the model appear now and not at the first request.
    from pathlib import Path

    from halfplate.checkpoint.read import read_checked_headers
    from halfplate.models.sources import is_compressed, open_source

    if is_compressed(args.model):
        read_checked_headers(Path(args.model))
    else:
        open_source(args.model)
    _warn_of_tokens(args.model)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise HalfplateError("serve needs the server of transformers; run `pip install 'halfplate[serve]'`")
    from transformers.cli.serve import Serve

    print(f"{args.model}: http://{args.host}:{args.port}/v1, until Ctrl-C", file=sys.stderr)
    Serve(force_model=args.model, host=args.host, port=args.port, device=args.device, dtype=args.dtype)
    return 0


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
