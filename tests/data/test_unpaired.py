"""Labelled answers: which rows are taken, what is put behind each, and what the report says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from alignkit.data.json_values import dataset_of
from alignkit.data.load import load_rows
from alignkit.data.unpaired import UnpairedReport, labelled_answers, to_unpaired_rows, with_mismatches
from alignkit.data.unpaired_schema import detect_unpaired_kind, unpaired_rows
from alignkit.errors import DataError
from tests.supervised import tokenizer


def answers(count: int = 8, prompts: int | None = None) -> list[dict[str, Any]]:
    """Answers to so many prompts, every other one good."""
    return [
        {"prompt": f"question {i % (prompts or count)}", "completion": f" answer {i}", "label": i % 2 == 0}
        for i in range(count)
    ]


def converted(rows: list[dict[str, Any]], **how: Any) -> tuple[Dataset, UnpairedReport]:
    settings = {"weights": (1.0, 1.0), "seed": 1, "max_length": None} | how
    return to_unpaired_rows(dataset_of(rows), tokenizer(), **settings)


def test_every_answer_stands_behind_one_other_prompt() -> None:
    rows = answers(40)
    made = with_mismatches(rows, seed=3, name="train")
    assert [(row["prompt"], row["completions"][0]) for row in made] == [(r["prompt"], r["completion"]) for r in rows]
    assert [row["scores"] for row in made] == [[1.0, -1.0], [0.0, -1.0]] * 20
    behind = [row["completions"][1] for row in made]
    assert Counter(behind) == Counter(row["completion"] for row in rows)
    assert all(other != row["completion"] for other, row in zip(behind, rows, strict=True))
    assert [row["completions"][1] for row in with_mismatches(rows, seed=3, name="train")] == behind
    assert [row["completions"][1] for row in with_mismatches(rows, seed=4, name="train")] != behind


def test_it_never_comes_from_the_same_prompt() -> None:
    rows = answers(30, prompts=3)
    prompt_of = {row["completion"]: row["prompt"] for row in rows}
    assert all(prompt_of[row["completions"][1]] != row["prompt"] for row in with_mismatches(rows, 0, "train"))
    with pytest.raises(DataError, match="every row has the prompt or the answer of this one"):
        with_mismatches(answers(4, prompts=1), 0, "train")


@pytest.mark.parametrize("form", ["text", "messages", "messages with a text answer", "pairs", "implicit pairs"])
def test_rows_of_every_form_become_the_same_answers(form: str) -> None:
    talk = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    pairs = [{"prompt": f"q{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(3)]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": answers(6),
        "messages": [r | {"prompt": talk(r["prompt"]), "completion": said(r["completion"])} for r in answers(6)],
        "messages with a text answer": [r | {"prompt": talk(r["prompt"])} for r in answers(6)],
        "pairs": pairs,
        "implicit pairs": [
            {"chosen": talk(f"q{i}") + said(f"good {i}"), "rejected": talk(f"q{i}") + said(f"bad {i}")}
            for i in range(3)
        ],
    }
    found, num_pairs = labelled_answers(dataset_of(rows[form]), "train")
    assert [row["label"] for row in found] == [True, False] * 3
    assert num_pairs == (3 if "pairs" in form else 0)
    tokens, report = converted(rows[form])
    assert (report.num_rows, report.num_desirable, report.num_pairs) == (6, 3, num_pairs)
    assert list(tokens["scores"]) == [[1.0, -1.0], [0.0, -1.0]] * 3
    read = [tokenizer().decode(ids[0]) for ids in tokens["completion_ids"]]
    assert all(("good" if i % 2 == 0 else "bad") in text for i, text in enumerate(read)) or "pairs" not in form


def test_what_is_wrong_with_a_row_is_said_with_its_number() -> None:
    rows = answers(6)
    rows[2] |= {"label": "maybe"}
    rows[4] |= {"completion": None}
    with pytest.raises(DataError) as caught:
        converted(rows)
    problems = "\n".join(caught.value.problems)
    assert "label is neither true nor false" in problems and "row 2: 'maybe'" in problems
    assert "completion is null" in problems and "row 4" in problems


@pytest.mark.parametrize(("label", "advice"), [(True, "method sft"), (False, "method d2o")])
def test_one_label_alone_is_refused_in_training_rows(label: bool, advice: str) -> None:
    rows = [row | {"label": label} for row in answers(6)]
    with pytest.raises(DataError, match=f"every label is {str(label).lower()}") as caught:
        converted(rows)
    assert advice in caught.value.problems[0]
    assert converted(rows, name="held-out")[1].num_desirable == 6 * label


def test_the_report_says_what_was_made_of_the_rows() -> None:
    rows, report = converted([{"prompt": f"q{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(4)])
    assert report.details()["good and bad answers"] == "4 and 4"
    assert report.sizes() == {}, "no row has two candidates"
    assert any("4 pairs were read as two answers each" in note for note in report.notes())
    assert any("drawn by the seed" in note for note in report.notes())
    labels = [label for label, _ in report.example(rows[1], tokenizer()).labelled()]
    assert labels == ["prompt", "bad answer", "answer to another prompt"]
    (balance,) = [check for check in report.checks(tokenizer(), list(rows)) if check.name.startswith("good and bad")]
    assert (balance.status, balance.message) == ("ok", "the good ones together weigh 1.00 times the bad ones")


@pytest.mark.parametrize(
    ("weights", "status"), [((1.0, 1.0), "warn"), ((3.5, 1.0), "ok"), ((1.0, 0.3), "ok"), ((9.0, 1.0), "warn")]
)
def test_labels_that_weigh_unequally_get_the_advice_of_the_paper(weights: tuple[float, float], status: str) -> None:
    """Three good answers and nine bad ones: a good one should weigh 3 to 4 times as much, 3.5 in the middle."""
    rows = [row | {"label": i % 4 == 0} for i, row in enumerate(answers(12))]
    tokens, report = converted(rows, weights=weights)
    (balance,) = [check for check in report.checks(tokenizer(), list(tokens)) if check.name.startswith("good and bad")]
    assert balance.status == status
    if weights == (1.0, 1.0):
        assert "0.33 times" in balance.message
        assert "write desirable_weight: 3.5, or undesirable_weight: 0.29, not both" in balance.message


@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": f"q{i}", "input": "", "output": f" a{i}", "kto_tag": i % 2 == 0} for i in range(4)],
        [{"prompt": f"q{i}", "completion": f" a{i}", "label": i % 2} for i in range(4)],
        [{"question": f"q{i}", "answer": f" a{i}", "feedback": ("thumbs_up", "thumbs_down")[i % 2]} for i in range(4)],
    ],
    ids=["LLaMA-Factory", "labels 1 and 0", "thumbs"],
)
def test_rows_as_others_write_them_are_read(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = converted_file(str(file))
    assert (report.num_rows, report.num_desirable) == (4, 2)


def converted_file(path: str) -> tuple[Dataset, UnpairedReport]:
    loaded = load_rows(path, family=unpaired_rows())
    return to_unpaired_rows(loaded, tokenizer(), weights=(1.0, 1.0), seed=1, max_length=None)


def test_other_rows_are_refused_with_what_is_missing() -> None:
    with pytest.raises(DataError) as caught:
        detect_unpaired_kind(["prompt", "completion"], [{"prompt": "a", "completion": "b"}], name="rows.jsonl")
    assert "'label' is missing" in caught.value.problems[0]
    with pytest.raises(DataError, match="mix two forms"):
        detect_unpaired_kind(
            ["prompt", "completion", "label"], [{"prompt": "a", "completion": [{}], "label": True}], name="rows.jsonl"
        )
    assert unpaired_rows().prompt_of({"prompt": "a", "completion": "b", "label": True}) == "a"
