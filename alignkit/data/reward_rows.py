"""Numbers that rows carry beside their texts, a reward for every completion token or a margin: what can be wrong.

Whether a list is as long as its completion has tokens is known after tokenisation: :mod:`alignkit.data.candidates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.problems import Problem, is_finite, shorten
from alignkit.data.schema import RowKind


def reward_problems(row: Mapping[str, Any], kind: RowKind) -> list[Problem]:
    """Everything wrong with the token rewards of one row; empty when it has none, or none that are wrong.

    Args:
        row: The row, with the columns of ``kind``.
        kind: The form of the dataset.
    """
    if not kind.token_rewards:
        return []
    if not kind.lists:
        return [problem for column in kind.reward_columns for problem in _vector_problems(column, row[column])]
    (column,) = kind.reward_columns
    rewards, completions = row[column], row["completions"]
    if not isinstance(rewards, list):
        return _vector_problems(column, rewards)
    if isinstance(completions, list) and len(rewards) != len(completions):
        shown = f"{len(completions)} completions, {len(rewards)} lists"
        return [Problem(f"{column} and completions differ in number: give each completion one list", shown)]
    return [problem for vector in rewards for problem in _vector_problems(column, vector)]


def margin_problems(margin: Any) -> list[Problem]:
    """Everything wrong with the margin of one row; empty where there is nothing.

    Args:
        margin: The value of its column.
    """
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        return [Problem("margin is not a number: give every row one, or remove the column", shorten(margin))]
    return [] if is_finite(margin) else [Problem("margin is NaN or infinite: it must be finite", repr(margin))]


def preference_labels(preferences: Any, dimensions: Sequence[str]) -> list[float]:
    """Along each dimension 1, -1, or 0 where nothing is said; along one without a name, 1.

    Args:
        preferences: The value of the column, by dimension.
        dimensions: Their names.
    """
    if not dimensions:
        return [1.0]
    return [float(preferences.get(name) or 0) for name in dimensions]


def preference_problems(preferences: Any, dimensions: Sequence[str]) -> list[Problem]:
    """Everything wrong with what a row says along dimensions; empty where there is nothing.

    Args:
        preferences: The value of its column.
        dimensions: Their names.
    """
    if not isinstance(preferences, Mapping):
        example = f"{{{dimensions[0]}: 1}}"
        return [
            Problem(f"preferences is no mapping of dimensions to 1, -1 or 0, such as {example}", shorten(preferences))
        ]
    if wrong := [name for name in dimensions if preferences.get(name) not in (None, -1, 0, 1)]:
        kind = "preferences holds something other than 1 (chosen is better), -1 (it is worse) and 0 or null (not said)"
        return [Problem(kind, f"{wrong[0]}: {shorten(preferences[wrong[0]])}")]
    if not any(preference_labels(preferences, dimensions)):
        return [Problem("preferences says nothing along any of the dimensions", shorten(preferences), False)]
    return []


def _vector_problems(column: str, rewards: Any) -> list[Problem]:
    if rewards is None:
        return [Problem(f"{column} is null: give every completion token rewards, or none", "null")]
    if not isinstance(rewards, list):
        return [Problem(f"{column} holds {type(rewards).__name__}, expected lists of numbers", shorten(rewards))]
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, (int, float)):
            return [Problem(f"{column} holds something that is not a number", shorten(reward))]
        if not is_finite(reward):
            return [Problem(f"{column} holds NaN or infinity: every token reward must be finite", repr(reward))]
    return []
