"""List the compression methods and their options, and the types of cores of a few bits."""

import argparse
import sys
from dataclasses import MISSING, fields
from typing import Any

from halfplate.cli.parser import add_output_arguments
from halfplate.errors import HalfplateError

# Eight groups share a super-scale, so in this many columns every group size has whole ones.
COLUMNS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser, progress=False)


def run(args: argparse.Namespace) -> int:
    from halfplate.cli.console import print_json, print_table
    from halfplate.formats.quantizers.rounding import GROUPS

    methods, cores = _methods(), _cores()
    if args.json:
        print_json({"methods": methods, "core_dtypes": cores})
        return 0
    rows = [
        (
            m["name"],
            m["summary"],
            m["requires"],
            "yes" if m["wrapped"] else "",
            ", ".join(f"{k}={v}" for k, v in m["options"].items()),
        )
        for m in methods
    ]
    print_table("methods", ("name", "what it does", "statistics", "wrappers", "options (--option KEY=VALUE)"), rows)
    print_table(
        "bits per weight of an unpruned core, by --core-dtype and --group-size",
        ("core", *map(str, GROUPS)),
        [(core["name"], *(core["bits"][str(group)] for group in GROUPS)) for core in cores],
    )
    return 0


def _methods() -> list[dict[str, Any]]:
    from halfplate.methods import METHODS, create

    listed = []
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
    return listed


def _cores() -> list[dict[str, Any]]:
    from halfplate.formats.quantizers import QUANTIZERS
    from halfplate.formats.quantizers.rounding import GROUPS
    from halfplate.formats.spec import WeightSpec
    from halfplate.pattern import DENSE

    listed = []
    for name in QUANTIZERS.names():
        try:
            sizes = {group: WeightSpec(1, COLUMNS, DENSE, name, group=group).nbytes for group in GROUPS}
        except HalfplateError as error:
            print(f"halfplate: warning: {error}", file=sys.stderr)
            continue
        listed.append({"name": name, "bits": {str(group): 8 * nbytes / COLUMNS for group, nbytes in sizes.items()}})
    return listed
