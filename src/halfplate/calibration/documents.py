"""Text from files and Hub data sets, and its tokens as one stream."""

import gzip
import json
import re
import zlib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfplate import plugins
from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
# A text is tokenised whole, in memory; a small compressed file may also unpack to any size.
MAX_FILE_BYTES = 256 * 2**20
# A Hub data set may be of any size and is read from its beginning: this much gives millions of tokens.
MAX_HUB_CHARACTERS = 32 * 2**20
# Blank line between documents: what WikiText perplexity is customarily measured with (GPTQ, SparseGPT, Wanda).
SEPARATOR = "\n\n"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def check_source(source: str, argument: str = "calibration") -> None:
    """Raise HalfplateError where `source` names a file or a plugin that is not there; Hub names are taken on trust."""
    if _plugin(source, argument) is not None:
        return
    path = Path(source).expanduser()
    if source.lower().endswith(SUFFIXES):
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise HalfplateError(f"{argument}={source!r} {what}, expected a text file; check the path")
    elif path.exists() and source != "self":
        raise HalfplateError(
            f"{argument}={source!r} is not a text file that Halfplate reads; expected a name ending in {', '.join(SUFFIXES)}"
        )
    elif not HUB_NAME.fullmatch(source):
        raise HalfplateError(
            f"{argument}={source!r} does not exist; expected a {', '.join(SUFFIXES)} file or a Hub data set such as org/name:config"
        )


def check_unicode(text: str, where: str) -> None:
    """Raise HalfplateError where `text` holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HalfplateError(
            f"{where} holds {text[error.start]!r} at character {error.start}, which is no Unicode text; remove it"
        ) from None


def read_text(source: str, argument: str = "calibration") -> list[str]:
    """The documents of `source`: a file, what a plugin reads, or the field `text` of the train split of a Hub data set.

    A `.txt` or `.txt.gz` file is one document; a `.jsonl` or `.jsonl.gz` file has one a line, in its field `text`
    (which may be empty). A Hub data set is named `org/name` or `org/name:config` and needs halfplate[hub]; its first
    32 Mi characters are read. Other installed packages add sources, `name` or `name:what` (docs/extending.md). argument: the name that error messages give `source`.
    Raises HalfplateError for a file that is missing, damaged, not UTF-8 or beyond 256 MiB, for lines without text
    (naming the line), and for data sets that cannot be read.
    """
    check_source(source, argument)
    point = _plugin(source, argument)
    if point is not None:
        return _read_plugin(point, source, argument)
    if source.lower().endswith(SUFFIXES):
        return _read_file(source, Path(source).expanduser(), argument)
    return _read_hub(source, argument)


def token_stream(tokenizer: "PreTrainedTokenizerBase", documents: list[str]) -> Tensor:
    """The tokens of all documents, joined by blank lines and tokenised once: int64 (tokens,).

    Special tokens are those that the tokenizer itself adds to a text, once for the whole stream.
    """
    ids = tokenizer(SEPARATOR.join(documents), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _plugin(source: str, argument: str) -> EntryPoint | None:
    """The entry point that reads `name` or `name:what`, None where no installed package has that name."""
    name = source.partition(":")[0]
    return plugins.find(plugins.CALIBRATION, name, argument, own=name == "self")


def _read_plugin(point: EntryPoint, source: str, argument: str) -> list[str]:
    read = plugins.load(point, argument)
    try:
        documents = list(read(source.partition(":")[2]))
    except HalfplateError:
        raise
    # The code of another package fails in ways of its own.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise plugins.broken(point, argument, f"failed on {source!r} ({reason})") from error
    for number, text in enumerate(documents, start=1):
        if not isinstance(text, str):
            raise plugins.broken(point, argument, f"gave a {type(text).__name__} as document {number}, expected a str")
        check_unicode(text, f"{argument}={source!r}, document {number}")
    return documents


def _read_file(source: str, path: Path, argument: str) -> list[str]:
    content = _read_bytes(source, path, argument)
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        # Lines end in \n alone: JSON strings may hold the other characters that Python takes for line ends.
        rows = enumerate(content.split(b"\n"), start=1)
        return [_row_text(source, number, row, argument) for number, row in rows if row.strip()]
    try:
        return [content.decode("utf-8")]
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise HalfplateError(
            f"{argument}={source!r}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _read_bytes(source: str, path: Path, argument: str) -> bytes:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            content: bytes = file.read(MAX_FILE_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise HalfplateError(
            f"{argument}={source!r} is cut short or not gzip ({error}); download or pack it again"
        ) from None
    except OSError as error:
        raise HalfplateError(
            f"{argument}={source!r} cannot be read ({error.strerror}); check its permissions"
        ) from None
    if len(content) > MAX_FILE_BYTES:
        raise HalfplateError(
            f"{argument}={source!r} holds more than {MAX_FILE_BYTES // 2**20} MiB of text, far beyond what is used; pass its first part"
        )
    return content


def _row_text(source: str, number: int, row: bytes, argument: str) -> str:
    where = f"{argument}={source!r}, line {number}"
    try:
        entry = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise HalfplateError(f"{where} is not valid JSON ({error}); expected an object with a field 'text'") from None
    if not isinstance(entry, dict):
        raise HalfplateError(f"{where} holds a {type(entry).__name__}, expected an object with a field 'text'")
    if not isinstance(entry.get("text"), str):
        known = ", ".join(map(repr, list(entry)[:8])) or "none"
        raise HalfplateError(f"{where} has no string in field 'text' (fields: {known}); rename the field to 'text'")
    text: str = entry["text"]
    check_unicode(text, where)
    return text


def _read_hub(source: str, argument: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise HalfplateError(
            f"{argument}={source!r} is no file here, and reading it as a Hub data set needs the package datasets; "
            "pip install 'halfplate[hub]' or pass a text file"
        ) from None
    name, _, config = source.partition(":")
    documents: list[str] = []
    characters = 0
    try:
        for row in load_dataset(name, config or None, split="train", streaming=True):
            text = row.get("text")
            if not isinstance(text, str):
                raise HalfplateError(
                    f"{argument}={source!r} has no column 'text' (columns: {', '.join(row)}); pass a data set that has one"
                )
            documents.append(text)
            characters += len(text)
            if characters >= MAX_HUB_CHARACTERS:
                break
    except HalfplateError:
        raise
    # The library raises errors of many kinds (HTTP, missing configuration, file formats); each means no text.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HalfplateError(
            f"{argument}={source!r} is no file here and could not be read as a Hub data set ({reason}); "
            "check the name (org/name:config) and the network, or pass a text file"
        ) from None
    return documents
