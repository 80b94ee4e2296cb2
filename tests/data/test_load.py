"""Sources are read whatever their format; what cannot be read is named by file, line and text."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from alignkit.data.load import load_rows, parse_sources, split_held_out
from alignkit.errors import DataError
from tests.data.rows import message, pair

Write = Callable[..., str]
PAIRS = [pair(f"q{i}") for i in range(6)]


def message_of(sources: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(load_rows(sources, **options))
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str, streaming: bool) -> None:
    path = tmp_path / f"data.{ending}"
    table = Dataset.from_list(PAIRS)
    if ending == "jsonl":
        table.to_json(path)
    elif ending == "json":
        path.write_text(json.dumps(PAIRS, indent=2))
    elif ending == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path)
    assert list(load_rows(str(path), streaming=streaming)) == PAIRS


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_with_splits(write_jsonl: Write, tmp_path: Path, streaming: bool) -> None:
    write_jsonl("folder/train.jsonl", PAIRS)
    write_jsonl("folder/test.jsonl", PAIRS[:2])
    folder = str(tmp_path / "folder")
    assert list(load_rows(folder, split="test", streaming=streaming)) == PAIRS[:2]
    assert list(load_rows({"path": folder, "split": "test"}, streaming=streaming)) == PAIRS[:2]
    text = message_of(folder, split="tset", streaming=streaming)
    assert "tset" in text and "['train', 'test']" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_written_by_save_to_disk(tmp_path: Path, streaming: bool) -> None:
    table = Dataset.from_list(PAIRS)
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "both")
    assert list(load_rows(str(tmp_path / "one"), streaming=streaming)) == PAIRS
    assert list(load_rows(str(tmp_path / "both"), split="test", streaming=streaming)) == PAIRS[:1]
    assert "unknown split 'dev'; the folder has: train, test" in message_of(str(tmp_path / "both"), split="dev")


def test_csv_cells_stay_text_and_lists_are_json(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("prompt,chosen,rejected\n1,007,NA\n")
    assert list(load_rows(str(pairs))) == [pair("1", "007", "NA")]
    lists = tmp_path / "lists.csv"
    lists.write_text('prompt,completions,scores\nq,"[""a"", ""b""]","[1, 0.5]"\n')
    for streaming in (False, True):
        assert list(load_rows(str(lists), streaming=streaming)) == [
            {"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 0.5]}
        ]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_text(lists.read_text())
    assert list(load_rows(str(folder))) == list(load_rows(str(lists)))
    lists.write_text('prompt,completions,scores\nq,"a; b","[1, 0]"\n')
    text = message_of(str(lists))
    assert "row 0: completions is not a list written as JSON: 'a; b'" in text and '["first", "second"]' in text


@pytest.mark.parametrize("streaming", [False, True])
def test_malformed_json_is_named_by_line_and_text(write_jsonl: Write, streaming: bool) -> None:
    path = write_jsonl("bad.jsonl", [PAIRS[0], "", '{"prompt": "a", "chosen": "b" "rejected": "c"}', PAIRS[1]])
    text = message_of(path, streaming=streaming)
    assert f"{path}:3: malformed JSON" in text
    assert '"chosen": "b"' in text and "at '\"rejected" in text


def test_all_malformed_lines_are_counted(write_jsonl: Write) -> None:
    text = message_of(write_jsonl("bad.jsonl", [PAIRS[0]] + ["{oops"] * 5))
    assert text.count("malformed JSON") == 3
    assert "2 more malformed lines" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fault_far_into_a_stream_is_named_too(write_jsonl: Write, streaming: bool) -> None:
    path = write_jsonl("late.jsonl", [pair(f"q{i}") for i in range(300)] + ["[1, 2]"])
    assert f"{path}:301: " in message_of(path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("header.csv", b"prompt,chosen,rejected\n", "header alone"),
        ("numbers.jsonl", b"1\n2\n", "numbers.jsonl:1: got 1; write one JSON object a line"),
        ("latin.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "latin.jsonl:1: not UTF-8 text"),
        ("table.parquet", b"hello", "table.parquet: cannot be read"),
        ("notes.txt", b"hello", "ends in '.txt'; expected one of .jsonl, .json, .parquet, .csv"),
        ("empty.json", b"[]", "no row"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, expected: str, streaming: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in message_of(str(tmp_path / name), streaming=streaming)


def test_paths_that_lead_nowhere(write_jsonl: Write, tmp_path: Path) -> None:
    path = write_jsonl("preferences.jsonl", PAIRS)
    assert f"did you mean {path!r}?" in message_of(str(tmp_path / "preference.jsonl"))
    assert "does not exist" in message_of(str(tmp_path / "nowhere" / "deep" / "x.jsonl"))
    (tmp_path / "nothing").mkdir()
    assert "holds no file ending in" in message_of(str(tmp_path / "nothing"))


def test_hub_id_that_cannot_be_reached() -> None:
    text = message_of("somebody/preferences")
    assert "the Hub cannot be reached" in text and "HF_HUB_OFFLINE" in text


def test_column_map(write_jsonl: Write) -> None:
    path = write_jsonl("other.jsonl", [{"question": "q", "good": "a", "bad": "b", "chosen": "old"}])
    column_map = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    for streaming in (False, True):
        assert list(load_rows(path, column_map=column_map, streaming=streaming)) == [pair("q", "a", "b")]
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert list(load_rows(write_jsonl("swap.jsonl", PAIRS[:1]), column_map=swapped)) == [pair("q0", "bad", "good")]
    text = message_of(path, column_map={"prompt": "questin", "winner": "good"})
    assert "Did you mean 'question'?" in text and "'winner' is not a column of ours" in text
    assert "'good' is given 2 of our names" in message_of(path, column_map={"chosen": "good", "rejected": "good"})


def test_unused_columns_are_dropped_and_mentioned(write_jsonl: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl("extra.jsonl", [pair(margin=3, id="x", tools=None)])
    with caplog.at_level(logging.WARNING):
        assert sorted(next(iter(load_rows(path)))) == ["chosen", "prompt", "rejected", "tools"]
    assert "columns not used and dropped: margin, id" in caplog.text


def test_token_rewards_are_columns_of_ours(write_jsonl: Write, caplog: pytest.LogCaptureFixture) -> None:
    rewards = {"chosen_token_rewards": [0.5, 1.0], "rejected_token_rewards": [0.0]}
    path = write_jsonl("rewards.jsonl", [pair(**rewards)])
    renamed = write_jsonl("renamed.jsonl", [pair(good=[0.5, 1.0], bad=[0.0])])
    column_map = {"chosen_token_rewards": "good", "rejected_token_rewards": "bad"}
    with caplog.at_level(logging.WARNING):
        for streaming in (False, True):
            assert list(load_rows(path, streaming=streaming)) == [pair(**rewards)]
            assert list(load_rows(renamed, column_map=column_map, streaming=streaming)) == [pair(**rewards)]
    assert caplog.text == ""
    text = message_of([path, write_jsonl("plain.jsonl", PAIRS)])
    assert "rows of different forms" in text and "pairs, explicit prompt, token rewards" in text
    # Neither required nor guessed at: a list without scores is told of its scores.
    lists = message_of(write_jsonl("list.jsonl", [{"prompt": "q", "completions": ["a", "b"], "rewards": [1, 0]}]))
    assert "column 'scores' is missing. Did you mean 'rewards'?" in lists and "1 problem" in lists


def test_max_rows_and_slices(write_jsonl: Write) -> None:
    path = write_jsonl("data.jsonl", PAIRS)
    assert list(load_rows(path, max_rows=2)) == list(load_rows(path, max_rows=2, streaming=True)) == PAIRS[:2]
    assert list(load_rows(path, max_rows=100)) == PAIRS
    assert list(load_rows(path, split="train[:50%]")) == PAIRS[:3]
    assert "set max_rows" in message_of(path, split="train[:50%]", streaming=True)


@pytest.fixture
def two_files(write_jsonl: Write) -> tuple[str, str]:
    """Ten rows with whole scores and thirty with fractions: their column types differ."""
    rows = lambda letter, n, top: [  # noqa: E731
        {"prompt": f"{letter}{i}", "completions": ["x", "y"], "scores": [top, 0]} for i in range(n)
    ]
    return write_jsonl("a.jsonl", rows("a", 10, 1)), write_jsonl("b.jsonl", rows("b", 30, 0.5))


def letters(rows: Any) -> Counter[str]:
    return Counter(row["prompt"][0] for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_mixture_without_weights_has_every_row_once(two_files: tuple[str, str], streaming: bool) -> None:
    rows = list(load_rows(two_files, streaming=streaming, seed=1))
    assert letters(rows) == {"a": 10, "b": 30}
    assert len({row["prompt"] for row in rows}) == 40
    assert {row["scores"][0] for row in rows} == {1, 0.5}
    assert set(letters(rows[:10])) == {"a", "b"}, "shuffled or interleaved, not one after the other"


def test_weights_are_shares_and_no_row_repeats(two_files: tuple[str, str]) -> None:
    sources = [{"path": path, "weight": weight} for path, weight in zip(two_files, (2, 1), strict=True)]
    rows = list(load_rows(sources, seed=1))
    assert letters(rows) == {"a": 10, "b": 5}
    assert len({row["prompt"] for row in rows}) == 15
    assert rows == list(load_rows(sources, seed=1))
    assert rows != list(load_rows(sources, seed=2))


def test_rounding_loses_no_row(write_jsonl: Write) -> None:
    # 50 and 60 rows in shares 5/11 and 6/11: in floating point the second count comes out just under 60.
    sources = [
        {"path": write_jsonl(f"{weight}.jsonl", [pair(f"{weight}{i}") for i in range(10 * weight)]), "weight": weight}
        for weight in (5, 6)
    ]
    assert letters(load_rows(sources)) == {"5": 50, "6": 60}


def test_streamed_weights_end_with_the_first_source_used_up(two_files: tuple[str, str]) -> None:
    sources = [{"path": path, "weight": weight} for path, weight in zip(two_files, (3, 1), strict=True)]
    rows = list(load_rows(sources, streaming=True, seed=1))
    counts = letters(rows)
    assert counts["a"] == 10 and 0 < counts["b"] < 10
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_sources_that_do_not_fit_together(write_jsonl: Write, two_files: tuple[str, str]) -> None:
    pairs = write_jsonl("pairs.jsonl", PAIRS)
    text = message_of([two_files[0], pairs])
    assert "different forms" in text and "standard candidate lists" in text and "standard pairs" in text
    talks = [message("user", "q")], [message("assistant", "a")], [{"role": "assistant", "content": "b", "name": "x"}]
    # Messages with a key more, and a column that is null throughout, do fit.
    first = write_jsonl("first.jsonl", [pair(*talks, tools=None)])
    second = write_jsonl("second.jsonl", [pair(talks[0], talks[1], talks[1], tools="[]")])
    for files in ([first, second], [second, first]):
        rows = {row["rejected"][0]["content"]: row for row in load_rows(files)}
        assert (rows["b"]["tools"], rows["a"]["tools"]) == (None, "[]")
        assert rows["b"]["rejected"] == talks[2] and rows["a"]["rejected"] == talks[1]
    # A column of texts in one source and of numbers in the other is left to the checks of rows, which name the row.
    other = write_jsonl("numbers.jsonl", [pair(prompt=3), pair(prompt=4)])
    assert sorted(row["prompt"] for row in load_rows([pairs, other]) if row["prompt"] in (3, 4)) == [3, 4]


def test_problems_of_all_sources_come_together(write_jsonl: Write) -> None:
    text = message_of([write_jsonl("a.jsonl", ["{"]), write_jsonl("b.jsonl", [{"prompt": "q", "chosen": "c"}])])
    assert "a.jsonl:1: malformed" in text and "column 'rejected' is missing" in text


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([], "no source is given"),
        ([{"pth": "x"}], "unknown key 'pth'"),
        ([{"path": 3}], "path must be"),
        ([{"path": "x", "weight": 0}], "weight must be above 0"),
        ([{"path": "x", "weight": 1}, "y"], "every source a weight, or none"),
    ],
)
def test_sources_that_make_no_sense(sources: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse_sources(sources)


def test_held_out_rows_share_no_prompt_with_the_others() -> None:
    rows = [pair(f"q{i % 25}", chosen=f"c{i}") for i in range(100)]
    train, held_out = split_held_out(Dataset.from_list(rows), 0.2, seed=3)
    assert len(train) + len(held_out) == 100 and 16 <= len(held_out) <= 24
    assert not set(train["prompt"]) & set(held_out["prompt"])
    again = split_held_out(Dataset.from_list(rows), 0.2, seed=3)
    assert again[1]["chosen"] == held_out["chosen"]
    assert split_held_out(Dataset.from_list(rows), 0.2, seed=4)[1]["chosen"] != held_out["chosen"]


def test_held_out_of_other_forms_and_errors() -> None:
    implicit = Dataset.from_list([{"chosen": f"q{i} a", "rejected": f"q{i} b"} for i in range(4)])
    assert len(split_held_out(implicit, 0.5, seed=0)[1]) == 2
    tokens = Dataset.from_list([{"prompt_ids": [i], "completion_ids": [[1], [2]]} for i in range(4)])
    assert len(split_held_out(tokens, 0.25, seed=0)[1]) == 1
    with pytest.raises(DataError, match="leaves one part empty"):
        split_held_out(Dataset.from_list([pair(), pair()]), 0.5, seed=0)
    with pytest.raises(DataError, match="streamed rows cannot be split"):
        split_held_out(tokens.to_iterable_dataset(), 0.5, seed=0)
