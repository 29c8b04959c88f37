"""The command line. Each command is one file with `add_arguments(parser)` and `run(args)`; nothing heavy is imported before `run`."""

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from halfplate.cli import (
    bench,
    chat,
    completion,
    compress,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    methods,
    plan,
    prune,
    recipe,
    recover,
    report,
    sample,
    serve,
    sweep,
)
from halfplate.cli.parser import Parser, Version
from halfplate.cli.streams import print_in_any_locale
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.limits import bound_environment
from halfplate.plain_text import visible

LONGEST = 2000  # most characters of an error message
VERBS: dict[str, Any] = {
    "plan": plan,
    "compress": compress,
    "prune": prune,
    "recover": recover,
    "eval": evaluate,
    "bench": bench,
    "sweep": sweep,
    "sample": sample,
    "generate": generate,
    "chat": chat,
    "inspect": inspect,
    "export": export,
    "report": report,
    "recipe": recipe,
    "serve": serve,
    "methods": methods,
    "doctor": doctor,
    "completion": completion,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. It is also passed to the parsed arguments, for `completion`."""
    parser = Parser(
        prog="halfplate",
        description="Compress large language models in one shot, and run, measure and export the result.",
    )
    parser.add_argument("--version", action=Version)
    parser.set_defaults(parser=parser)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        summary = module.__doc__.strip().splitlines()[0]
        module.add_arguments(verbs.add_parser(name, help=summary, description=summary))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 success, 2 bad usage or input, 1 any other failure."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # GNU OpenMP reads this when torch is imported. By default, waiting threads spin for milliseconds, which on cores
    # with other work was seen to take 60 times longer; a short spin does not slow down an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    print_in_any_locale()
    for bounded in bound_environment(os.environ):
        print(f"halfplate: warning: {bounded}", file=sys.stderr)
    out, resumable = None, False
    if threading.current_thread() is threading.main_thread():
        # SIGTERM from a scheduler or `kill` ends a run like Ctrl-C: the log is completed, and no file is left incomplete.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The only way to hide transformers' progress bar for GGUF files; read when torch imports tqdm.
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.showwarning = _show_warning
    try:
        args = build_parser().parse_args(argv)
        out, resumable = getattr(args, "out", None), hasattr(args, "resume")
        status: int = VERBS[args.verb].run(args)
        sys.stdout.flush()
        return status
    except HalfplateError as error:
        print(f"halfplate: error: {_spoken(str(error))}", file=sys.stderr)
        if error.docs is not None:
            print(f"see {error.docs}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        left = "" if out is None else f"; {out} has no partial result"
        left += "; run the same command with --resume to continue" if resumable else ""
        print(f"halfplate: interrupted{left}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the output has closed it; without this, Python prints an error when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _out_of_memory(error):
            traceback.print_exc()
            return 1
        left = "; finished work is kept, run the same command with --resume to continue" if resumable else ""
        text = " ".join(str(error).split())[:200]
        print(
            f"halfplate: error: out of memory ({text}){left}; docs/troubleshooting.md says how to use less memory",
            file=sys.stderr,
        )
        return 1


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Print Halfplate's own warnings on one line like errors, and others as Python does."""
    if isinstance(message, HalfplateWarning):
        print(f"halfplate: warning: {_spoken(str(message))}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)


def _spoken(message: str) -> str:
    """A message on one line of bounded length, with control characters escaped, because names in it may be untrusted."""
    line: str = visible(" ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}"


def _out_of_memory(error: Exception) -> bool:
    """Whether an exception of Python or torch means out of memory (torch has no type for this on CPUs)."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory")
    )
