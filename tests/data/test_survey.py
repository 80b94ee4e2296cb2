"""Rows as text: each form to prompt and answers, and numbers that a run's own conversion must come to as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from alignkit.data import languages
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.conversion import MalformedRows, watched_counts
from alignkit.data.plain_rows import PlainRow, plain_row
from alignkit.data.prompts import to_prompt_rows
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.survey import LengthBias, cuts, histogram, row_lengths, spread, survey_rows
from alignkit.errors import DataError
from tests.data import rows as forms_of_pairs
from tests.data.rows import message
from tests.data.test_supervised import forms as supervised_forms

USER, BOT = message("user", "q"), message("assistant", "a")
ROWS = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, PlainRow("q", ("a", "b"), (1.0, 0.0))),
    ({"chosen": [USER, BOT], "rejected": [USER, message("assistant", "b")]},
     PlainRow("user: q", ("assistant: a", "assistant: b"), (1.0, 0.0))),
    ({"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, message("assistant", "b")]},
     PlainRow("user: q", ("assistant: a", "assistant: b"), (1.0, 0.0))),
    ({"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 3, 2.5]},
     PlainRow("q", ("b", "c", "a"), (3.0, 2.5, 1.0))),
    ({"prompt": [USER], "completion": [BOT]}, PlainRow("user: q", ("assistant: a",), None)),
    ({"prompt": "q", "completion": "a", "label": False}, PlainRow("q", ("a",), (0.0,))),
    ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, PlainRow("q", ("ab",), None)),
    ({"messages": [USER, BOT, USER]}, PlainRow("user: q", ("assistant: a\nuser: q",), None)),
    ({"text": "t"}, PlainRow("", ("t",), None)),
    ({"prompt": [message("user", [{"type": "text", "text": "q"}])], "answer": 3}, PlainRow("user: q", (), None)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "plain"), ROWS, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_every_form_as_text(row: dict[str, Any], plain: PlainRow) -> None:
    assert plain_row(row) == plain


@pytest.mark.parametrize(
    ("row", "script"),
    [
        ({"prompt": "How many apples are left?", "chosen": "7", "rejected": "8"}, "latin"),
        ({"prompt": "2+2=", "completion": "четыре"}, "cyrillic"),
        ({"prompt": "2+2=", "completion": "4"}, languages.NONE),
        ({"messages": [message("user", "да"), message("assistant", "нет")]}, "cyrillic"),
        ({"prompt": "w " * 2000, "completion": "да" * 600}, "cyrillic"),
        ({"text": "да"}, "cyrillic"),
    ],
    ids=["prompt", "answer", "none", "without who says it", "beginnings of both", "text"],
)
def test_the_script_is_that_of_prompt_and_answer(row: dict[str, Any], script: str) -> None:
    survey, _ = survey_rows(Dataset.from_list([row]), repeats_earlier=np.zeros(1, dtype=bool))
    assert survey.scripts == {script: 1}


CONVERTERS = {
    "pairs": (forms_of_pairs.forms()["conversational"], to_candidate_rows, {"num_candidates": 2}, "max_length"),
    "messages": (supervised_forms()["messages"], to_supervised_rows, {}, "max_length"),
    "prompts": (Dataset.from_dict({"prompt": forms_of_pairs.QUESTIONS}), to_prompt_rows, {}, "max_prompt_length"),
}


@pytest.mark.parametrize("form", CONVERTERS)
def test_what_a_limit_would_do_is_what_it_does(tokenizer: Any, form: str) -> None:
    rows, convert, options, key = CONVERTERS[form]
    with watched_counts() as counted:
        convert(rows, tokenizer, **{key: 4096}, **options)
    convert(rows, tokenizer, **{key: 4096}, **options)
    assert len(counted) == 1, "what comes later is not watched"
    seen = set()
    for cut in cuts(counted[0], 64):
        try:
            _, report = convert(rows, tokenizer, **{key: cut.max_length}, **options, max_dropped_fraction=1.0)
        except DataError as error:
            # Not one row is left, and the headline counts them.
            assert f"{cut.num_dropped} of {len(rows)} rows are dropped" in str(error)
            continue
        assert (cut.num_cut, cut.num_dropped) == (report.num_truncated_rows, report.num_dropped)
        seen.add((cut.num_cut, cut.num_dropped))
    assert len(seen) > 1
    assert row_lengths(counted[0]).max() == max(values["max"] for values in report.lengths.values())


def test_malformed_rows_are_told_apart_from_those_without_preference(tokenizer: Any) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": b} for b in ("b", "a", "")]
    with pytest.raises(MalformedRows) as caught:
        to_candidate_rows(Dataset.from_list(rows), tokenizer, max_length=None, num_candidates=2)
    assert {(row, problem.fatal) for row, problem in caught.value.rows} == {(1, False), (2, True)}


def test_the_longer_answer_is_the_better_one() -> None:
    """8 of 10, whose interval Wilson's formula gives as 0.4902 to 0.9433; rows of equal lengths tell nothing."""
    rows = [{"prompt": "q", "chosen": "a" * n, "rejected": "b"} for n in (2, 3, 4, 5, 6, 7, 8, 9, 1)]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b" * n} for n in (2, 3)]
    survey, _ = survey_rows(Dataset.from_list(rows), repeats_earlier=np.zeros(len(rows), bool))
    assert survey.bias is not None
    assert survey.bias == LengthBias(10, 8, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert survey.labels == {"2 answers": 11} and survey.scores == {}
    assert survey.lengths["best answer"]["max"] == 9 and survey.lengths["prompt"]["min"] == 1


def test_labels_and_scores_are_counted() -> None:
    rows = [{"prompt": "q", "completion": "abc"[: n + 1], "label": n < 2} for n in range(3)]
    survey, _ = survey_rows(Dataset.from_list(rows), repeats_earlier=np.zeros(3, bool))
    assert survey.labels == {"label 0": 1, "label 1": 2} and survey.bias is None
    assert survey.lengths["answer of label 0"]["max"] == 3 and survey.lengths["answer of label 1"]["max"] == 2
    lists = [{"prompt": "q", "completions": ["a", "b", "c"], "scores": [5.0, 1.0, 3.0]}]
    assert survey_rows(Dataset.from_list(lists), repeats_earlier=np.zeros(1, bool))[0].scores["50 %"] == 3.0


def test_small_helpers() -> None:
    assert histogram(np.array([0, 15, 16, 40, 64])) == [
        ("0 to 15", 2), ("16 to 31", 1), ("32 to 63", 1), ("64 to 127", 1),
    ]  # fmt: skip
    assert spread(5, 3) == [0, 2, 4] and spread(2, 9) == [0, 1] and spread(0, 3) == []
