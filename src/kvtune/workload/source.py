"""A file the user named, as text lines: plain or gzip, streamed, bounded, every fault with its line."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import IO, Final

from kvtune.errors import InputFileError

__all__ = ["Source"]

MAX_LINE_BYTES: Final = 32 * 2**20
"""Eight million tokens of text; decoded JSON can take 30 times as much memory."""
MAX_EXPANSION: Final = 100
"""Decompressed bytes per stored byte. Real traces reach 5 to 30; DEFLATE can reach 1032."""
FREE_EXPANSION_BYTES: Final = 32 * 2**20
"""Below this size the ratio does not matter: a small file may be very regular."""
_PIECE_BYTES: Final = 1 << 18
_MAX_BLANK_LINES: Final = 100_000
"""In a row; reading them one by one is slow, and no writer of requests leaves so many."""

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Source:
    """One regular file. Construction checks that it can be read; iterating streams it.

    Raises InputFileError for a missing or unreadable file, a directory or device, an empty or binary
    file, damaged gzip data, an expansion beyond the bound, and a line over `max_line_bytes`.
    """

    path: Path
    max_line_bytes: int = MAX_LINE_BYTES
    max_expansion: int = MAX_EXPANSION
    free_expansion_bytes: int = FREE_EXPANSION_BYTES
    progress: Callable[[float], None] | None = None
    """Told the share of the stored bytes that was read, once per MiB of text."""
    size: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise InputFileError(f"{self.path}: no such file; name an existing workload file") from None
        except (OSError, ValueError) as error:
            raise InputFileError(f"{self.path}: cannot be read: {_reason(error)}") from error
        if stat.S_ISDIR(status.st_mode):
            raise InputFileError(f"{self.path}: is a folder; name a workload file in it")
        if not stat.S_ISREG(status.st_mode):
            raise InputFileError(f"{self.path}: is not a regular file; save the workload to a file first")
        if status.st_size == 0:
            raise InputFileError(f"{self.path}: is empty; a workload needs at least one request")
        object.__setattr__(self, "size", status.st_size)

    def sha256(self) -> str:
        """Hex digest of the bytes as stored (compressed, if compressed)."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputFileError(f"{self.path}: cannot be read: {_reason(error)}") from error

    def first_character(self) -> str:
        """The first character that is not white space, "" if there is none."""
        for _, text in self.lines():
            return text.lstrip()[0]
        return ""

    def lines(self, *, keep_blank: bool = False) -> Iterator[tuple[int, str]]:
        """(line number from 1, text without its end) of every line; blank ones only if asked for."""
        number = num_blank = 0
        try:
            with self.path.open("rb") as stored:
                file, total = self._unpacked(stored), 0
                while raw := file.readline(self.max_line_bytes + 1):
                    number += 1
                    total += len(raw)
                    self._check_bounds(number, len(raw), total)
                    self._tell(stored, total, len(raw))
                    text = self._decode(raw, number)
                    is_blank = not text or text.isspace()
                    num_blank = num_blank + 1 if is_blank else 0
                    if num_blank > _MAX_BLANK_LINES:
                        raise InputFileError(
                            f"{self.path}, line {number}: more than {_MAX_BLANK_LINES} blank lines in a row; "
                            "this is no file of requests"
                        )
                    if keep_blank or not is_blank:
                        yield number, text
        except (OSError, EOFError, zlib.error) as error:
            raise InputFileError(f"{self.path}, line {number + 1}: {_reason(error)}") from error

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(number of the line it lies in, text with line ends) from start to end, in pieces of a bounded
        size: for a JSON list, which may be one long line."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        number, total = 1, 0
        try:
            with self.path.open("rb") as stored:
                file = self._unpacked(stored)
                while raw := file.readline(_PIECE_BYTES):
                    total += len(raw)
                    self._check_bounds(number, 0, total)
                    self._tell(stored, total, len(raw))
                    yield number, self._decode_piece(decoder, raw, number)
                    number += raw.endswith(b"\n")
                self._decode_piece(decoder, b"", number, is_last=True)
        except (OSError, EOFError, zlib.error) as error:
            raise InputFileError(f"{self.path}, line {number}: {_reason(error)}") from error

    def _unpacked(self, stored: BufferedReader) -> IO[bytes]:
        if stored.peek(2).startswith(_GZIP_MAGIC):
            return io.BufferedReader(gzip.GzipFile(fileobj=stored, mode="rb"), 1 << 20)
        return stored

    def _tell(self, stored: BufferedReader, total: int, added: int) -> None:
        if self.progress is not None and total >> 20 != (total - added) >> 20:
            self.progress(min(1.0, stored.tell() / self.size))

    def _check_bounds(self, number: int, line_bytes: int, total: int) -> None:
        if line_bytes > self.max_line_bytes:
            raise InputFileError(
                f"{self.path}, line {number}: longer than {self.max_line_bytes} bytes; "
                "write one request per line"
            )
        if total > self.free_expansion_bytes and total > self.max_expansion * self.size:
            raise InputFileError(
                f"{self.path}, line {number}: expands to more than {self.max_expansion} times its size; "
                "decompress it yourself if this is meant"
            )

    def _decode(self, raw: bytes, number: int) -> str:
        self._refuse_binary(raw, number)
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            raise self._not_text(number, where) from None
        return text.rstrip("\r\n")

    def _decode_piece(
        self, decoder: codecs.IncrementalDecoder, raw: bytes, number: int, *, is_last: bool = False
    ) -> str:
        self._refuse_binary(raw, number)
        try:
            return decoder.decode(raw, is_last)
        except UnicodeDecodeError as error:
            raise self._not_text(number, f"byte 0x{error.object[error.start]:02x}") from None

    def _refuse_binary(self, raw: bytes, number: int) -> None:
        if b"\0" in raw:
            raise InputFileError(
                f"{self.path}, line {number}: holds NUL bytes, so this is a binary file; "
                "give JSON, JSONL or CSV text, plain or gzip"
            )

    def _not_text(self, number: int, where: str) -> InputFileError:
        return InputFileError(
            f"{self.path}, line {number}: not UTF-8 text ({where}); "
            "give JSON, JSONL or CSV text, plain or gzip"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return f"damaged gzip data ({error}); get the file again"
    text = getattr(error, "strerror", None) or str(error)
    return f"cannot be read: {text}" if isinstance(error, OSError) else text
