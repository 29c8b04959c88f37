"""List the compression methods and their options."""

import argparse
import sys
from dataclasses import MISSING, fields
from typing import Any

from halfplate.cli.parser import add_output_arguments
from halfplate.errors import HalfplateError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser, progress=False)


def run(args: argparse.Namespace) -> int:
    from halfplate.cli.console import print_json, print_table
    from halfplate.methods import METHODS, create

    listed: list[dict[str, Any]] = []
    for name in METHODS.names():
        try:
            found = METHODS.get(name)
        except HalfplateError as error:  # a broken package; the other methods are still listed
            print(f"halfplate: warning: {error}", file=sys.stderr)
            continue
        options = {f.name: f.default for f in fields(found) if f.default is not MISSING}
        needs = create(name).requires.name.lower()
        listed.append(
            {"name": name, "summary": found.summary, "requires": needs, "wrapped": found.wrapped, "options": options}
        )
    if args.json:
        print_json({"methods": listed})
        return 0
    rows = [
        (
            m["name"],
            m["summary"],
            m["requires"],
            "yes" if m["wrapped"] else "",
            ", ".join(f"{k}={v}" for k, v in m["options"].items()),
        )
        for m in listed
    ]
    print_table("methods", ("name", "what it does", "statistics", "wrappers", "options (--option KEY=VALUE)"), rows)
    return 0
