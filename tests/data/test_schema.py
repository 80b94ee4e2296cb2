"""Every form is recognised, every kind of bad row is named, and a good row is left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from trl import extract_prompt

from alignkit.data.columns import nearest_name
from alignkit.data.schema import (
    RowKind,
    describe_problems,
    detect_kind,
    row_problems,
    shorten,
    split_shared_prefix,
)
from alignkit.errors import DataError
from tests.data.rows import forms, message, pair

PAIRS = RowKind(lists=False, conversational=False)
TALKS = RowKind(lists=False, conversational=True)
IMPLICIT = RowKind(lists=False, conversational=False, prompt="implicit")
LISTS = RowKind(lists=True, conversational=False)
USER = [message("user", "q")]
GOOD, BAD = [message("assistant", "good")], [message("assistant", "bad")]


def listed(completions: Any = ("a", "b", "c"), scores: Any = (1.0, 0.5, 0.0), prompt: Any = "q") -> dict[str, Any]:
    as_list = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    return {"prompt": prompt, "completions": as_list(completions), "scores": as_list(scores)}


def detect(row: dict[str, Any], num_candidates: int | None = None) -> RowKind:
    return detect_kind(list(row), [row], name="rows", num_candidates=num_candidates)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (pair(), PAIRS),
        (pair(USER, GOOD, BAD), TALKS),
        ({"chosen": "q good", "rejected": "q bad"}, IMPLICIT),
        ({"chosen": USER + GOOD, "rejected": USER + BAD}, RowKind(False, True, "implicit")),
        (pair("q", USER + GOOD, USER + BAD), RowKind(False, True, "repeated")),
        (pair(USER, "good", "bad"), RowKind(False, True, text_completions=True)),
        (listed(), LISTS),
        (listed((GOOD, BAD), (1, 0), USER), RowKind(True, True)),
        (listed(("good", "bad"), (1, 0), USER), RowKind(True, True, text_completions=True)),
        (pair(margin=3), PAIRS),
    ],
)
def test_forms_are_recognised_and_their_rows_are_fine(row: dict[str, Any], kind: RowKind) -> None:
    assert detect(row) == kind
    assert row_problems(row, kind) == []


def test_a_null_in_the_first_row_does_not_decide() -> None:
    assert detect_kind(list(pair()), [pair(None, None), pair(USER, GOOD, BAD)], name="rows") == TALKS


def test_the_method_decides_when_both_forms_are_there() -> None:
    row = pair() | listed()
    assert not detect(row, num_candidates=2).lists
    assert detect(row, num_candidates=None).lists


def test_a_list_without_scores_beside_pairs_is_a_pair() -> None:
    assert detect(pair(completions=["x", "y"])) == PAIRS


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "choosen", "rejected"], ["'chosen' is missing", "column_map: {chosen: choosen}"]),
        (["query", "preferred", "loser"], ["{prompt: query}", "{chosen: preferred}", "{rejected: loser}"]),
        (["prompt", "responses", "ratings"], ["{completions: responses}", "{scores: ratings}"]),
        (["prompt", "completions"], ["'scores' is missing", "'prompt', 'completions'"]),
        (["completions", "scores"], ["'prompt' is missing"]),
        (["prompt", "completion"], ["this method compares two or more: write method: sft"]),
        (["text"], ["'chosen' is missing", "'rejected' is missing", "Columns present: 'text'"]),
    ],
)
def test_missing_columns_are_named_with_the_nearest(columns: list[str], expected: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        detect_kind(columns, [dict.fromkeys(columns, "x")], name="my.jsonl")
    assert str(caught.value).startswith("my.jsonl: ")
    for text in expected:
        assert text in str(caught.value)


def test_a_prompt_under_another_name_is_not_mistaken_for_no_prompt() -> None:
    row = {"question": "q", "chosen": "The dog", "rejected": "The cat"}
    with pytest.raises(DataError, match=r"column_map: \{prompt: question\}"):
        detect(row)
    # Whole conversations hold their prompt, whatever other columns say.
    assert detect(row | {"chosen": USER + GOOD, "rejected": USER + BAD}).prompt == "implicit"


def test_text_prompt_with_answers_as_messages_is_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match='write the prompt as messages too: \\[{"role": "user"'):
        detect(pair("q", GOOD, BAD))


BAD_ROWS = [
    (pair(None), PAIRS, "prompt is null"),
    (pair(""), PAIRS, "prompt is empty"),
    (pair(" \n"), PAIRS, "prompt is empty"),
    (pair(7), PAIRS, "prompt is int, expected text"),
    (pair(chosen=None), PAIRS, "chosen is null"),
    (pair(rejected=""), PAIRS, "rejected is empty"),
    (pair(chosen=["x"]), PAIRS, "chosen is list, expected text"),
    ({"chosen": "abc", "rejected": "xyz"}, IMPLICIT, "share no beginning"),
    ({"chosen": " abc", "rejected": " xyz"}, IMPLICIT, "share no beginning"),
    ({"chosen": GOOD, "rejected": BAD}, RowKind(False, True, "implicit"), "share no beginning"),
    (pair("q", GOOD, BAD), TALKS, "prompt is str, expected a list of messages"),
    (pair([], GOOD, BAD), TALKS, "prompt is empty"),
    (pair(["q"], GOOD, BAD), TALKS, "prompt holds str"),
    (pair([{"content": "q"}], GOOD, BAD), TALKS, "prompt has a message without role"),
    (pair([{"role": None, "content": "q"}], GOOD, BAD), TALKS, "prompt has a message without role"),
    (pair([{"role": "user"}], GOOD, BAD), TALKS, "prompt has a message without content"),
    (pair([{"from": "human", "value": "q"}], GOOD, BAD), TALKS, "prompt has a message without role"),
    (pair(USER, [message("assistant", " ")], BAD), TALKS, "chosen ends in an empty message"),
    (listed("ab"), LISTS, "completions is str, expected a list"),
    (listed(None), LISTS, "completions is NoneType, expected a list"),
    (listed(scores=1.0), LISTS, "scores is float, expected a list"),
    (listed(("a",), (1,)), LISTS, "fewer than 2 completions"),
    (listed((), ()), LISTS, "fewer than 2 completions"),
    (listed(("a", "b"), (1, 0, 0)), LISTS, "differ in number"),
    (listed(("a", ""), (1, 0)), LISTS, "a completion is empty"),
    (listed(("a", None), (1, 0)), LISTS, "a completion is null"),
    (listed(("a", 3), (1, 0)), LISTS, "a completion is int"),
    (listed(scores=(1, math.nan, 0)), LISTS, "a score is NaN or infinite"),
    (listed(scores=(1, math.inf, 0)), LISTS, "a score is NaN or infinite"),
    (listed(scores=(1, None, 0)), LISTS, "a score is not a number"),
    (listed(scores=(1, "0", 0)), LISTS, "a score is not a number"),
]


@pytest.mark.parametrize(
    ("row", "kind", "expected"), BAD_ROWS, ids=[f"{e}-{i}" for i, (_, _, e) in enumerate(BAD_ROWS)]
)
def test_bad_rows_are_fatal(row: dict[str, Any], kind: RowKind, expected: str) -> None:
    problems = row_problems(row, kind)
    assert any(expected in problem.kind for problem in problems), problems
    assert all(problem.fatal for problem in problems)


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        (pair("q", "same", "same"), PAIRS, "identical"),
        (listed(("x", "x"), (1, 0)), LISTS, "identical"),
        (listed(scores=(2, 2, 2)), LISTS, "all scores are equal"),
    ],
)
def test_rows_without_a_preference_are_not_fatal(row: dict[str, Any], kind: RowKind, expected: str) -> None:
    (problem,) = row_problems(row, kind)
    assert expected in problem.kind
    assert not problem.fatal


def test_true_and_false_are_scores() -> None:
    assert row_problems(listed(("a", "b"), (True, False)), LISTS) == []


def test_a_tool_call_stands_for_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert row_problems(pair(USER, [call], BAD), TALKS) == []


def test_all_problems_of_a_row_are_found() -> None:
    kinds = [problem.kind for problem in row_problems(listed(("a", ""), (math.nan, 0, 1), ""), LISTS)]
    assert [kind.split(":")[0] for kind in kinds] == [
        "prompt is empty",
        "completions and scores differ in number",
        "a completion is empty",
        "a score is NaN or infinite",
    ]


def test_a_pair_method_refuses_longer_lists_and_names_the_way_out() -> None:
    assert row_problems(listed(("a", "b"), (1, 0)), LISTS, num_candidates=2) == []
    (problem,) = row_problems(listed(), LISTS, num_candidates=2)
    assert "takes exactly 2" in problem.kind and "the best and the worst" in problem.kind
    assert problem.shown == "3 completions"


def test_problems_are_grouped_with_a_count_and_three_examples() -> None:
    found = [(number, problem) for number in range(5, 10) for problem in row_problems(pair(f"q{number}", ""), PAIRS)]
    found += [(20, problem) for problem in row_problems(pair(3), PAIRS)]
    first, second = describe_problems(found)
    assert (
        first == "chosen is empty: it needs at least one character\n     5 rows: row 5: ''; row 6: ''; row 7: ''; ..."
    )
    assert second.endswith("1 row: row 20: 3")


@pytest.mark.parametrize("form", ["standard_implicit", "conversational_implicit"])
def test_shared_beginning_is_trl_s(form: str) -> None:
    for row in forms()[form]:
        prompt, chosen, rejected = split_shared_prefix(row["chosen"], row["rejected"])
        assert {"prompt": prompt, "chosen": chosen, "rejected": rejected} == extract_prompt(row)
        assert prompt + chosen == row["chosen"]


@pytest.mark.parametrize(("chosen", "rejected"), [("abc", "abcdef"), ("say yes", "say no"), ("a b c", "a d c")])
def test_shared_beginning_of_texts_is_trl_s(chosen: str, rejected: str) -> None:
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert split_shared_prefix(chosen, rejected) == tuple(expected.values())


def test_long_values_are_cut_in_the_middle() -> None:
    assert shorten("short") == "'short'"
    cut = shorten("a" * 500 + "end")
    assert len(cut) <= 60 and cut.startswith("'aaa") and cut.endswith("end'")


def test_nearest_name() -> None:
    assert nearest_name("chosen", ["id", "choosen"]) == "choosen"
    assert nearest_name("scores", ["ratings", "id"]) == "ratings"
    assert nearest_name("chosen", ["id", "text"]) is None
