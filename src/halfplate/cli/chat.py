"""Talk to a model in the terminal; --against shows the answers of a second one below."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from halfplate.cli.parser import (
    add_activations_argument,
    add_decoding_arguments,
    add_fit_argument,
    positive,
    typed_text,
)
from halfplate.errors import HalfplateError
from halfplate.plain_text import visible

if TYPE_CHECKING:
    from halfplate.evaluation.conversation import Conversation

COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation",
    "/stats": "tokens per second, context, and the kernels in use",
    "/exit": "end (also Ctrl-D)",
}
PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Halfplate checkpoint, a Hugging Face folder, a Hub id or a .gguf file"
    )
    parser.add_argument("--against", metavar="MODEL", help="a second model, which answers the same messages")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        default=512,
        help="maximum number of tokens of an answer (default 512)",
    )
    parser.add_argument("--threads", type=positive, metavar="T", help="number of CPU threads")
    add_fit_argument(parser)
    add_activations_argument(parser, " of MODEL")
    add_decoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise HalfplateError("chat needs a terminal for input and output; in scripts, use halfplate generate")
    from halfplate.cli.console import silence_libraries
    from halfplate.evaluation.conversation import Conversation
    from halfplate.limits import use_threads

    silence_libraries()
    use_threads(args.threads)
    print(f"reading {visible(args.model)}" + (f" and {visible(args.against)}" if args.against else ""), flush=True)
    own = {"cache_dtype": args.cache_dtype, "lookup": args.lookup, "fit": args.fit}
    talks = [Conversation.with_model(args.model, args.max_new_tokens, args.activations, **own)]
    if args.against:
        talks.append(Conversation.with_model(args.against, args.max_new_tokens))
    for talk in talks:
        if not talk.has_template:
            print(f"{visible(talk.name)} has no chat template, so it continues your text instead of answering it")
    print("Ctrl-C stops an answer, Ctrl-D ends; /help lists the commands")
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then has a history and line editing
    # `main` lets SIGTERM raise KeyboardInterrupt, which only stops an answer here.
    signal.signal(signal.SIGTERM, _end)
    while (line := _read()) is not None:
        if line.startswith("/"):
            if not _obey(line.strip(), talks):
                break
        elif line.strip():
            for talk in talks:
                if len(talks) > 1:
                    print(f"[{visible(talk.name)}]")
                _answer(talk, line.strip())
    return 0


def _read() -> str | None:
    """The next line; None at the end of the input."""
    while True:
        try:
            return typed_text(input(PROMPT))
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")


def _obey(command: str, talks: list[Conversation]) -> bool:
    """Carry out a command; returns False if it ends the conversation."""
    if command == "/reset":
        for talk in talks:
            talk.reset()
        print("(the conversation is forgotten)")
    elif command == "/stats":
        for talk in talks:
            _print_stats(talk)
    elif command == "/help":
        for name, what in COMMANDS.items():
            print(f"{name:<8}{what}")
        print("Everything else is a message. Begin with a space to send a message that begins with /.")
    elif command != "/exit":
        print(f"({visible(command)} is not a command; there are {', '.join(COMMANDS)})")
    return command != "/exit"


def _answer(talk: Conversation, message: str) -> None:
    """Print the answer while it is generated, and then whatever there is to say about it."""

    def say(piece: str) -> None:
        print(visible(piece), end="", flush=True)

    with _interruptible() as interrupted:
        try:
            answer = talk.answer(message, say, lambda: bool(interrupted))
        except KeyboardInterrupt:
            print("\n(stopped; this turn is forgotten)")
            return
        except HalfplateError as error:
            print(f"({visible(' '.join(str(error).split()))})")
            return
    notes = []
    if answer.dropped:
        turns = "turn was" if answer.dropped == 1 else f"{answer.dropped} turns were"
        notes.append(f"the context is full: the oldest {turns} dropped")
    if answer.ended == "stopped":
        notes.append("stopped")
    elif answer.ended == "length":
        full = talk.limit is not None and answer.context >= talk.limit
        notes.append("the context is full" if full else f"cut at --max-new-tokens {talk.most}")
    print("".join(f"\n({note})" for note in notes))


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Context manager in which the first Ctrl-C fills the list, and the second raises KeyboardInterrupt."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: Any) -> NoReturn:
    raise SystemExit(1)


def _print_stats(talk: Conversation) -> None:
    print(f"{visible(talk.name)}:")
    if (last := talk.last) is None:
        print("  no answer yet")
    else:
        speed = last.tokens_per_second
        print(
            f"  last answer: {last.tokens} tokens"
            + ("" if speed is None else f", {speed:.1f} tokens/s")
            + f"; first token after {last.first_seconds:.2f} s, {last.read} tokens read"
        )
        of = "" if talk.limit is None else f" of {talk.limit:,}"
        turns = "1 turn" if len(talk.turns) == 1 else f"{len(talk.turns)} turns"
        print(f"  context: {last.context:,}{of} tokens in {turns}")
    for path in talk.paths().splitlines():
        print(f"  {path}")
