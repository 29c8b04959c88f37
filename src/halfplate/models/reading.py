"""Turning exceptions of other libraries into one-line errors while they read a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from halfplate.errors import HalfplateError

LONGEST_REASON = 600  # most characters of another library's message


@contextmanager
def reading(
    name: str, what: str, cure: str, entries: Mapping[str, Any] | None = None, argument: str = "model"
) -> Iterator[None]:
    """Context manager that turns any exception into a HalfplateError: `model=NAME: WHAT (REASON); CURE`.

    A model folder is untrusted data, and each library that reads it raises its own exceptions. A HalfplateError passes unchanged.

    what: the file and the failure, e.g. "config.json cannot be used".
    entries: content of config.json, to name the key whose value a library did not know.
    """
    try:
        yield
    except HalfplateError:
        raise
    # Also RecursionError and MemoryError, which a few bytes of an untrusted file can cause.
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
    """The path of the first entry whose value is the string `value`, such as `rope_scaling.type`."""
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
