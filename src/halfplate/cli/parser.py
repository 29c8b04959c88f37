"""Arguments that several commands share."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from halfplate.errors import HalfplateError

CALIBRATION = "--calibration"
SHARE = re.compile(r"[^-].*:[\d.+-][\d.e+-]*", re.IGNORECASE | re.DOTALL)
LOG_LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors and without abbreviations of options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(args if args is None else spread_shares(args), namespace)

    def error(self, message: str) -> NoReturn:
        raise HalfplateError(f"{message}; see {self.prog} --help")


def spread_shares(words: Sequence[str]) -> list[str]:
    """`--calibration A:0.5 B:0.5` as two options, so that an argument without a share, such as MODEL, may follow."""
    spread, shared = list[str](), False
    for place, word in enumerate(words):
        if shared and SHARE.fullmatch(word):
            spread.append(f"{CALIBRATION}={word}")
            continue
        source = word.removeprefix(f"{CALIBRATION}=")
        given = source != word or (place > 0 and words[place - 1] == CALIBRATION)
        shared = given and SHARE.fullmatch(source) is not None
        spread.append(word)
    return spread


class Version(argparse.Action):
    """`--version`: prints the version, the kernels and their instruction set, which are only determined on request."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and the kernels in use, and exit")

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from halfplate.kernels.native import described
        from halfplate.version import package_version

        print(f"halfplate {package_version()}, native kernels: {described()}")
        parser.exit()


def add_activations_argument(parser: argparse.ArgumentParser, model: str = "") -> None:
    """Add `--activations`. model: the one of several models that it is for."""
    parser.add_argument(
        "--activations",
        choices=("auto", "float", "int8"),
        default="auto",
        help=f"how quantised cores{model} take activations: float, int8, or auto (default): int8 for 4 tokens or more at once (2:4: 16) if that is the fastest here",
    )


def add_output_arguments(parser: argparse.ArgumentParser, progress: bool = True) -> None:
    """Add `--json` and, for commands that take long, `--log-level` and `--quiet`."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document to standard output")
    if progress:
        levels = parser.add_mutually_exclusive_group()
        levels.add_argument(
            "--log-level",
            choices=LOG_LEVELS,
            default="info",
            help="level of messages on standard error: info (default) shows progress, debug also shows every step",
        )
        levels.add_argument(
            "--quiet", action="store_const", dest="log_level", const="warning", help="do not show progress"
        )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--cache-dtype` and `--lookup`."""
    parser.add_argument(
        "--cache-dtype",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="type of the keys and values of the text so far; int8 has one scale per vector (default fp32)",
    )
    parser.add_argument(
        "--lookup",
        type=positive,
        metavar="N",
        default=0,
        help="guess up to N tokens at once from the text so far, and check them in one step (default: none); "
        "faster where text is repeated",
    )


def add_fit_argument(parser: argparse.ArgumentParser) -> None:
    """Add the size to load of a checkpoint that holds steps of size."""
    what = (
        "load at most this much of the weight file of a checkpoint made by method bitstack, such as 300MB (default all)"
    )
    parser.add_argument("--fit", metavar="SIZE", help=what)


def typed_text(text: str) -> str:
    """Command-line text as UTF-8, even if the locale cannot decode it.

    Only for text: names of files must keep the form in which Python decoded them. Bytes that are not UTF-8 are not changed.
    """
    if not any("\udc80" <= sign <= "\udcff" for sign in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return text


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


positive.__name__ = "whole number"  # the name of the type in argparse's messages
