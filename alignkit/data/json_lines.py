"""Rows of JSON files, each exactly what its line says.

Files are strict JSON, read by Python's own parser: one object a line, or one array of objects; UTF-8 with or without a
byte order mark, any line ends, packed by gzip or zstd or not. What is wrong is said with file and line. No type is
guessed: "2024-01-10" stays a text, 1 stays 1, and a key that is absent stays absent.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from huggingface_hub import HfFileSystem

from alignkit.data.opened import (
    BROKEN,
    MOST_BETWEEN_ROWS,
    MOST_OF_A_LINE,
    Fault,
    beginning,
    broken_archive,
    opened,
    unpacked,
)
from alignkit.json_text import finite_number, no_number, unique_keys

MOST_OF_AN_ARRAY = 2**31
"""Bytes; an archive of a few kB may unpack to any number of them."""
_CHUNK_BYTES = 2**24
_EXPECTED = "write one JSON object a line, or one array of objects"


def read_json_rows(file: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Read a JSON Lines file, or a file that holds one JSON array; blank lines are skipped.

    Args:
        file: Path, or ``hf://`` address, of the file.

    Yields:
        Place of a row, and the row or what is wrong with it.
    """
    number = blank = 0
    try:
        with _opened(file) as stream:
            if beginning(stream)[:1] == b"[":
                yield from _whole_array(file, stream)
                return
            for number, line in enumerate(iter(lambda: stream.readline(MOST_OF_A_LINE + 1), b""), 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                blank = 0 if line.strip() else blank + len(line)
                if len(line) > MOST_OF_A_LINE or blank > MOST_BETWEEN_ROWS:
                    long = f"{max(len(line), blank):,} bytes without a row, and there may be more"
                    yield f"{file}:{number}", Fault(f"{file}:{number}: {long}; {_EXPECTED}")
                    return
                if not blank:
                    yield f"{file}:{number}", _parsed(file, number, line)
    except BROKEN as error:
        yield f"{file}:{number}", Fault(f"{file}:{number + 1}: {broken_archive(error)}")


def _opened(file: str) -> io.BufferedReader:
    if file.startswith("hf://"):
        return unpacked(io.BufferedReader(HfFileSystem().open(file, "rb")))
    return opened(file)


def _parsed(file: str, number: int, line: bytes) -> dict[str, Any] | Fault:
    """The object that a line says, or what is wrong with it."""
    try:
        text = line.decode()
        row = _decode(text)
    except UnicodeDecodeError as error:
        shown = line.decode(errors="replace")
        return Fault(
            f"{file}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line): {shown!r:.60}"
        )
    except (ValueError, RecursionError) as error:
        return _fault(file, number, text, error)
    return row if isinstance(row, dict) else Fault(f"{file}:{number}: got {row!r:.60}; {_EXPECTED}")


def _whole_array(file: str, stream: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """The rows of an array, which is read as a whole, unless an archive unpacks to more than that can be."""
    content = bytearray()
    while chunk := stream.read(_CHUNK_BYTES):
        content += chunk
        if len(content) > MOST_OF_AN_ARRAY:
            long = f"an array of more than {MOST_OF_AN_ARRAY:,} bytes is not read; write one JSON object a line"
            yield file, Fault(f"{file}: {long}, which is read line by line")
            return
    yield from _array_rows(file, content)


def _array_rows(file: str, content: bytearray) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
        rows = _decode(text)
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        yield file, Fault(f"{file}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the file)")
    except (ValueError, RecursionError) as error:
        number = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        yield file, _fault(file, number, text, error)
    else:
        for index, row in enumerate(rows):
            place = f"{file}: row {index} of the array"
            yield place, row if isinstance(row, dict) else Fault(f"{place}: got {row!r:.60}; {_EXPECTED}")


def _fault(file: str, number: int, text: str, error: Exception) -> Fault:
    if isinstance(error, json.JSONDecodeError):
        before, after = text[max(0, error.pos - 40) : error.pos], text[error.pos : error.pos + 20].rstrip("\n")
        return Fault(f"{file}:{number}: malformed JSON ({error.msg}) after {before!r}, at {after!r}; {_EXPECTED}")
    return Fault(f"{file}:{number}: malformed JSON ({error}): {text!r:.60}; {_EXPECTED}")


_decode = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=finite_number, parse_constant=no_number).decode
