"""The bytes of a data file, a block at a time, unpacked where it is compressed."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.errors import UserError

BLOCK_BYTES = 1 << 20
"""How much is read from a file at once."""

MAX_ROW_BYTES = 1 << 26
"""No row of text is longer than this: a quote that nobody closes must not bring a whole file into memory."""

MAX_LINE_BYTES = 1 << 30
"""A line that is longer is passed over no more: the file has none that end."""

MAX_RATIO, FREE_BYTES = 2000, 1 << 28
"""A compressed file may become so many times its size, and so many bytes whatever its size: more is no text."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Endings of compressed files, and what Arrow calls the compression."""

_PACKED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bz2": b"BZh"}
"""How compressed files begin."""

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file for reading, unpacked where its first bytes, or else its ending, say that it is compressed."""
    compression = _compression_of(path)
    raw = _Unpacked(path, compression) if compression else io.FileIO(path)
    return io.BufferedReader(raw, BLOCK_BYTES)


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file as they come from `open_bytes`, at most a block of them."""
    with open_bytes(path) as file:
        return file.read1(BLOCK_BYTES)


def is_packed(path: Path) -> bool:
    """Tell whether a file is compressed."""
    return _compression_of(path) is not None


def _compression_of(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(64)
    if found := next((name for name, sign in _PACKED.items() if head.startswith(sign)), None):
        return found
    # What a browser has unpacked on its way keeps its name.
    return None if head.lstrip()[:1] in (b"{", b"[") else COMPRESSIONS.get(path.suffix.lower())


def numbered_lines(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines, with their ends, and their numbers from 1 on; None for a line that is too long.

    Raises:
        UserError: The file is UTF-16, or its compression is damaged from some line on.
    """
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) < MAX_ROW_BYTES or line.endswith(b"\n"):
            yield number, without_mark(line, path) if number == 1 else line
            continue
        _pass_over_line(file, f"{path}:{number}")
        yield number, None


def _pass_over_line(file: io.BufferedReader, where: str) -> None:
    """Read on to the end of a line that is too long."""
    passed = MAX_ROW_BYTES
    while (line := file.readline(BLOCK_BYTES)) and not line.endswith(b"\n"):
        passed += len(line)
        if passed > MAX_LINE_BYTES:
            hint = "write one row per line, or a JSON list with the extension .json"
            raise UserError(f"the line has no end within {MAX_LINE_BYTES:,} bytes", where, hint)


def without_mark(start: bytes, path: Path) -> bytes:
    """Return the start of a file without its byte-order mark.

    Raises:
        UserError: It is the mark of UTF-16.
    """
    if start.startswith(_UTF_16):
        raise UserError("the file is UTF-16, not UTF-8", f"{path}:1", "save the file as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def too_long() -> str:
    """Say of a row that it is too long."""
    return f"the row is longer than {MAX_ROW_BYTES:,} bytes"


class _Unpacked(io.RawIOBase):
    """What a compressed file holds. Where it is damaged, everything before the damage is given out first."""

    _stream: Any = None
    _damage = ""

    def __init__(self, path: Path, compression: str) -> None:
        self._path, self._compression = path, compression
        self._num_given, self._line = 0, 1
        self._most = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
        self._open()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as one read goes, and return how far.

        Raises:
            UserError: The file is damaged here; it names the line that is not whole. Or it holds too much.
        """
        block = b"" if self._damage else self._read(len(buffer))
        if self._damage and not block:
            what = f"the compressed file is damaged: {self._damage}"
            raise UserError(what, f"{self._path}:{self._line}", "compress or download the file again")
        buffer[: len(block)] = block
        self._num_given += len(block)
        if self._num_given > self._most:
            what = f"the compressed file expands to more than {MAX_RATIO:,} times its size"
            hint = "if its text really is so repetitive, unpack it and name the extracted file"
            raise UserError(what, f"{self._path}:{self._line}", hint)
        self._line += block.count(b"\n")
        return len(block)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
        super().close()

    def _open(self) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(io.FileIO(self._path), self._compression)

    def _read(self, size: int) -> bytes:
        """Return the next bytes. A read that fails loses what it has unpacked, so that is unpacked again."""
        try:
            return bytes(self._stream.read(size))
        except OSError as error:
            # Arrow's own complaints have no number of the system's.
            if error.errno:
                raise
            self._damage = str(error).splitlines()[0]
        self._stream.close()
        self._open()
        for start in range(0, self._num_given, BLOCK_BYTES):
            self._stream.read(min(BLOCK_BYTES, self._num_given - start))
        return b"".join(self._bytes_to_damage())

    def _bytes_to_damage(self) -> Iterator[bytes]:
        """Yield byte after byte; a read of a single one loses nothing."""
        try:
            while byte := self._stream.read(1):
                yield byte
        except OSError as error:
            if error.errno:
                raise
