"""What all verbs share of their arguments."""

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from halfplate.errors import HalfplateError

LOG_LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and whose options cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise HalfplateError(f"{message}; see {self.prog} --help")


class Version(argparse.Action):
    """`--version`: the version, the kernels and their instruction set, found only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and the kernels in use, and exit")

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from halfplate.kernels.native import described
        from halfplate.version import package_version

        print(f"halfplate {package_version()}, native kernels: {described()}")
        parser.exit()


def add_output_arguments(parser: argparse.ArgumentParser, progress: bool = True) -> None:
    """`--json` and, for verbs that take long, `--log-level` and `--quiet`."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document to standard output")
    if progress:
        levels = parser.add_mutually_exclusive_group()
        levels.add_argument(
            "--log-level",
            choices=LOG_LEVELS,
            default="info",
            help="messages on standard error: info (default) shows progress, debug every step, warning and error neither",
        )
        levels.add_argument(
            "--quiet", action="store_const", dest="log_level", const="warning", help="do not show progress"
        )


def typed_text(text: str) -> str:
    """What the user typed, which Python decodes by the locale: bytes that the locale does not know, as UTF-8.

    For text alone: the names of files stay as they are, for the system takes them back so. What is not UTF-8 stays too.
    """
    if not any("\udc80" <= sign <= "\udcff" for sign in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return text


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


positive.__name__ = "whole number"  # argparse names the type so in its message
