"""Length, soft over-length and repetition, at the corners of their formulas."""

from __future__ import annotations

import pytest

from alignkit.errors import ConfigError, RewardError
from alignkit.parts.reward import load_reward
from tests.rewards.calls import reward


@pytest.mark.parametrize(("tokens", "expected"), [(0, 1), (10, 1), (11, 0.9), (15, 0.5), (20, 0), (500, 0)])
def test_length_falls_between_its_limits(tokens: int, expected: float) -> None:
    assert reward("length", "any text", tokens=tokens, soft_limit=10, hard_limit=20) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (30000, -1)]
)
def test_soft_overlong_with_the_limits_of_the_paper(tokens: int, expected: float) -> None:
    found = reward("soft_overlong", "any text", tokens=tokens, max_length=20480, buffer=4096)
    assert found == pytest.approx(expected)


def test_limits_that_cross_are_refused() -> None:
    with pytest.raises(ConfigError, match="hard_limit 3 must be above soft_limit 5"):
        load_reward("length")(soft_limit=5, hard_limit=3)
    with pytest.raises(ConfigError, match="buffer 9 must not be above max_length 8"):
        load_reward("soft_overlong")(max_length=8, buffer=9)


def test_tokens_are_asked_for() -> None:
    with pytest.raises(RewardError, match="'length' counts tokens: pass completion_ids"):
        load_reward("length")()(prompts=["q"], completions=["a"])


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("", 3, 1),
        ("a b", 3, 1),
        ("a b c", 3, 1),
        ("a b a b a b", 3, 2 / 4),
        ("a a a a", 1, 1 / 4),
        ("a, a, a,", 2, 2 / 5),
    ],
)
def test_repetition(text: str, n: int, expected: float) -> None:
    assert reward("repetition", text, n=n) == pytest.approx(expected)
