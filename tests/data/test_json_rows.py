"""Rows are read as their files write them: what ``json`` says of a line is what is loaded, types included."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.data.json_files import json_table
from alignkit.data.json_values import JsonValue, dataset_of
from alignkit.data.load import load_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.errors import DataError
from tests.data.rows import message, pair

Write = Callable[..., str]
SUPERVISED = supervised_rows()


def exactly(rows: Sequence[Any]) -> list[str]:
    """As text, in which 1 is not 1.0 and an absent key is no null; columns that are null say nothing."""
    return sorted(json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows)


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": parameters}}}


def talk(answer: Any, **extra: Any) -> list[dict[str, Any]]:
    return [message("user", "2024-01-01"), {"role": "assistant", "content": answer, **extra}]


FILES = [
    [
        {"messages": talk("2024-01-10"), "tools": [tool("weather", city={"type": "string", "default": None})], "id": 1},
        {"messages": talk(None, tool_calls=[{"function": {"name": "f", "arguments": {"at": "2024-01-10T00:00:00Z"}}}])},
    ],
    [
        {"messages": talk("b", reasoning="hm"), "tools": [tool("add", left={"type": "integer", "minimum": 1})]},
        {"messages": talk("12:30"), "id": {"a": [1, "x"]}, "chat_template_kwargs": {"loud": True, "n": 1.0}},
        {"messages": talk([{"type": "text", "text": "part"}]), "tools": None, "id": 2.5},
    ],
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("way", ["one file", "two files", "a folder"])
def test_rows_keep_their_own_types(write_jsonl: Write, tmp_path: Path, way: str, streaming: bool) -> None:
    rows = [row for file in FILES for row in file]
    # A stream takes its columns from the first row of each file.
    first = [[{**dict.fromkeys(rows[3]), **file[0]}, *file[1:]] for file in FILES]
    if way == "one file":
        source: Any = write_jsonl("all.jsonl", [row for file in first for row in file])
    else:
        source = [write_jsonl(f"folder/train-{i}.jsonl", file) for i, file in enumerate(first)]
        source = str(tmp_path / "folder") if way == "a folder" else source
    loaded = load_rows(source, family=SUPERVISED, streaming=streaming)
    assert exactly(list(loaded)) == exactly([{k: v for k, v in row.items() if k != "id"} for row in rows])


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_and_dates_stay_what_they_are(write_jsonl: Write, streaming: bool) -> None:
    whole = [{"prompt": "q", "completions": ["2024-01-10", "b"], "scores": [1, 0]}] * 2
    other = [{"prompt": "q", "completions": ["12:00:00", "b"], "scores": [0.75, 0]}]
    sources = [write_jsonl("a.jsonl", whole), write_jsonl("b.jsonl", other)]
    assert exactly(list(load_rows(sources, streaming=streaming))) == exactly(whole + other)
    dates = [pair(f"2024-01-{10 + i}", "2024-01-10", "2023-01-10T00:00:00") for i in range(3)]
    assert list(load_rows(write_jsonl("c.jsonl", dates), streaming=streaming)) == dates


def test_a_column_may_change_its_type_far_into_a_file(write_jsonl: Write) -> None:
    rows: list[dict[str, Any]] = [pair(f"q{i}") for i in range(700)]
    rows[600] = pair(prompt=3, tools=[tool("f")])
    rows[650] = pair(prompt="half \ud83d of a pair", chosen=None)
    loaded = load_rows(write_jsonl("late.jsonl", rows))
    assert exactly(list(loaded)) == exactly(rows)
    assert [type(loaded.features[name]) for name in ("prompt", "tools")] == [JsonValue, JsonValue]


def test_a_changed_file_is_read_again(write_jsonl: Write) -> None:
    path = write_jsonl("data.jsonl", [pair("old")])
    assert list(load_rows(path)) == [pair("old")]
    state = os.stat(path)
    write_jsonl("data.jsonl", [pair("new")])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert list(load_rows(path)) == [pair("new")]


def test_a_stream_says_of_a_column_that_comes_late(write_jsonl: Write) -> None:
    path = write_jsonl("late.jsonl", [pair(f"q{i}") for i in range(80)] + [pair(tools=[tool("f")])])
    with pytest.raises(DataError, match=r"late.jsonl:81: column 'tools' is new here.*null in the first row"):
        list(load_rows(path, streaming=True))
    assert load_rows(path)[80]["tools"] == [tool("f")]


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_files_marks_and_line_ends(tmp_path: Path, streaming: bool) -> None:
    lines = "\ufeff" + "\r\n".join(json.dumps(pair(f"é{i}"), ensure_ascii=False) for i in range(3)) + "\r\n\r\n"
    plain, packed, hidden = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.json"
    plain.write_bytes(lines.encode())
    packed.write_bytes(gzip.compress(lines.encode()))
    hidden.write_bytes(gzip.compress(json.dumps([pair(f"é{i}") for i in range(3)], indent=1).encode()))
    for path in (plain, packed, hidden):
        assert list(load_rows(str(path), streaming=streaming)) == [pair(f"é{i}") for i in range(3)]
    packed.write_bytes(gzip.compress(lines.encode())[:-12])
    with pytest.raises(DataError, match="broken gzip archive"):
        list(load_rows(str(packed), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "q", "chosen": NaN, "rejected": "b"}', "NaN is not a number of JSON; write null"),
        ('{"prompt": "q", "chosen": -Infinity, "rejected": "b"}', "-Infinity is not a number"),
        ('{"prompt": "q", "chosen": 1e999, "rejected": "b"}', "1e999 is beyond the range"),
        ('{"prompt": "q", "prompt": "r"}', "key 'prompt' is there twice"),
        ('{"prompt": "q",}', "malformed JSON"),
        ('{"prompt": ' + "[" * 200_000, "malformed JSON"),
        ('["a"]', "got ['a']; write one JSON object a line"),
    ],
)
def test_strict_json(write_jsonl: Write, line: str, says: str, streaming: bool) -> None:
    path = write_jsonl("bad.jsonl", [pair(), line, pair()])
    with pytest.raises(DataError) as caught:
        list(load_rows(path, streaming=streaming))
    assert f"{path}:2: " in str(caught.value) and says in str(caught.value)


def test_faults_of_an_array_are_named_by_line_or_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for content, says in (('[{"prompt": "q"},\n{"a": }]', "rows.json:2: malformed"), ("[{}, 3]", "row 1 of the array")):
        path.write_text(content)
        with pytest.raises(DataError, match=says):
            load_rows(str(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_cell_may_be_long(tmp_path: Path, streaming: bool) -> None:
    rows = [pair("y" * 200_000), pair('"quoted",\nnext line')]
    pd.DataFrame(rows).to_csv(tmp_path / "long.csv", index=False)
    assert list(load_rows(str(tmp_path / "long.csv"), streaming=streaming)) == rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_messages_stored_as_json_text_are_messages(tmp_path: Path, ending: str, streaming: bool) -> None:
    rows = [pair(talk("q")[:1], [message("assistant", f"a{i}")], [message("assistant", "b")]) for i in range(3)]
    stored = pd.DataFrame([{name: json.dumps(value) for name, value in row.items()} for row in rows])
    path = tmp_path / f"stored.{ending}"
    if ending == "jsonl":
        stored.to_json(path, orient="records", lines=True)
    else:
        stored.to_csv(path, index=False) if ending == "csv" else stored.to_parquet(path)
    assert list(load_rows(str(path), streaming=streaming)) == rows
    # A prompt that asks about JSON is a prompt.
    texts = [pair('[{"role": "user"}] is what?'), pair("[1, 2]"), pair(json.dumps(rows[0]["prompt"]))]
    pd.DataFrame(texts).to_parquet(tmp_path / "texts.parquet")
    assert list(load_rows(str(tmp_path / "texts.parquet"), streaming=streaming)) == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_keys_that_a_typed_table_adds_are_left_out(tmp_path: Path, streaming: bool) -> None:
    rows = [row for file in FILES[:1] for row in file] + [
        {"messages": talk("b"), "tools": [tool("add", left={"n": 1})]}
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert Dataset.from_parquet(str(tmp_path / "rows.parquet"))[0]["tools"] != rows[0]["tools"], "the table adds keys"
    loaded = list(load_rows(str(tmp_path / "rows.parquet"), family=SUPERVISED, streaming=streaming))
    properties = [row["tools"][0]["function"]["parameters"]["properties"] for row in (loaded[0], loaded[2])]
    # A null of the row's own cannot be told from an added one.
    assert properties == [{"city": {"type": "string"}}, {"left": {"n": 1}}]
    assert loaded[1]["messages"][1]["tool_calls"] == rows[1]["messages"][1]["tool_calls"]


def test_rows_made_in_python_keep_their_types_too() -> None:
    rows = [{"a": "x", "b": [{"c": 1}]}, {"a": None, "b": [{"d": 1.5}], "e": "2024-01-10"}]
    table = dataset_of(rows)
    assert exactly(list(table)) == exactly(rows)
    assert exactly(list(table.to_iterable_dataset())) == exactly(table.map(lambda _: {})) == exactly(rows)


texts = st.one_of(st.text(max_size=8), st.sampled_from(["2024-01-10", "12:00", "1", "true", "null", "", "NaN"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
json_rows = st.lists(
    st.fixed_dictionaries(
        {"prompt": values, "chosen": values, "rejected": values},
        optional={"tools": values, "chat_template_kwargs": values, "unused": values},
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(first=json_rows, second=json_rows)
def test_any_json_comes_back_as_it_is(first: list[Any], second: list[Any]) -> None:
    """Whatever rows hold, the reader and ``json`` agree on every value and its type."""
    keep = ["prompt", "chosen", "rejected", "tools", "chat_template_kwargs"]
    expected = [json.dumps([row.get(name) for name in keep]) for row in first + second]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("first.jsonl", "second.jsonl")]
        for file, rows in zip(files, (first, second), strict=True):
            Path(file).write_text("\n".join(map(json.dumps, rows)))
        table, columns = json_table(files, keep, "data")
        assert [json.dumps([row.get(name) for name in keep]) for row in table] == expected
        assert set(columns) == {name for row in first + second for name in row}


def test_columns_stand_in_the_order_in_which_the_file_shows_them(write_jsonl: Write) -> None:
    """Whatever the hash of their names is: rows of twelve other keys each would be in order once in 12!."""
    names = [f"column {i}" for i in range(12)]
    table, columns = json_table([write_jsonl("rows.jsonl", [{name: "x"} for name in names])], None, "rows")
    assert table.column_names == columns == names
