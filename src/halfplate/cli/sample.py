"""Write text that a model generates, for several runs to calibrate or to be judged on."""

import argparse
import json

from halfplate.cli.parser import add_output_arguments, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a Hub id or a .gguf file")
    parser.add_argument("-o", "--out", metavar="TEXT.jsonl", required=True, help="file to write: one text per line")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--samples", type=positive, metavar="N", default=64, help="number of texts (default 64)")
    parser.add_argument("--seq-len", type=positive, metavar="L", default=512, help="tokens per text (default 512)")
    parser.add_argument("--seed", type=int, metavar="S", default=0, help="random seed (default 0)")
    parser.add_argument(
        "--source",
        choices=("self", "self:varied"),
        default="self",
        help="self (default): from the start token; self:varied: also chat turns, code and other languages (docs/texts.md)",
    )
    parser.add_argument("--threads", type=positive, metavar="T", help="number of CPU threads")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from halfplate.calibration import calibration_tokens
    from halfplate.cli.console import print_json, progress, silence_libraries
    from halfplate.errors import HalfplateError
    from halfplate.limits import use_threads
    from halfplate.models.sources import load_dense
    from halfplate.runtime.sampling import native_sampling
    from halfplate.storage.atomic import whole_file

    silence_libraries()
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise HalfplateError(f"out={args.out!r} is not a .jsonl file; choose a name such as text.jsonl")
    if out.is_dir() or (out.exists() and not args.overwrite):
        raise HalfplateError(f"out={args.out!r} exists; choose another name, or pass --overwrite for a file")
    use_threads(args.threads)
    with progress(args) as report, torch.no_grad():
        loaded = load_dense(args.model)
        found = calibration_tokens(
            args.source,
            loaded.model,
            loaded.tokenizer,
            args.samples,
            args.seq_len,
            args.seed,
            lambda done, total: report("sampling text", done, total),
            maker=native_sampling,
        )
    # A reader adds the start token itself.
    rows = (
        ids[1:] if found.start_token is not None and ids[0] == found.start_token else ids for ids in found.ids.tolist()
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        for ids in rows:
            file.write(json.dumps({"text": loaded.tokenizer.decode(ids)}, ensure_ascii=False) + "\n")
    if args.json:
        print_json({"out": args.out, "protocol": found.protocol()})
    else:
        print(f"{args.samples} texts of {args.seq_len} tokens: {args.out}")
    return 0
