"""Rows of data as text: JSON lines, JSON arrays, and chat messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROW_CHARACTERS = 2**25  # longer rows are refused
# Fields that often hold text together, in the order in which an error suggests them.
KNOWN_FIELDS = (
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("content",),
)
# Roles of ShareGPT rows (`from`) and their names in chat templates.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def check_unicode(text: str, where: str) -> None:
    """Raise HalfplateError if `text` contains half of a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HalfplateError(
            f"{where} holds {text[error.start]!r} at character {error.start}, which is not valid Unicode; remove it"
        ) from None


def json_lines(blocks: Iterable[str], where: str) -> Iterator[tuple[str, Any]]:
    """The position and the value of each row: one JSON value per line; blank lines are skipped."""
    number, begun = 0, ""
    for block in _with_last_line(blocks):
        # Only \n, because JSON strings may contain other characters that Python treats as line ends.
        *lines, rest = (begun + block).split("\n")
        begun = rest
        for line in lines:
            number += 1
            if line.strip():
                place = f"{where}, line {number}"
                yield place, _parsed(line, place)
        _check_length(begun, f"{where}, line {number + 1}")


def json_values(blocks: Iterable[str], where: str) -> Iterator[tuple[str, Any]]:
    """The position and the value of each row: the items of one JSON array, or consecutive JSON values."""
    source, decoder = iter(blocks), json.JSONDecoder()
    held = _stripped(next(source, ""), source)
    if in_array := held.startswith("["):
        held = held[1:]
    number = 0
    while held := _stripped(held, source):
        if in_array and held[0] == "]":
            held = _stripped(held[1:], source)
            if held:
                raise HalfplateError(
                    f"{where} has more text after its array ({held[:20]!r}); expected one array of rows"
                )
            return
        if in_array and number:
            if held[0] != ",":
                raise _not_json(f"{where}, row {number + 1}", f"expected ',' before {held[:20]!r}")
            held = _stripped(held[1:], source)
        number += 1
        place = f"{where}, row {number}"
        value, held = _next_value(held, source, decoder, place)
        yield place, value
    if in_array:
        raise HalfplateError(f"{where} ends inside its array; download it again")


def _next_value(held: str, source: Iterator[str], decoder: json.JSONDecoder, place: str) -> tuple[Any, str]:
    """The value at the beginning of `held`, reading more of `source` as needed, and the text after it."""
    while True:
        reason = None
        try:
            value, end = decoder.raw_decode(held)
            if not _may_go_on(value, held[end:]):
                return value, held[end:]
        except (ValueError, RecursionError) as error:
            reason = error
        _check_length(held, place)
        # The text is doubled each time, so that a long value is parsed only a few times.
        more = _more(source, len(held))
        if not more:
            if reason is not None:
                raise _not_json(place, reason)
            return value, held[end:]
        held += more


