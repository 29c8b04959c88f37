"""Turning failures of other libraries while they read a model into one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from halfplate.errors import HalfplateError

LONGEST_REASON = 600  # characters of another library's message


@contextmanager
def reading(
    name: str, what: str, cure: str, entries: Mapping[str, Any] | None = None, argument: str = "model"
) -> Iterator[None]:
    """Turn any exception inside into a HalfplateError: `model=NAME: WHAT (REASON); CURE`.

    A model folder is data of any shape, and each library that reads it fails with errors of its own. what: the file and what it
    cannot do. entries: config.json, to name the key whose value a library did not know. A HalfplateError passes unchanged.
    """
    try:
        yield
    except HalfplateError:
        raise
    # RecursionError and MemoryError too: a few bytes of a stranger's file can ask for either.
    except Exception as error:
        raise HalfplateError(f"{argument}={name!r}: {what} ({in_words(error, entries)}); {cure}") from None


def in_words(error: Exception, entries: Mapping[str, Any] | None = None) -> str:
    """The reason of `error` on one line, with its class if the message alone says nothing."""
    reason = " ".join(str(error).split())
    if isinstance(error, KeyError) and entries is not None and error.args:
        key = _key_of(error.args[0], entries)
        if key is not None:
            return f"{key}={error.args[0]!r} is unknown to transformers"
    if not reason or len(reason) < 20 or isinstance(error, KeyError | AttributeError | TypeError | AssertionError):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "…"


def _key_of(value: Any, entries: Mapping[str, Any]) -> str | None:
    """The path of the first entry that is `value`, a string, such as `rope_scaling.type`."""
    if not isinstance(value, str):
        return None
    for key, entry in entries.items():
        if isinstance(entry, str) and entry == value:
            return str(key)
        if isinstance(entry, Mapping) and (below := _key_of(value, entry)) is not None:
            return f"{key}.{below}"
        if isinstance(entry, list) and value in [one for one in entry if isinstance(one, str)]:
            return str(key)
    return None
