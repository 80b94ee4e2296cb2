"""Arithmetic rewards: against Python's own arithmetic, and on real rows."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest

from alignkit.rewards._numbers import as_number, evaluate, last_number
from tests.conftest import GSM8K
from tests.rewards.calls import reward, rewards


def test_expressions_have_the_value_that_python_gives_them() -> None:
    random.seed(1)

    def made(depth: int) -> str:
        if depth == 0:
            return str(random.randrange(0, 30))
        sign = random.choice(["+", "-", "*", "/", "//"])
        text = f"{made(depth - 1)}{sign}{made(random.randrange(depth))}"
        return f"({text})" if random.random() < 0.4 else text

    seen = 0
    for _ in range(500):
        text = made(random.randrange(1, 5))
        try:
            value = eval(__import__("re").sub(r"\d+", lambda match: f"Fraction({match[0]})", text))
        except ZeroDivisionError:
            value = None
        assert evaluate(text) == value, text
        seen += value is not None
    assert seen > 300


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "a", "2**9", "2^3", "1/0", "(1", "1)", "()", "1 2", "1+", "*2", "__import__('os')", "1e9", "0x10",
        "1,000",
        "9" * 61, "+".join("1" * 60), "(" * 500 + "1" + ")" * 500, "٣+١", "1.2.3", "5%2", "1_0",
    ],
)  # fmt: skip
def test_what_is_no_sum_of_bounded_size_has_no_value(text: str) -> None:
    assert evaluate(text) is None


@pytest.mark.parametrize(
    ("annotation", "right"),
    [
        ("48/2=24", 1), ("48+24=73", 0), ("0.2*50=10", 1), (".5*4=2.0", 1), ("16-3-4=9", 1), ("(2+3)*4=20", 1),
        ("-5+2=-3", 1), ("1--1=2", 1), ("2*-3=-6", 1),
        ("560//10=56", 1), ("1/3=0.33", 0), ("1/0=0", 0), ("=3", 0), ("3", 0), ("a=a", 0), ("2=2", 1),
        ("1+1=2=2", 0),
    ],
)  # fmt: skip
def test_an_annotation(annotation: str, right: float) -> None:
    assert reward("gsm8k_annotations", f"so <<{annotation}>>") == right


def test_the_share_and_what_has_none() -> None:
    texts = ["<<1+1=2>>2 and <<2+2=5>>5 and <<3*3=9>>", "none", "<<>>", "<< <<1+1=2>>"]
    assert rewards("gsm8k_annotations", *texts) == pytest.approx([2 / 3, 0.0, 0.0, 1.0])
    assert reward("gsm8k_annotations", "none", without=-1.0) == -1.0


@pytest.mark.parametrize(("result", "right"), [("0.33", 1), ("0.333", 1), ("0.34", 0), ("0", 0), ("0.3333333", 1)])
def test_rounded_results_count_where_they_are_asked_for(result: str, right: float) -> None:
    assert reward("gsm8k_annotations", f"<<1/3={result}>>", rounded=True) == right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18), ("$1,234.50", Fraction("1234.5")), ("12%", 12), ("-3.", -3), ("-$5", -5), (".5", Fraction(1, 2)),
        ("", None), ("three", None), ("1/2", None), ("3 apples", None), ("1e5", None), ("9" * 100, None),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, number: Fraction | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("10-5", 5), ("it is -5.", -5), ("$1,234.50 in all", Fraction("1234.5")), ("from 3 to 4", 4), ("none", None)],
)
def test_the_last_number(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "right", "marked"),
    [
        ("so 9*2=18\n#### 18", 1, 1),
        ("#### 3\nno:\n#### 18", 1, 1),
        ("#### $18.00", 1, 1),
        ("#### 18 eggs", 1, 1),
        ("#### 18\nor 17", 1, 1),
        ("A: 18", 1, 1),
        ("She has 18.", 1, 0),
        ("#### 17", 0, 0),
        ("#### ", 0, 0),
        ("", 0, 0),
    ],
)
def test_a_final_answer(text: str, right: float, marked: float) -> None:
    for answer in (18, "18", "2*9=<<2*9=18>>18\n#### 18"):
        assert reward("gsm8k_answer", text, answer=answer) == right
        assert reward("gsm8k_answer", text, answer=answer, marked=True) == marked


def test_zero_is_a_number() -> None:
    assert rewards("gsm8k_answer", "#### 0", "#### 1", answer="0") == [1.0, 0.0]


def test_what_has_no_number_is_no_reference() -> None:
    for reference in (None, "no idea", True):
        assert reward("gsm8k_answer", "18", answer=reference) is None


def test_every_annotation_of_gsm8k_is_right() -> None:
    rows = [json.loads(line)["ground_truth"] for line in GSM8K.read_text().splitlines()]
    annotated = [row for row in rows if "<<" in row]
    assert len(annotated) >= 50
    assert rewards("gsm8k_annotations", *annotated) == [1.0] * len(annotated)


def test_solutions_of_real_models_are_judged_as_their_graders_did() -> None:
    """The grader's verdict is in the file; their worked answers end in "A: number"."""
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    judged = agreed = 0
    for row in rows:
        for solution in (value for value in row.values() if isinstance(value, dict)):
            judged += 1
            found = reward("gsm8k_answer", solution["solution"], answer=row["ground_truth"])
            agreed += found == float(solution["is_correct"])
    assert judged >= 40
    assert agreed == judged
