"""A mixture's report: rows and tokens of every source, counted here over each source alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows
from alignkit.data.report import data_report
from alignkit.data.sources import SOURCE_COLUMN, SourceCounts
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from tests.data.rows import pair

Write = Callable[[str, Sequence[Any]], str]
SHORT = [pair(f"{i}:", f"{i}", f"{i + 1}") for i in range(12)] + [pair("same:", "a", "a")]
LONG = [pair(f"{i} and {i}:", f"{i} " * 30, f"{i} " * 9) for i in range(10, 16)]
LIMIT = 40


def alone(path: str, tokenizer: Any) -> SourceCounts:
    rows, report = to_candidate_rows(
        load_rows(path), tokenizer, max_length=LIMIT, num_candidates=2, max_dropped_fraction=0.5
    )
    trained = sum(len(ids) for row in rows for ids in row["completion_ids"])
    return SourceCounts(path, report.num_rows_in, len(rows), trained + sum(map(len, rows["prompt_ids"])), trained)


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_preference_mixture(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, streaming: bool) -> None:
    paths = [write_jsonl("short.jsonl", SHORT), write_jsonl("long.jsonl", LONG)]
    mixed = load_rows(paths, streaming=streaming, name_sources=True)
    rows, report = to_candidate_rows(mixed, tokenizer, max_length=LIMIT, num_candidates=2)
    expected = sorted((alone(path, tokenizer) for path in paths), key=lambda source: -source.num_tokens)
    assert list(report.sources) == expected and [source.name for source in expected] == paths[::-1]
    assert report.ignored_columns == () and SOURCE_COLUMN not in rows.column_names
    text = data_report({"train": (rows, report)}, tokenizer).render()
    share = expected[0].num_trained_tokens / sum(source.num_trained_tokens for source in expected)
    (line,) = [line for line in text.splitlines() if line.startswith(f"train: {paths[1]} ")]
    assert line.split()[-5:] == [
        "6",
        "6",
        f"{expected[0].num_tokens}",
        f"{expected[0].num_trained_tokens}",
        f"{share:.1%}",
    ]


def test_supervised_mixture_of_two_splits_of_one_source(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write) -> None:
    family = supervised_rows()
    path = write_jsonl("rows.jsonl", [{"prompt": f"{i}:", "completion": f" {i}"} for i in range(10)])
    sources = [{"path": path, "split": "train[:4]"}, {"path": path, "split": "train[4:]"}]
    mixed = load_rows(sources, family=family, name_sources=True)
    _, report = to_supervised_rows(mixed, tokenizer, max_length=None)
    assert {(source.name, source.num_rows) for source in report.sources} == {
        (f"{path} train[:4]", 4),
        (f"{path} train[4:]", 6),
    }
    assert sum(source.num_tokens for source in report.sources) == report.num_tokens
    assert sum(source.num_trained_tokens for source in report.sources) == report.num_trained_tokens


def test_rows_of_one_source_are_not_listed(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write) -> None:
    loaded = load_rows(write_jsonl("short.jsonl", SHORT), name_sources=True)
    _, report = to_candidate_rows(loaded, tokenizer, max_length=None, num_candidates=2)
    assert report.sources == () and SOURCE_COLUMN not in load_rows([write_jsonl("a.jsonl", SHORT)] * 2).column_names
