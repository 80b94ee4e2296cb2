"""Rows that are there twice, the other way round, or in training and held-out rows alike, judged by their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidate_report import ConversionReport
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.checks import Limits
from alignkit.data.repeats import count_repeats, fingerprints
from alignkit.data.report import DataReport, data_report
from alignkit.data.split_report import Check
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.tokenization import CANDIDATE_FEATURES
from alignkit.errors import DataError
from tests.data.rows import message, pair

TWICE = "no row is there twice"
CONTRADICT = "no two rows contradict each other"
HELD_OUT = "held-out rows are not trained on"
FIT = "rows fit max_length"

Candidates = dict[str, Any]


@st.composite
def candidate_rows(draw: st.DrawFn) -> list[Candidates]:
    """Rows of few tokens, so that prompts, answers and whole rows meet again."""
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        completions = draw(st.lists(st.sampled_from([[1], [2], [3], [1, 2]]), min_size=2, max_size=4))
        scores = sorted(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4)), reverse=True)
        prompt = draw(st.sampled_from([[7], [8], [8, 1]]))
        rows.append({"prompt_ids": prompt, "completion_ids": completions, "scores": scores[: len(completions)]})
    return rows


def content(row: Candidates) -> tuple[Any, ...]:
    return tuple(
        sorted((tuple(row["prompt_ids"] + ids), s) for ids, s in zip(answers(row), row["scores"], strict=True))
    )


def answers(row: Candidates) -> list[list[int]]:
    return row["completion_ids"]


def preferences(row: Candidates) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every (better, worse) that a row states."""
    ordered = [(tuple(row["prompt_ids"] + ids), s) for ids, s in zip(answers(row), row["scores"], strict=True)]
    return {(a, b) for (a, s), (b, r) in combinations(ordered, 2) if s > r and a != b}


def prints_of(rows: Sequence[Candidates]) -> Any:
    table = Dataset.from_list(list(rows), features=CANDIDATE_FEATURES)
    return fingerprints(table, lambda part: ConversionReport.contents(None, part))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(rows=candidate_rows(), trained=candidate_rows())
def test_counts_are_those_of_comparing_all_rows(rows: list[Candidates], trained: list[Candidates]) -> None:
    found = count_repeats(prints_of(rows), prints_of(trained))
    assert found.num_duplicates == sum(n - 1 for n in Counter(map(content, rows)).values())
    stated = set().union(*map(preferences, rows))
    assert found.num_contradictions == sum(any((b, a) in stated for a, b in preferences(row)) for row in rows)
    sequences = {tuple(row["prompt_ids"] + ids) for row in trained for ids in answers(row)}
    on = [any(tuple(row["prompt_ids"] + ids) in sequences for ids in answers(row)) for row in rows]
    prompts = [row["prompt_ids"] for row in trained]
    assert found.num_trained_on == sum(on)
    assert found.first_trained_on == (on.index(True) if any(on) else None)
    assert found.num_prompts_trained_on == sum(
        r["prompt_ids"] in prompts and not o for r, o in zip(rows, on, strict=True)
    )


def test_more_rows_than_a_batch() -> None:
    rows = [{"prompt_ids": [i, i + 1], "completion_ids": [[i], [0]], "scores": [1.0, 0.0]} for i in range(1, 2600)]
    swapped = [{**rows[40], "completion_ids": rows[40]["completion_ids"][::-1]}]
    found = count_repeats(prints_of(rows + rows[:30] + swapped), prints_of(rows[2500:]))
    assert (found.num_duplicates, found.num_contradictions) == (30, 2)
    assert (found.num_trained_on, found.first_trained_on) == (99, 2500)


def report(
    tokenizer: Any, train: Sequence[Any], held_out: Sequence[Any] = (), *, limits: Limits | None = None, **options: Any
) -> DataReport:
    options = {"max_length": None, "num_candidates": 2, **options}
    splits = {"train": train} | ({"held-out": held_out} if held_out else {})
    converted = {
        name: to_candidate_rows(Dataset.from_list(list(rows)), tokenizer, name=name, **options)
        for name, rows in splits.items()
    }
    return data_report(converted, tokenizer, limits=limits)


def check_of(found: DataReport, name: str, split: str = "train") -> Check:
    (check,) = [check for check in found.checks[split] if check.name == name]
    return check


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [pair(f"{i} + 1?", f"{i + 1}", f"{i + 2}") for i in range(start, start + count)]


