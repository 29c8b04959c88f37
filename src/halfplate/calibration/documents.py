"""Text from files, plugins and Hub data sets, and its tokens as one stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from halfplate.arguments import check_name
from halfplate.calibration.characters import characters, unix_lines
from halfplate.calibration.mixture import SAMPLED
from halfplate.calibration.rows import check_unicode, has_template, is_messages, json_lines, json_values, row_text
from halfplate.calibration.stream import tokens_of
from halfplate.errors import HalfplateError
from halfplate.registry import Registry, broken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Text", "check_source", "check_unicode", "read_text", "token_stream"]

LINES, VALUES = (".jsonl", ".jsonl.gz"), (".json", ".json.gz")
SUFFIXES = (".txt", ".txt.gz", *LINES, *VALUES)
# Limit for reading a whole text, because a small compressed file can unpack to any size.
MAX_FILE_BYTES = 256 * 2**20
# A Hub data set can have any size and is read from its beginning; this much gives millions of tokens.
MAX_HUB_CHARACTERS = 32 * 2**20
# A blank line between documents, as is customary for WikiText perplexity (GPTQ, SparseGPT, Wanda).
SEPARATOR = "\n\n"

# Named sources (not files or Hub data sets). Each is a function from the text after `name:` to documents.
SOURCES: Registry[Callable[[str], Iterable[str]]] = Registry(
    "calibration", "halfplate.calibration", {"self": "halfplate.calibration.self_text:sample_text"}
)
END = object()  # type of the documents of a plugin
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
WITH_FIELDS = re.compile(r"(?P<file>.+\.jsonl?(?:\.gz)?):(?P<fields>.+)", re.IGNORECASE | re.DOTALL)


def check_source(source: str, argument: str = "calibration") -> None:
    """Raise HalfplateError if `source` is a file or a plugin that does not exist; Hub names are not checked."""
    if _plugin(source, argument) is not None:
        return
    file, _ = split_fields(source)
    check_name(argument, file)
    path = Path(file).expanduser()
    if source in SAMPLED and argument == "calibration":
        return
    if file.lower().endswith(SUFFIXES):
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise HalfplateError(f"{argument}={source!r} {what}, expected a text file; check the path")
    elif path.exists():
        raise HalfplateError(
            f"{argument}={source!r} is not a text file that Halfplate reads; expected a name ending in {', '.join(SUFFIXES)}"
        )
    elif not HUB_NAME.fullmatch(source):
        raise HalfplateError(
            f"{argument}={source!r} does not exist; expected a {', '.join(SUFFIXES)} file or a Hub data set such as org/name:config"
        )


def split_fields(source: str) -> tuple[str, str | None]:
    """The file and the fields of `FILE.jsonl:field` (or `.json`, also with `.gz`); None if no field is given."""
    if not source.lower().endswith(SUFFIXES) and (named := WITH_FIELDS.fullmatch(source)):
        return named["file"], named["fields"]
    return source, None


class Text:
    """The text of a source, read piece by piece as needed.

    source: a file, `name` or `name:what` of a plugin, or a Hub data set (see `read_text`).
    argument: name of `source` in error messages.
    skipped: number of rows without text so far.
    Raises HalfplateError if the source does not exist or its beginning cannot be read, and during reading for later damage.
    """

    def __init__(self, source: str, argument: str = "calibration") -> None:
        check_source(source, argument)
        self.source, self.argument, self.skipped = source, argument, 0
        self._file, self._fields = split_fields(source)
        self._plugin = _plugin(source, argument)
        self._messages: str | None = None
        if self._is_file:
            next(self.pieces(), None)

    @property
    def _is_file(self) -> bool:
        return self._plugin is None and self._file.lower().endswith(SUFFIXES)

    def pieces(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
        """The documents joined by blank lines, in pieces of any length; chat messages are formatted by the tokenizer's template."""
        if self._is_file and not self._file.lower().endswith(LINES + VALUES):
            return self._characters()
        return joined(self.documents(tokenizer))

    def documents(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
        """The documents one by one."""
        where, name = f"{self.argument}={self.source!r}", self._file.lower()
        if self._plugin is not None:
            found = _plugin_documents(self._plugin, self.source, self.argument)
        elif not self._is_file:
            found = self._texts(_hub_rows(self.source, self.argument), tokenizer)
        elif name.endswith(LINES + VALUES):
            read = json_lines if name.endswith(LINES) else json_values
            found = self._texts(read(self._characters(), where), tokenizer)
        else:
            found = iter(["".join(self._characters())])
        return map(unix_lines, found)

    def facts(self) -> dict[str, Any]:
        """Entries of the protocol about the last reading: `skipped_rows`, and how `messages` were formatted, if there are any."""
        told: dict[str, Any] = {"skipped_rows": self.skipped} if self.skipped else {}
        return told | ({"messages": self._messages} if self._messages else {})

    def spoken_facts(self) -> str:
        """The part of an error message about skipped rows."""
        return f", and {self.skipped} rows without text" if self.skipped else ""

    def _characters(self) -> Iterator[str]:
        return characters(Path(self._file).expanduser(), f"{self.argument}={self.source!r}", MAX_FILE_BYTES)

    def _texts(self, rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
        self.skipped, self._messages = 0, None
        for where, row in rows:
            text = row_text(row, where, self._file, self._fields, tokenizer)
            if text is None:
                self.skipped += 1
                continue
            if is_messages(row, self._fields):
                self._messages = "chat template" if has_template(tokenizer) else "contents only"
            yield text


def read_text(
    source: str, argument: str = "calibration", tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    r"""The documents of `source`: a file, the text of a plugin, or the train split of a Hub data set.

    A `.txt` file is one document. A `.jsonl` file has one per line and a `.json` file one per item of its array: the field `text`
    (which may be empty), chat messages in `messages` or `conversations`, or the fields named in `FILE.jsonl:field` (`a+b` joins two
    fields by a line break). Each file may be gzipped (`.gz`). Files are UTF-8, or UTF-16 with a byte-order mark; line ends become
    \n. Rows without text are skipped. A Hub data set is named `org/name` or `org/name:config` and needs halfplate[hub]; its first
    32 Mi characters are read. Other packages can add sources, `name` or `name:what` (docs/extending.md).

    argument: name of `source` in error messages.
    tokenizer: formats chat messages with its template.
    Raises HalfplateError for a file that is missing, damaged, not text or larger than 256 MiB, for rows with other fields (naming
    the line and a field), and for data sets that cannot be read.
    """
    return list(Text(source, argument).documents(tokenizer))


def joined(documents: Iterable[str]) -> Iterator[str]:
    """Documents with a blank line between each two."""
    return islice(chain.from_iterable((SEPARATOR, document) for document in documents), 1, None)


def token_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str] | Text, most: int | None = None
) -> Tensor:
    """The first `most` (None: all) tokens of all documents, joined by blank lines and tokenised once: int64 (tokens,).

    Special tokens are only those that the tokenizer adds to a text, once for the whole stream. Long texts are tokenised in
    pieces, with equal tokens.
    """
    pieces = documents.pieces(tokenizer) if isinstance(documents, Text) else joined(documents)
    return tokens_of(tokenizer, pieces, most)


def _plugin(source: str, argument: str) -> EntryPoint | None:
    """The entry point that reads `name` or `name:what`; None if no installed package has that name."""
    name = source.partition(":")[0]
    return SOURCES.point(name, argument)


def _plugin_documents(point: EntryPoint, source: str, argument: str) -> Iterator[str]:
    read = SOURCES.load(point, argument)
    documents = _stated(lambda: iter(read(source.partition(":")[2])), point, source, argument)
    for number in count(1):
        text = _stated(lambda: next(documents, END), point, source, argument)
        if text is END:
            return
        if not isinstance(text, str):
            raise broken(point, argument, f"gave a {type(text).__name__} as document {number}, expected a str")
        check_unicode(text, f"{argument}={source!r}, document {number}")
        yield text


def _stated(call: Callable[[], Any], point: EntryPoint, source: str, argument: str) -> Any:
    """The result of `call`, which is code of another package; its exceptions become one-line errors."""
    try:
        return call()
    except HalfplateError:
        raise
    # It can raise any exception.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise broken(point, argument, f"failed on {source!r} ({reason})") from error


def _hub_rows(source: str, argument: str) -> Iterator[tuple[str, Any]]:
    """The rows of the train split, until they hold MAX_HUB_CHARACTERS."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise HalfplateError(
            f"{argument}={source!r} is not a file here, and reading it as a Hub data set needs the package datasets; "
            "pip install 'halfplate[hub]' or pass a text file"
        ) from None
    name, _, config = source.partition(":")
    characters = 0
    try:
        for number, row in enumerate(load_dataset(name, config or None, split="train", streaming=True), start=1):
            if not any(key in row for key in ("text", "messages", "conversations")):
                raise HalfplateError(
                    f"{argument}={source!r} has no column 'text' (columns: {', '.join(row)}); pass a data set that has one, "
                    "or save it as JSON lines and name the field (FILE.jsonl:field)"
                )
            yield f"{argument}={source!r}, row {number}", row
            characters += len(row["text"]) if isinstance(row.get("text"), str) else len(str(row))
            if characters >= MAX_HUB_CHARACTERS:
                break
    except HalfplateError:
        raise
    # The library raises many exceptions (HTTP, missing configuration, file formats); all mean that there is no text.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HalfplateError(
            f"{argument}={source!r} is not a file here and could not be read as a Hub data set ({reason}); "
            "check the name (org/name:config) and the network, or pass a text file"
        ) from None
