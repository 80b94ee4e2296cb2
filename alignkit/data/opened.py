"""Files that hold rows, opened whatever they are packed by, and told apart by their content where it must be."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from pathlib import Path
from typing import Any, cast

from alignkit.data.paths import FORMATS, format_of

MOST_OF_A_LINE = 2**26
MOST_BETWEEN_ROWS = 2**20
"""Bytes; an archive of a few kB may unpack to any number of them."""
_START = 1 << 10
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Fault(str):
    """What is wrong with a line, and where it is."""


class BrokenZstd(EOFError):
    """A zstd archive that cannot be unpacked."""


BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)
"""What reading from an archive that is cut off or damaged raises."""


def broken_archive(error: BaseException) -> str:
    """What an error of ``BROKEN`` says, for a message.

    Args:
        error: The error.
    """
    kind = "zstd" if isinstance(error, BrokenZstd) else "gzip"
    return f"broken {kind} archive ({error}); copy the file again"


def opened(file: str) -> io.BufferedReader:
    """The unpacked bytes of a file.

    Args:
        file: Path.
    """
    return unpacked(open(file, "rb"))


def unpacked(packed: io.BufferedReader) -> io.BufferedReader:
    """The bytes of a stream, unpacked where its first bytes say that gzip or zstd packed it, whatever it is called."""
    start = packed.peek(4)
    if start.startswith(_GZIP):
        return io.BufferedReader(cast(Any, gzip.open(packed)))
    return io.BufferedReader(_Unzstd(packed)) if start.startswith(_ZSTD) else packed


def beginning(stream: io.BufferedReader) -> bytes:
    """The first bytes that are neither white space nor a byte order mark; the stream stays where it is."""
    return stream.peek(_START)[:_START].removeprefix(codecs.BOM_UTF8).lstrip()


def kind_of(file: Path) -> str:
    """What a file holds, ``json``, ``csv``, ``parquet`` or ``arrow``: what its name says, unless its content cannot be.

    Args:
        file: A file whose name ends in one of ``FORMATS``.
    """
    named, found = format_of(file), ending_of(file)
    if found in (".parquet", ".arrow"):
        return FORMATS[found]
    return "json" if named == "csv" and found in (".json", ".jsonl") else named


def ending_of(file: Path) -> str:
    """The ending that the content of a file calls for, or nothing where that is not clear.

    Args:
        file: A file of any name.
    """
    try:
        with opened(str(file)) as stream:
            raw, start = stream.peek(_START)[:8], beginning(stream)
    except BROKEN:
        return ""
    header = next(iter(start.splitlines()), b"")
    signs = {
        ".parquet": raw.startswith(b"PAR1"),
        ".arrow": raw.startswith(b"ARROW1"),
        ".jsonl": start.startswith(b"{"),
        ".json": start[:1] == b"[" and start[1:].lstrip()[:1] == b"{",
        ".csv": (start[:1].isalpha() or start[:1] == b'"') and any(sign in header for sign in (b",", b"\t", b";")),
    }
    return next((ending for ending, holds in signs.items() if holds), "")


class _Unzstd(io.RawIOBase):
    """The unpacked bytes of a zstd archive, by pyarrow, of which alignkit has need in any case."""

    def __init__(self, packed: io.BufferedReader) -> None:
        import pyarrow

        self._packed = packed
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._stream.read(len(buffer))
        except OSError as error:
            raise BrokenZstd(str(error)) from error
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._packed.close()
        super().close()
