"""Print a shell script that completes commands, options and values in bash, zsh or fish."""

import argparse
from dataclasses import dataclass
from shlex import quote

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Word:
    """An option with its names, or a positional argument, which has none; choices: its values, if they are few."""

    names: tuple[str, ...]
    choices: tuple[str, ...]
    takes_value: bool
    summary: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=SHELLS, help='the shell; for bash: eval "$(halfplate completion bash)" in ~/.bashrc'
    )


def run(args: argparse.Namespace) -> int:
    print(script(args.shell, args.parser), end="")
    return 0


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script for everything that `parser` accepts; shell: one of SHELLS."""
    verbs, summaries = _verbs(parser)
    if shell == "fish":
        return _fish(verbs, summaries)
    bash = _bash(verbs)
    return bash if shell == "bash" else f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{bash}"


def _verbs(parser: argparse.ArgumentParser) -> tuple[dict[str, list[Word]], dict[str, str]]:
    """The options of each command, and its summary."""
    (actions,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in actions._choices_actions}
    shown = {
        name: [_word(action) for action in one._actions if action.help != argparse.SUPPRESS]
        for name, one in actions.choices.items()
    }
    return shown, summaries


def _word(action: argparse.Action) -> Word:
    # Descriptions must fit on a line, so only the first clause is used.
    summary = (action.help or "").partition(";")[0].partition(" (")[0]
    choices = tuple(map(str, action.choices)) if action.choices else ()
    return Word(tuple(action.option_strings), choices, action.nargs != 0, summary)


def _bash(verbs: dict[str, list[Word]]) -> str:
    values, options = [], []
    for verb, words in verbs.items():
        for word in words:
            # A positional argument with few values comes directly after the command.
            before = "|".join(quote(f"{verb} {name}") for name in word.names or (verb,))
            if word.choices:
                values.append(f"        {before}) words={quote(' '.join(word.choices))} ;;")
            elif word.names and word.takes_value:
                values.append(f"        {before}) return ;;")
        options.append(f"        {verb}) words={quote(' '.join(name for word in words for name in word.names))} ;;")
    lines = [
        "_halfplate() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" verb="${COMP_WORDS[1]}" words=""',
        "    COMPREPLY=()",
        f'    if [ "$COMP_CWORD" -eq 1 ]; then words={quote(" ".join([*verbs, "--help", "--version"]))}; fi',
        '    case "$verb $before" in',
        *values,
        "    esac",
        '    case "$word" in',
        '    -*) [ "$COMP_CWORD" -eq 1 ] || case "$verb" in',
        *options,
        "    esac ;;",
        "    esac",
        '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -o bashdefault -F _halfplate halfplate",
    ]
    return "\n".join(lines) + "\n"


def _fish(verbs: dict[str, list[Word]], summaries: dict[str, str]) -> str:
    lines = []
    for verb, words in verbs.items():
        lines.append(f"complete -c halfplate -n __fish_use_subcommand -f -a {verb} -d {quote(summaries[verb])}")
        for word in words:
            line = f"complete -c halfplate -n '__fish_seen_subcommand_from {verb}'"
            for name in word.names:
                line += f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
            if word.choices:
                line += f" -{'x' if word.names else 'f'} -a {quote(' '.join(word.choices))}"
            elif not word.names:
                continue  # a model or a folder: complete files, which is the default of fish
            elif word.takes_value:
                line += " -r"
            lines.append(line + (f" -d {quote(word.summary)}" if word.summary else ""))
    return "\n".join(lines) + "\n"
