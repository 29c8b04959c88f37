"""Write a report of a checkpoint: one self-contained HTML file."""

import argparse
from typing import Any

from halfplate.cli.parser import add_output_arguments, positive, typed_text
from halfplate.limits import use_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OUT", help="a Halfplate checkpoint")
    parser.add_argument("-o", "--file", metavar="FILE.html", help="file to write (default OUT/report.html)")
    parser.add_argument(
        "--against",
        metavar="ORIGINAL",
        help="original model to compare quality, speed and answers with; the results are kept for later reports",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text to measure on (default: text that the original model generates)"
    )
    parser.add_argument("--windows", type=positive, metavar="N", help="number of text windows (default 16)")
    parser.add_argument("--seq-len", type=positive, metavar="L", help="tokens per window (default 256)")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="prompt for both models; may be repeated")
    parser.add_argument("--new-tokens", type=positive, metavar="N", help="tokens per answer (default 48)")
    parser.add_argument("--threads", type=positive, metavar="T", help="number of CPU threads")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from halfplate import write_report
    from halfplate.cli.console import print_json, progress, silence_libraries

    silence_libraries()
    use_threads(args.threads)
    with progress(args) as report:
        file = write_report(args.path, args.file, args.against, report, **_measuring(args))
    if args.json:
        print_json({"report": str(file)})
    else:
        print(f"report: {file}")
    return 0


def _measuring(args: argparse.Namespace) -> dict[str, Any]:
    """The given options of the measurement."""
    given = {name: getattr(args, name) for name in ("text", "windows", "seq_len", "new_tokens")}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if args.prompt:
        chosen["prompts"] = tuple(map(typed_text, args.prompt))
    return chosen
