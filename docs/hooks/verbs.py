"""The pages of the verbs, made from the parser of the command line."""

import argparse
import re
from pathlib import Path

from halfplate.cli import VERBS, build_parser

# Pages that say more than `--help`; the build fails where one is gone.
MORE = {
    "plan": ("memory.md", "choosing.md", "budget.md"),
    "compress": ("choosing.md", "armor.md", "methods.md", "budget.md", "memory.md", "resume.md", "troubleshooting.md"),
    "prune": ("pruning.md", "experts.md", "transforms.md", "resume.md"),
    "recover": ("recovery.md",),
    "eval": ("ecosystem.md", "choosing.md"),
    "bench": ("speed.md", "decoding.md", "kernels.md"),
    "sweep": ("sweeps.md", "resume.md"),
    "generate": ("decoding.md",),
    "inspect": ("format.md",),
    "export": ("export.md",),
    "report": ("report.md",),
    "recipe": ("choosing.md",),
    "serve": ("ecosystem.md",),
    "methods": ("methods.md", "extending.md"),
    "doctor": ("troubleshooting.md", "kernels.md"),
}


def names() -> list[str]:
    """All verbs, in the order of `halfplate --help`."""
    return list(VERBS)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every verb by its name."""
    (action,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def pages(root: Path) -> dict[str, str]:
    """Text of every page by its path below docs/."""
    lines = examples(root)
    made = {f"verbs/{name}.md": page(name, parser, lines.get(name, []), root) for name, parser in parsers().items()}
    return made | {"verbs/index.md": overview()}


def overview() -> str:
    """All verbs in one table."""
    rows = [f"| [`halfplate {name}`]({name}.md) | {parser.description} |" for name, parser in parsers().items()]
    intro = (
        "# Commands\n\nEvery command takes `--help`. Results go to standard output, progress and messages to standard error. Exit status 0: done; "
        "2: bad usage or input, with one line that says what to do; 1: anything else.\n\n| command | does |\n|---|---|\n"
    )
    return intro + "\n".join(rows) + "\n"


def page(name: str, parser: argparse.ArgumentParser, lines: list[str], root: Path) -> str:
    """One verb: what it does, how it is used in this documentation, every argument."""
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    parts = [f"# halfplate {name}", parser.description or ""]
    usage = " ".join(_usage(action) for action in shown if action.required or not action.option_strings)
    options = " [OPTIONS]" if any(not action.required and action.option_strings for action in shown) else ""
    parts.append(f"```text\nhalfplate {name}{options} {usage}".rstrip() + "\n```")
    if lines:
        parts.append("```console\n" + "\n".join(lines) + "\n```")
    if shown:
        rows = [f"| {_name(action)} | {_text(action)} |" for action in shown]
        parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    if name in MORE:
        links = (f"[{_title(root / 'docs' / more)}](../{more})" for more in MORE[name])
        parts.append("More: " + ", ".join(links) + ".")
    return "\n\n".join(parts) + "\n"


def examples(root: Path) -> dict[str, list[str]]:
    """The commands of docs/commands.md by verb; the tests run them."""
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^\$ halfplate .*$", (root / "docs" / "commands.md").read_text(), re.MULTILINE):
        found.setdefault(line.split()[2], []).append(re.sub(r"\s{2,}#", "  #", line))
    return found


def _usage(action: argparse.Action) -> str:
    metavar = str(action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper()))
    return f"{action.option_strings[0]} {metavar}" if action.option_strings else metavar


def _name(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else _usage(action).removeprefix((action.option_strings or [""])[0]).strip()
    words = [f"{option} {value}".strip() for option in action.option_strings] or [value]
    return ", ".join(f"`{word}`" for word in words)


def _text(action: argparse.Action) -> str:
    # Names such as *.q_proj are no emphasis.
    return (action.help or "").replace("|", "\\|").replace("*", "\\*")


def _title(page: Path) -> str:
    return page.read_text().splitlines()[0].removeprefix("# ")