def test_duplicates_warn_above_a_share(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = numbered(20)
    assert check_of(report(tokenizer, rows), TWICE).status == "ok"
    few = check_of(report(tokenizer, rows + rows[:1]), TWICE)
    assert few.status == "ok" and few.message.startswith("1 row (4.8%) repeats an earlier one")
    assert few.title == "repeated rows", "which holds for what is found, whatever it is"
    many = check_of(report(tokenizer, rows + rows[:2]), TWICE)
    assert many.status == "warn" and "2 rows (9.1%)" in many.message


def test_swapped_copies_of_a_pair_warn(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = numbered(20)
    assert check_of(report(tokenizer, rows), CONTRADICT).status == "ok"
    swapped = [pair(row["prompt"], row["rejected"], row["chosen"]) for row in rows[:3]]
    check = check_of(report(tokenizer, rows + swapped), CONTRADICT)
    assert check.status == "warn" and check.message.startswith("6 rows (26.1%)")
    lists = [
        {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 2, 1]},
        {"prompt": "q", "completions": ["c", "d", "b"], "scores": [3, 2, 1]},
    ]
    assert check_of(report(tokenizer, lists, num_candidates=None), CONTRADICT).message.startswith("2 rows (100.0%)")


def test_held_out_rows_that_are_trained_on_are_refused_unless_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    rows, others = numbered(20), numbered(10, 50)
    report(tokenizer, rows, others).raise_for_failures()
    found = report(tokenizer, rows, [*others, rows[3]])
    check = check_of(found, HELD_OUT, "held-out")
    assert check.status == "fail" and "1 of 11 (9.1%)" in check.message and "'3 + 1?'" in check.message
    assert found.repeats["held-out"].first_trained_on == 10
    with pytest.raises(DataError, match="write allow_overlap: true"):
        found.raise_for_failures()
    allowed = report(tokenizer, rows, [*others, rows[3]], limits=Limits(allow_overlap=True))
    allowed.raise_for_failures()
    assert check_of(allowed, HELD_OUT, "held-out").status == "warn"


def test_the_same_row_in_another_form_is_the_same_row(tokenizer: PreTrainedTokenizerFast) -> None:
    """A list of two and a pair, with the prompt in a column and in the answers: the tokens are what is compared."""
    rows = numbered(4)
    lists = [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [2, 7]} for r in rows]
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    for again in (lists, implicit):
        assert check_of(report(tokenizer, rows, again), HELD_OUT, "held-out").message.startswith("4 of 4")


def test_a_prompt_trained_on_with_other_answers_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = numbered(20)
    asked = [pair(row["prompt"], "yes", "no") for row in rows[:2]]
    few = check_of(report(tokenizer, rows, [*numbered(40, 50), *asked]), HELD_OUT, "held-out")
    assert few.status == "ok" and "2 rows have a prompt that is trained on with other answers" in few.message
    assert check_of(report(tokenizer, rows, asked), HELD_OUT, "held-out").status == "warn"


def test_rows_equal_only_after_truncation_are_equal(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("1:", f"2 3 4 5 6 7 8 9 {end}", "9 8") for end in ("a", "b")]
    assert report(tokenizer, rows).repeats["train"].num_duplicates == 0
    assert report(tokenizer, rows, max_length=8).repeats["train"].num_duplicates == 1


def test_supervised_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    def converted(rows: Sequence[Any], name: str) -> Any:
        return to_supervised_rows(Dataset.from_list(list(rows)), tokenizer, max_length=None, name=name)

    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(10)]
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows]
    other = [{"prompt": rows[0]["prompt"], "completion": " 7"}]
    for held_out, status, counts in (
        (rows[:1], "fail", (1, 0)),
        (other, "warn", (0, 1)),
        ([{"prompt": "x", "completion": "y"}], "ok", (0, 0)),
    ):
        found = data_report({"train": converted(rows * 2, "train"), "held-out": converted(held_out, "eval")}, tokenizer)
        assert check_of(found, TWICE).message.startswith("10 rows (50.0%)")
        assert check_of(found, HELD_OUT, "held-out").status == status
        repeats = found.repeats["held-out"]
        assert (repeats.num_trained_on, repeats.num_prompts_trained_on) == counts
    talk = [{"messages": [message("user", "2 + 2?"), message("assistant", "4")]}]
    for train, held_out in ((texts, texts[2:3]), (talk, talk)):
        found = data_report({"train": converted(train, "train"), "held-out": converted(held_out, "eval")}, tokenizer)
        assert check_of(found, HELD_OUT, "held-out").status == "fail"


def test_of_a_stream_the_first_rows_are_compared(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = numbered(100)
    options: Any = {"max_length": None, "num_candidates": 2}
    stream = to_candidate_rows(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, **options)
    for held_out, status in ((rows[5:6], "fail"), (rows[90:91], "ok")):
        given_ = to_candidate_rows(Dataset.from_list(held_out), tokenizer, name="held-out", **options)
        found = data_report({"train": stream, "held-out": given_}, tokenizer)
        check = check_of(found, HELD_OUT, "held-out")
        assert check.status == status and "in the first rows alone, as the rows are streamed" in check.message
        assert "as the rows are streamed" in check_of(found, TWICE).message


def test_rows_cut_beyond_the_share_allowed_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    long = [pair(f"{i}:", f"{i} 2 3 4 5 6 7 8 9", f"{i} 9 8 7 6 5 4 3 2") for i in range(4)]
    cut = report(tokenizer, long, max_length=8)
    with pytest.raises(DataError, match=r"4 of 4 rows \(100.0%\) are cut at 8 tokens, max_truncated_fraction 0.5"):
        cut.raise_for_failures()
    assert "max_length 64 holds 95 %" in check_of(cut, FIT).message
    # Two of eight are cut: below the default share, and above one of 0.2.
    rows = [*long[:2], *numbered(6)]
    for share, status in ((0.5, "warn"), (0.25, "warn"), (0.2, "fail"), (0.0, "fail")):
        found = report(tokenizer, rows, max_length=12, limits=Limits(max_truncated_fraction=share))
        assert check_of(found, FIT).status == status, share
    report(tokenizer, long, max_length=8, limits=Limits(max_truncated_fraction=1)).raise_for_failures()
    texts = Dataset.from_list([{"text": "1 2 3 4 5 6 7 8 9 "}] * 3)
    supervised = to_supervised_rows(texts, tokenizer, max_length=8)
    assert check_of(data_report({"train": supervised}, tokenizer), FIT).status == "fail"
