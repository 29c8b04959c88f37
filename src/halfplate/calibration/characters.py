"""Reading the characters of a text file in blocks: detects the encoding, normalises line ends, and reports the position of damage."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from halfplate.errors import HalfplateError

# Longest byte-order marks first, because that of UTF-32 (little endian) begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
BLOCK_BYTES = 2**18


def unix_lines(text: str) -> str:
    r"""`text` with \n instead of \r\n and \r."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def characters(path: Path, where: str, most_bytes: int) -> Iterator[str]:
    r"""The text of a file, or of a gzip file, in blocks; at most `most_bytes` bytes are read.

    UTF-8, or UTF-16 or UTF-32 with a byte-order mark. The mark is not part of the text, and \r\n and \r become \n.

    where: the beginning of error messages, such as `text='a.txt'`.
    Raises HalfplateError for a file that cannot be read, is damaged, is too large, or is not text, naming the line and the byte
    offset.
    """
    blocks = _blocks(path, where, most_bytes)
    first = next(blocks, b"")
    mark, encoding = next(((mark, name) for mark, name in MARKS if first.startswith(mark)), (b"", "utf-8"))
    decoder = codecs.getincrementaldecoder(encoding)()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    offset, lines = len(mark), 1  # position of the next block: bytes before it, and its line
    for block in _with_end(first[len(mark) :], blocks):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = offset - pending + error.start
            before = _decoded_before(error, encoding)
            line = lines + line_ends.decode(before).count("\n")
            raise HalfplateError(
                f"{where}, line {line}: byte 0x{error.object[error.start]:02x} at offset {place} is not "
                f"{encoding.upper()}; save the file as UTF-8"
            ) from None
        text = line_ends.decode(text, final=not block)
        if "\0" in text:
            line = lines + text.count("\n", 0, text.index("\0"))
            raise HalfplateError(
                f"{where}, line {line}: character U+0000 is not text (UTF-16 without a byte-order mark?); save the file as UTF-8"
            )
        offset += len(block)
        lines += text.count("\n")
        if text:
            yield text


def _with_end(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Non-empty blocks, and then an empty one."""
    if first:
        yield first
    yield from blocks
    yield b""


def _decoded_before(error: UnicodeDecodeError, encoding: str) -> str:
    return error.object[: error.start].decode(encoding, "replace")


def _blocks(path: Path, where: str, most_bytes: int) -> Iterator[bytes]:
    """The uncompressed bytes of the file in non-empty blocks."""
    done = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while block := file.read(min(BLOCK_BYTES, most_bytes + 1 - done)):
                done += len(block)
                if done > most_bytes:
                    raise HalfplateError(
                        f"{where} holds more than {most_bytes // 2**20} MiB of text, more than is ever used; pass its first part"
                    )
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise HalfplateError(f"{where} is cut short or not gzip ({error}); download or pack it again") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise HalfplateError(f"{where} cannot be read ({reason}); check its permissions") from None
