"""Every kind of file, packed or not, under its own name or another, alone or in a folder, gives the same rows."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import csv, feather, ipc, parquet

from alignkit.config.data_files import _open_head
from alignkit.data.load import load_rows
from alignkit.data.opened import kind_of
from alignkit.data.supervised_schema import supervised_rows
from alignkit.errors import DataError

ROWS = [
    {"prompt": "2 + 2, so?", "completion": "007"},
    {"prompt": 'a "quote"\nand a line', "completion": "NA"},
    {"prompt": "é\tb; c", "completion": "日本"},
]
TABLE = pa.Table.from_pylist(ROWS)
FAMILY = supervised_rows()


def buffered(write: Callable[[Any], None]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def streamed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SEPARATED = {
    sign: buffered(lambda stream, sign=sign: csv.write_csv(TABLE, stream, csv.WriteOptions(delimiter=sign)))
    for sign in ",;\t"
}
CONTENT = {
    "jsonl": LINES,
    "ndjson": LINES,
    "json": json.dumps(ROWS, indent=1).encode(),
    "csv": SEPARATED[","],
    "tsv": SEPARATED["\t"],
    "parquet": buffered(lambda stream: parquet.write_table(TABLE, stream)),
    "feather": buffered(lambda stream: feather.write_feather(TABLE, stream, compression="uncompressed")),
    "arrow": streamed(TABLE),
}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: bytes(pa.Codec("zstd").compress(content))}
OTHERWISE = {
    "excel.csv": b"\xef\xbb\xbf" + SEPARATED[";"],
    "tabs.csv": SEPARATED["\t"],
    "commas.tsv": SEPARATED[","],
    "table.json": CONTENT["parquet"],
    "table.csv": CONTENT["feather"],
    "lines.csv": b"\xef\xbb\xbf\n" + LINES,
    "array.tsv": CONTENT["json"],
    "packed.jsonl": gzip.compress(LINES),
    "packed.jsonl.gz": PACK[".zst"](LINES),
    "LOUD.CSV": SEPARATED[","],
    "numbered.csv": b",prompt,completion,\r\n"
    + b"".join(
        b'%d,"%s",%s,\r\n' % (i, row["prompt"].replace('"', '""').encode(), row["completion"].encode())
        for i, row in enumerate(ROWS)
    ),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("ending", CONTENT)
def test_a_file_of_any_kind(tmp_path: Path, ending: str, packed: str) -> None:
    path = tmp_path / f"rows.{ending}{packed}"
    path.write_bytes(PACK[packed](CONTENT[ending]))
    assert list(load_rows(str(path), family=FAMILY)) == ROWS
    assert list(load_rows(str(path), family=FAMILY, streaming=True)) == ROWS
    head = _open_head(str(path), "train")
    assert head is not None and list(head.rows) == ROWS and list(head.columns) == list(ROWS[0])


@pytest.mark.parametrize("name", OTHERWISE)
def test_content_decides_where_a_name_cannot_be_right(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(OTHERWISE[name])
    assert list(load_rows(str(tmp_path / name), family=FAMILY)) == ROWS
    head = _open_head(str(tmp_path / name), "train")
    assert head is not None and list(head.rows) == ROWS


def test_a_folder_may_hold_several_kinds_in_splits(tmp_path: Path) -> None:
    for name in ("train-a.jsonl", "train-b.csv.zst", "train-c.parquet", "test.tsv", "train-d.arrow.gz"):
        ending, _, packed = name.partition(".")[2].partition(".")
        (tmp_path / name).write_bytes(PACK[packed and f".{packed}"](CONTENT[ending]))
    (tmp_path / "notes.txt").write_text("not rows")
    for streaming in (False, True):
        assert list(load_rows(str(tmp_path), family=FAMILY, streaming=streaming)) == ROWS * 4
        assert list(load_rows(str(tmp_path), family=FAMILY, split="test", streaming=streaming)) == ROWS


def test_a_typed_table_in_a_mixture_keeps_each_row_its_own_keys(tmp_path: Path) -> None:
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    other = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "g", "arguments": {"b": "x"}}}]}]
    rows = [{"messages": calls, "at": pa.scalar(0, pa.timestamp("s")).as_py()}, {"messages": other, "at": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "typed.parquet")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"messages": calls}) + "\n")
    found = [row["messages"] for row in load_rows(str(tmp_path), family=FAMILY)]
    assert found == [calls, calls, other]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("comma.csv", b"prompt,completion\na,b\nc,d, e\n", ":3: 3 cells, and the header names 2 columns; put a text"),
        ("short.csv", b"prompt,completion\na,b\n\nc\n", ":4: 1 cells, and the header names 2 columns"),
        ("quote.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', ":3: malformed CSV (a quote is opened and never closed)"),
        ("inside.csv", b'prompt,completion\n"a "b" c",d\n', ":2: malformed CSV (',' expected after '\"'); put a text"),
        ("latin.csv", "prompt,completion\na,b\nc,é\n".encode("cp1252"), ":3: not UTF-8 text"),
        ("twice.csv", b"prompt,prompt\na,b\n", ":1: several columns are called prompt; rename all but one"),
        ("cut.csv.gz", gzip.compress(SEPARATED[","])[:-12], "broken gzip archive"),
        ("cut.jsonl.zst", PACK[".zst"](LINES * 99)[:-9], "broken zstd archive (Truncated compressed stream)"),
        ("bad.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "broken zstd archive"),
        ("cut.parquet.gz", gzip.compress(CONTENT["parquet"][:-9]), "no parquet file"),
        ("words.arrow.gz", gzip.compress(b"hello, world"), "no arrow file"),
        ("table.jsonl", SEPARATED[","], ":1: no JSON, but a line like the header of a table"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    for streaming in (False, True):
        with pytest.raises(DataError) as refused:
            list(load_rows(str(tmp_path / name), family=FAMILY, streaming=streaming))
        assert says in str(refused.value) and name in str(refused.value)


def test_every_line_of_a_table_that_is_wrong_is_counted(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("prompt,completion\n" + "a,b\nc\n" * 5)
    with pytest.raises(DataError, match="2 more malformed lines"):
        load_rows(str(tmp_path / "bad.csv"), family=FAMILY)


def test_a_name_that_is_right_is_believed(tmp_path: Path) -> None:
    held = {"jsonl": "json", "ndjson": "json", "tsv": "csv", "feather": "arrow"}
    for ending, content in CONTENT.items():
        (tmp_path / f"a.{ending}").write_bytes(content)
        assert kind_of(tmp_path / f"a.{ending}") == held.get(ending, ending)
    (tmp_path / "list.csv").write_bytes(b'[1],"{a}"\n')
    assert kind_of(tmp_path / "list.csv") == "csv"
