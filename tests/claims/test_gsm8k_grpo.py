"""What is counted in completions of the GSM8K study: right annotations, and those that need no arithmetic."""

from __future__ import annotations

import pytest

from gsm8k_grpo_runs import annotation_figures, is_trivial, up_to_stop


@pytest.mark.parametrize(
    ("annotation", "before", "trivial"),
    [
        ("48/2=24", [], False),
        ("48/2=24", ["48/2=24"], True),
        ("24=24", [], True),
        ("24+0=24", [], True),
        ("1*24=24", [], True),
        ("10*21=210", [], False),
        ("0.5*4=2", [], False),
    ],
)
def test_trivial_annotations(annotation: str, before: list[str], trivial: bool) -> None:
    assert is_trivial(annotation, before) is trivial


def test_figures_of_completions() -> None:
    """Three completions: two right of three, one of them trivial; one repeated and right; none at all."""
    figures = annotation_figures(["a <<2+2=4>> b <<2+2=5>> c <<7=7>>", "<<12*3=36>> then <<12*3=36>>", "no sums"])
    assert figures == {
        "right": pytest.approx(4 / 5),
        "reward": pytest.approx((2 / 3 + 1 + 0) / 3),
        "annotations": pytest.approx(5 / 3),
        "without any": pytest.approx(1 / 3),
        "right a completion": pytest.approx(4 / 3),
        "trivial": pytest.approx(2 / 4),
        "not trivial a completion": pytest.approx(2 / 3),
        "one digit": pytest.approx(1 / 2),
    }


def test_tokens_end_with_the_stop_token() -> None:
    assert up_to_stop([5, 1, 9, 9], stop=1) == [5, 1]
    assert up_to_stop([5, 6], stop=1) == [5, 6]
