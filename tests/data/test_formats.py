"""Rows as others write them become the rows that their authors mean: each format by an example and its reading."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.columns import Form, RowFamily
from alignkit.data.load import load_rows
from alignkit.data.negatives import load_prompts
from alignkit.data.prompts_schema import prompt_rows
from alignkit.data.recognition import said_formats
from alignkit.data.schema import preference_rows
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.data.unpaired_schema import unpaired_rows
from alignkit.errors import DataError
from alignkit.parts.data_format import format_names, load_format
from tests.data.rows import message

Write = Callable[[str, Sequence[Any]], str]


def bare_family(*columns: str) -> RowFamily:
    """Rows of these columns, whatever they hold."""
    return RowFamily((Form(columns),), "", lambda columns, head, name: None, lambda row: row["prompt"])


SUPERVISED, PAIRS = supervised_rows(), preference_rows()
KTO, STEPS = unpaired_rows(), bare_family("prompt", "completions", "labels")
Q, A, B = message("user", "2 + 2?"), message("assistant", "4"), message("assistant", "5")
S = message("system", "Be brief.")
CALL = {"name": "add", "arguments": {"a": 2}}
TREE = [
    {"completions": [{"text": "2 + 2", "rating": 0}, {"text": "Add.", "rating": 1}], "chosen_completion": 1},
    {"completions": None, "human_completion": {"text": "Sum."}, "chosen_completion": None},
    {"completions": [{"text": "So 5.", "rating": -1}], "chosen_completion": None, "human_completion": None},
    {"completions": [{"text": "never", "rating": 1}], "chosen_completion": 0},
]


@dataclass(frozen=True)
class Case:
    """A row of a format, and what it is for a family of rows."""

    format: str
    family: RowFamily
    row: dict[str, Any]
    read: dict[str, Any]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def hh(*turns: str) -> str:
    return "".join(("\n\nHuman: ", "\n\nAssistant: ")[i % 2] + turn for i, turn in enumerate(turns))


CASES = [
    Case(
        "alpaca",
        SUPERVISED,
        {"instruction": "Add", "input": "2 2", "output": "4"},
        {"prompt": "Add\n2 2", "completion": "4"},
    ),
    Case(
        "alpaca", SUPERVISED, {"instruction": "Add", "input": "", "output": "4"}, {"prompt": "Add", "completion": "4"}
    ),
    Case(
        "alpaca",
        SUPERVISED,
        {"instruction": "Why?", "context": "So.", "response": "4", "category": "x"},
        {"prompt": "Why?\nSo.", "completion": "4"},
    ),
    Case(
        "alpaca",
        SUPERVISED,
        {"instruction": "2 + 2?", "input": None, "output": "4", "system": "Be brief.", "history": [["a", "b"]]},
        {"prompt": [S, message("user", "a"), message("assistant", "b"), Q], "completion": [A]},
    ),
    Case(
        "alpaca",
        PAIRS,
        {"instruction": "Add", "input": "2 2", "chosen": "4", "rejected": "5"},
        {"prompt": "Add\n2 2", "chosen": "4", "rejected": "5"},
    ),
    Case(
        "alpaca",
        PAIRS,
        {"instruction": "Add", "input": "", "output": ["4", "5"]},
        {"prompt": "Add", "chosen": "4", "rejected": "5"},
    ),
    Case("sharegpt", SUPERVISED, {"id": "x", "conversations": [human("2 + 2?"), gpt("4")]}, {"messages": [Q, A]}),
    Case(
        "sharegpt",
        SUPERVISED,
        {"conversations": [human("2 + 2?"), gpt("4")], "system": "Be brief."},
        {"messages": [S, Q, A]},
    ),
    Case(
        "sharegpt",
        SUPERVISED,
        {"conversations": [{"from": "system", "value": "Be brief."}, human("2 + 2?"), gpt("4")], "system": "Be brief."},
        {"messages": [S, Q, A]},
    ),
    Case(
        "sharegpt",
        PAIRS,
        {"conversations": [human("2 + 2?")], "chosen": gpt("4"), "rejected": gpt("5")},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    Case(
        "sharegpt",
        SUPERVISED,
        {
            "conversations": [
                human("2 + 2?"),
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "4"},
                gpt("4"),
            ],
            "tools": "[]",
        },
        {
            "messages": [
                Q,
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                message("tool", "4"),
                A,
            ],
            "tools": "[]",
        },
    ),
    Case(
        "openai", SUPERVISED, {"conversation": [message("User", "2 + 2?"), message("bot", "4")]}, {"messages": [Q, A]}
    ),
    Case("openai", SUPERVISED, {"conversations": json.dumps([Q, A])}, {"messages": [Q, A]}),
    Case(
        "openai", PAIRS, {"messages": [Q], "chosen": A, "rejected": B}, {"prompt": [Q], "chosen": [A], "rejected": [B]}
    ),
    Case(
        "openai",
        PAIRS,
        {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    Case(
        "hh_rlhf",
        PAIRS,
        {"chosen": hh("a", "b", "2 + 2?", "4"), "rejected": hh("a", "b", "2 + 2?", "45")},
        {"prompt": hh("a", "b", "2 + 2?") + "\n\nAssistant:", "chosen": " 4", "rejected": " 45"},
    ),
    Case(
        "ultrafeedback",
        PAIRS,
        {
            "instruction": "Add",
            "models": ["m"],
            "completions": [
                {"response": "4", "overall_score": 8.5, "annotations": {}},
                {"response": "5", "overall_score": "2", "annotations": {}},
            ],
        },
        {"prompt": "Add", "completions": ["4", "5"], "scores": [8.5, 2.0]},
    ),
    Case(
        "ultrafeedback",
        PAIRS,
        {
            "instruction": "Add",
            "completions": [
                {"response": "4", "overall_score": "N/A", "fine-grained_score": 4.75},
                {"response": "5", "overall_score": 2, "fine-grained_score": 1},
            ],
        },
        {"prompt": "Add", "completions": ["4", "5"], "scores": [4.75, 1]},
    ),
    Case(
        "ultrafeedback_binarized",
        PAIRS,
        {
            "prompt": "2 + 2?",
            "chosen": [Q, A],
            "rejected": [Q, B],
            "messages": [Q, A],
            "score_chosen": 8,
            "score_rejected": 2,
        },
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
    ),
    Case("kto", KTO, {"prompt": "q", "completion": "a", "label": 1}, {"prompt": "q", "completion": "a", "label": True}),
    Case(
        "kto",
        KTO,
        {"query": "q", "response": "a", "thumbs": "\N{THUMBS DOWN SIGN}"},
        {"prompt": "q", "completion": "a", "label": False},
    ),
    Case(
        "kto",
        KTO,
        {"instruction": "q", "input": "i", "output": "a", "kto_tag": False},
        {"prompt": "q\ni", "completion": "a", "label": False},
    ),
    Case("kto", KTO, {"messages": [Q, A], "label": "true"}, {"prompt": [Q], "completion": [A], "label": True}),
    Case(
        "nectar",
        PAIRS,
        {
            "prompt": "q",
            "answers": [
                {"answer": "b", "rank": 2.0, "model": "m"},
                {"answer": "a", "rank": 1.0, "model": "n"},
                {"answer": "c", "rank": 3.0, "model": "m"},
            ],
        },
        {"prompt": "q", "completions": ["b", "a", "c"], "scores": [1.0, 2.0, 0.0]},
    ),
    Case(
        "stack_exchange",
        PAIRS,
        {
            "qid": 7,
            "question": "q",
            "answers": [
                {"answer_id": 1, "text": "a", "pm_score": 3, "selected": True},
                {"answer_id": 2, "text": "b", "pm_score": 0, "selected": False},
            ],
        },
        {"prompt": "q", "completions": ["a", "b"], "scores": [3, 0]},
    ),
    Case(
        "stack_exchange",
        PAIRS,
        {"qid": 7, "question": "q", "response_j": "a", "response_k": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ),
    Case("prompt_answer", SUPERVISED, {"question": "q", "answer": 42}, {"prompt": "q", "completion": "42"}),
    Case("prompt_answer", SUPERVISED, {"Prompt": "q", "Response": "a"}, {"prompt": "q", "completion": "a"}),
    Case(
        "prompt_answer",
        SUPERVISED,
        {"system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"},
        {"prompt": [S, Q], "completion": [A]},
    ),
    Case("prompt_answer", SUPERVISED, {"prompt": [Q], "response": "4"}, {"prompt": [Q], "completion": [A]}),
    Case(
        "prompt_answer",
        PAIRS,
        {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ),
    Case(
        "prm800k",
        STEPS,
        {"question": {"problem": "2 + 2?"}, "label": {"steps": TREE, "finish_reason": "found_error"}},
        {"prompt": "2 + 2?", "completions": ["Add.", "Sum.", "So 5."], "labels": [True, True, False]},
    ),
    Case(
        "prm800k",
        STEPS,
        {"prompt": "q", "completions": ["a", "b"], "labels": [1, -1]},
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
    ),
    Case(
        "prm800k",
        STEPS,
        {"problem": "q", "steps": ["a", "b", "c"], "label": 1},
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
    ),
    Case(
        "prm800k",
        STEPS,
        {"problem": "q", "steps": ["a", "b"], "label": -1},
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, True]},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.format)
def test_a_row_is_read_as_its_author_means_it(write_jsonl: Write, case: Case) -> None:
    path = write_jsonl("rows.jsonl", [case.row, case.row])
    for streaming in (False, True):
        rows = load_rows(path, family=case.family, streaming=streaming)
        # A column of ours beside those of the format stays, and is not read.
        assert [{name: row[name] for name in case.read} for row in rows] == [case.read] * 2
        (said,) = said_formats(rows)
        assert said.startswith(f"{case.format} (") and said.endswith(f"): {path}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.format)
def test_no_two_formats_claim_a_row(case: Case) -> None:
    claims = []
    for form in map(load_format, format_names()):
        if form.recognise and form.recognise(list(case.row), [case.row]):
            claims.append(form.name)
    given = [name for name in claims if any(set(g) <= set(case.family.columns) for g in load_format(name).gives)]
    assert given == [case.format]


def test_a_typed_table_is_read_like_its_rows(tmp_path: Path) -> None:
    """Parquet fills the keys of a struct in every row, and their order is its own."""
    seen = set()
    for number, case in enumerate(case for case in CASES if case.format in ("prm800k", "nectar", "sharegpt", "kto")):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.Table.from_pylist([case.row] * 2), path)
        rows = load_rows(str(path), family=case.family)
        assert [{name: row[name] for name in case.read} for row in rows] == [case.read] * 2
        seen.add(case.format)
    assert len(seen) == 4


def test_rows_that_hold_nothing_at_all_are_no_rows(write_jsonl: Write) -> None:
    full = {"instruction": "q", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2}]}
    text = refusal(write_jsonl("none.jsonl", [{"chosen": hh("q", "a"), "rejected": hh("r", "b")}] * 3), PAIRS)
    assert "none of the first 3 rows holds anything to train on" in text
    assert len(load_rows(write_jsonl("some.jsonl", [full] * 3), family=PAIRS)) == 3


def test_every_format_has_a_case() -> None:
    assert {case.format for case in CASES} == set(format_names())


def test_rows_under_our_names_are_left_as_they_are(write_jsonl: Write) -> None:
    for family, row in (
        (SUPERVISED, {"prompt": "q", "completion": "a", "question": "?", "answer": "!"}),
        (SUPERVISED, {"messages": [Q, A], "conversations": [human("?")]}),
        (PAIRS, {"prompt": "q", "chosen": hh("a", "b"), "rejected": hh("a", "c"), "question": "x"}),
        (PAIRS, {"chosen": [Q, A], "rejected": [Q, B]}),
        (KTO, {"prompt": "q", "completion": "a", "label": True}),
        (STEPS, {"prompt": "q", "completions": ["a"], "labels": [True]}),
    ):
        rows = load_rows(write_jsonl("ours.jsonl", [row]), family=family)
        assert said_formats(rows) == ()
        assert rows[0] == {name: value for name, value in row.items() if name in family.columns}


def refusal(path: str, family: RowFamily, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        list(load_rows(path, family=family, **options))
    return str(refused.value)


def test_a_choice_that_is_not_clear_is_one_error_with_the_map_to_write(write_jsonl: Write) -> None:
    path = write_jsonl("maths.jsonl", [{"problem": "q", "solution": "long", "answer": "4"}])
    text = refusal(path, SUPERVISED)
    assert "column_map: {prompt: problem, completion: answer} or {prompt: problem, completion: solution}" in text
    column_map = {"prompt": "problem", "completion": "solution"}
    assert load_rows(path, family=SUPERVISED, column_map=column_map)[0] == {"prompt": "q", "completion": "long"}
    text = refusal(write_jsonl("squad.jsonl", [{"question": "q", "context": "c", "answer": "a"}]), SUPERVISED)
    assert "'context' would be left out" in text and "{prompt: question, completion: answer}" in text
    text = refusal(write_jsonl("two.jsonl", [{"conversations": [Q, A], "chat": [Q, B]}]), SUPERVISED)
    assert "{messages: conversations} or {messages: chat}" in text


def test_a_row_unlike_the_first_is_named_with_what_is_wrong(write_jsonl: Write) -> None:
    good = {"chosen": hh("q", "a"), "rejected": hh("q", "b")}
    for rows, family, says in (
        ([good, {**good, "chosen": "a"}], PAIRS, "row 1 (the first is row 0): chosen is no transcript"),
        (
            [{"prompt": "q", "completion": "a", "label": 1}] * 70
            + [{"prompt": "q", "completion": "a", "label": "perhaps"}],
            KTO,
            "row 70 (the first is row 0): label is 'perhaps': write true for a good answer",
        ),
        (
            [
                {"conversations": [human("q"), gpt("a")], "system": "s"},
                {"conversations": [{"from": "me", "value": ""}]},
            ],
            SUPERVISED,
            "row 1 (the first is row 0): a turn that is from 'me'; known are",
        ),
    ):
        for streaming in (False, True):
            assert says in refusal(write_jsonl("bad.jsonl", rows), family, streaming=streaming)


def test_labels_are_not_trained_as_if_all_were_good(write_jsonl: Write) -> None:
    text = refusal(write_jsonl("labelled.jsonl", [{"question": "q", "answer": "a", "label": 0}]), SUPERVISED)
    assert "column 'prompt' is missing" in text
    mapped = {"prompt": "question", "completion": "answer"}
    text = refusal(
        write_jsonl("labelled.jsonl", [{"question": "q", "answer": "a", "label": 0}]), SUPERVISED, column_map=mapped
    )
    assert "rows that it calls bad would be trained" in text


def test_prompts_keep_the_columns_that_rewards_are_given(write_jsonl: Write) -> None:
    rows = [{"question": "2 + 2?", "answer": "4", "scores": [1]}]
    assert load_rows(write_jsonl("gsm.jsonl", rows), family=prompt_rows())[0] == {"prompt": "2 + 2?", **rows[0]}
    numbers = [{"question": "2 + 2?", "answer": 4}]
    assert load_rows(write_jsonl("ints.jsonl", numbers), family=prompt_rows())[0] == {"prompt": "2 + 2?", **numbers[0]}
    alpaca = [{"instruction": "Add", "input": "2 2", "output": "4"}]
    assert load_rows(write_jsonl("alpaca.jsonl", alpaca), family=prompt_rows())[0] == {
        "prompt": "Add\n2 2",
        **alpaca[0],
    }


def test_sources_of_several_formats_mix_and_the_report_names_each(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    gsm = write_jsonl("gsm.jsonl", [{"question": "q", "answer": "a"}])
    alpaca = write_jsonl("alpaca.jsonl", [{"instruction": "i", "input": "", "output": "o", "id": 3}])
    ours = write_jsonl("ours.jsonl", [{"prompt": "p", "completion": "c"}])
    with caplog.at_level(logging.WARNING):
        rows = load_rows([gsm, alpaca, ours], family=SUPERVISED, name_sources=True)
    assert f"{alpaca}: columns not used and dropped: id\n" in caplog.text
    _, report = to_supervised_rows(rows, tokenizer, max_length=None)
    said = (f"prompt_answer (question, answer): {gsm}", f"alpaca (instruction, input, output): {alpaca}")
    assert sorted(report.formats) == sorted(said)
    pairs = load_rows(write_jsonl("hh.jsonl", [{"chosen": hh("q", "a"), "rejected": hh("q", "b")}]), family=PAIRS)
    _, counted = to_candidate_rows(pairs, tokenizer, max_length=None, num_candidates=2)
    assert [said.partition(":")[0] for said in counted.formats] == ["hh_rlhf (chosen, rejected)"]
    assert replace(counted, formats=()).num_rows == 1


def test_rows_of_other_formats_are_sampled_for(write_jsonl: Write) -> None:
    gsm = write_jsonl("gsm.jsonl", [{"question": "2 + 2?", "answer": "4"}])
    pairs = write_jsonl("hh.jsonl", [{"chosen": hh("q", "a"), "rejected": hh("q", "b")}])
    ours = write_jsonl("ours.jsonl", [{"prompt": "p", "question": "x"}])
    rows = load_prompts([gsm, pairs, ours])
    assert [row["prompt"] for row in rows] == ["2 + 2?", hh("q") + "\n\nAssistant:", "p"]
    assert (rows[1]["chosen"], rows[1]["rejected"], rows[2]["question"]) == (" a", " b", "x")


def test_rows_that_hold_nothing_are_left_out_and_counted_while_they_are_few(write_jsonl: Write) -> None:
    good, bad = {"chosen": hh("q", "a"), "rejected": hh("q", "b")}, {"chosen": hh("q", "a"), "rejected": hh("r", "b")}
    talk, none = {"conversations": [human("2 + 2?"), gpt("4")]}, {"conversations": []}
    list_of = lambda *scores: {"instruction": "q", "completions": [{"response": f"{s}", "score": s} for s in scores]}  # noqa: E731
    for full, empty, family in ((good, bad, PAIRS), (talk, none, SUPERVISED), (list_of(1, 2), list_of(), PAIRS)):
        path = write_jsonl("few.jsonl", [full] * 9 + [empty] + [full] * 10)
        rows = load_rows(path, family=family)
        assert len(rows) == 19 == len(list(load_rows(path, family=family, streaming=True)))
        assert list(rows) == [load_rows(write_jsonl("one.jsonl", [full]), family=family)[0]] * 19
        (said,) = said_formats(rows)
        assert said.endswith(": " + path + ", without 1 row that holds nothing to train on")
        text = refusal(write_jsonl("many.jsonl", [full] * 9 + [empty] * 5), family)
        assert "5 of 14 rows hold nothing to train on" in text and "and 2 more rows" in text
        assert "row 9 (the first is row 0): " in text and "remove the row" in text