def row_text(
    row: Any, where: str, source: str, fields: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> str | None:
    """The text of one row; None if the row has none (`null`, `{}`, no messages, a text that is null).

    fields: names of fields joined by `+`; None for `text`, `messages` or `conversations`.
    source: the source as suggested by an error, before a field is appended.
    Raises HalfplateError if the row has no such field, naming one that it has.
    """
    value: Any
    if row is None or isinstance(row, str):
        value = row
    elif not isinstance(row, Mapping):
        raise HalfplateError(f"{where} holds a {type(row).__name__}, expected an object with a field 'text'")
    elif not row:
        return None
    elif fields is not None:
        value = _named(row, fields, where)
    else:
        key = next((key for key in ("text", "messages", "conversations") if key in row), None)
        if key is None or not (row[key] is None or isinstance(row[key], str if key == "text" else list)):
            raise _no_text(row, where, source)
        value = row[key]
    text: str | None = rendered(value, where, tokenizer) if isinstance(value, list) else value
    if text is not None:
        check_unicode(text, where)
    return text


def rendered(messages: list[Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Chat messages formatted by the tokenizer's template; without a template, their contents with blank lines between."""
    said = [_message(message, where) for message in messages]
    if not said:
        return None
    if not has_template(tokenizer):
        return "\n\n".join(message["content"] for message in said if message["content"])
    assert tokenizer is not None
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False)
    # Templates are programs that can raise any exception, e.g. for an unexpected order of roles.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise HalfplateError(
            f"{where}: the chat template of the model refuses its messages ({reason}); correct or remove the row"
        ) from None
    return str(text)


def is_messages(row: Any, fields: str | None) -> bool:
    """Whether the text of a row, which has text, consists of chat messages."""
    if not isinstance(row, Mapping):
        return False
    return "text" not in row if fields is None else isinstance(row.get(fields), list)


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether messages are formatted by a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _message(message: Any, where: str) -> dict[str, str]:
    """`role` and `content` of a message in one of the usual forms."""
    if isinstance(message, Mapping):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" for part in content
        ):
            texts = [part.get("text") for part in content]
            content = "".join(text for text in texts if isinstance(text, str))
        if isinstance(role, str) and (content is None or isinstance(content, str)):
            return {"role": ROLES.get(role, role), "content": content or ""}
    raise HalfplateError(
        f"{where} has a message that is not an object with texts 'role' and 'content' (or 'from' and 'value'); "
        "correct or remove the row"
    )


def _named(row: Mapping[str, Any], fields: str, where: str) -> str | list[Any] | None:
    """The values of the named fields joined by line breaks; None if all are null."""
    names = [fields] if fields in row else fields.split("+")
    found = []
    for name in names:
        if name not in row:
            known = ", ".join(map(repr, list(row)[:8]))
            raise HalfplateError(f"{where} has no field {name!r} (fields: {known}); name one of these after the file")
        value = row[name]
        if len(names) == 1 and isinstance(value, list):
            return value
        if not (value is None or isinstance(value, str)):
            raise HalfplateError(f"{where}: field {name!r} holds a {type(value).__name__}, expected text")
        found.append(value)
    texts = [value for value in found if value]
    return None if all(value is None for value in found) else "\n".join(texts)


def _no_text(row: Mapping[str, Any], where: str, source: str) -> HalfplateError:
    known = ", ".join(map(repr, list(row)[:8]))
    strings = [name for name, value in row.items() if isinstance(value, str) and value]
    usual = (names for names in KNOWN_FIELDS if all(isinstance(row.get(name), str) for name in names))
    names = next(usual, strings[:1])
    cure = (
        f"name the field that does, e.g. {source + ':' + '+'.join(names)!r}"
        if names
        else "write each row with its text in a field 'text'"
    )
    return HalfplateError(f"{where} has no string in field 'text' (fields: {known}); {cure}")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from None


def _not_json(where: str, reason: object) -> HalfplateError:
    return HalfplateError(f"{where} is not valid JSON ({reason}); expected an object with a field 'text'")


def _with_last_line(blocks: Iterable[str]) -> Iterator[str]:
    yield from blocks
    yield "\n"


def _stripped(held: str, source: Iterator[str]) -> str:
    """The text after leading white space; empty only at the end."""
    while not (held := held.lstrip(" \t\n\r")):
        more = next(source, "")
        if not more:
            return ""
        held = more
    return held


def _may_go_on(value: Any, rest: str) -> bool:
    """Whether `value` may be the beginning of a longer number; `rest` is the text read so far."""
    return isinstance(value, int | float) and not rest.lstrip("0123456789.eE+-")


def _more(source: Iterator[str], least: int) -> str:
    """At least `least` more characters, or all that are left."""
    parts, length = [], 0
    for block in source:
        parts.append(block)
        length += len(block)
        if length >= least:
            break
    return "".join(parts)


def _check_length(row: str, where: str) -> None:
    if len(row) > MAX_ROW_CHARACTERS:
        raise HalfplateError(
            f"{where} is longer than {MAX_ROW_CHARACTERS // 2**20} MiB; expected rows of text, one JSON object each"
        )
