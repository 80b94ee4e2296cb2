"""A reward that fails says which it is, on which row, and what it was given."""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alignkit.errors import RewardError
from alignkit.parts.reward import load_reward
from alignkit.rewards import guarded

PROMPTS = ["one", "two", "three"]
COMPLETIONS = ["1", "2\x1b[31m", "x"]


def as_number(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward as users write it."""
    return [float(completion) for completion in completions]


async def awaited(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(completion) for completion in completions]


def of_the_batch(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0 / (len(completions) - 3)] * len(completions)


def called(reward: Callable[..., Any], **columns: Any) -> Any:
    return guarded(reward)(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1], [2], [3]], **columns)


def returning(value: Any) -> Callable[..., Any]:
    def made(prompts: list[str], **columns: Any) -> Any:
        return value

    return made


def test_the_row_that_raises_is_named() -> None:
    with pytest.raises(RewardError) as caught:
        called(as_number)
    said = str(caught.value)
    assert "The reward 'as_number' raised ValueError: could not convert string to float: " in said
    assert "on row 1 of 3 (from 0)" in said and "prompt: two" in said and "completion: 2\\x1b[31m" in said
    assert "test_guard.py, line " in said
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_no_row_raises_alone_is_said_of_the_batch() -> None:
    with pytest.raises(
        RewardError, match="raised ZeroDivisionError.*on the batch of 3 rows; no single row is to blame"
    ):
        called(of_the_batch)


def test_columns_go_with_their_row() -> None:
    def picky(
        prompts: list[str], completions: list[str], answer: list[str], state: object, **columns: Any
    ) -> list[float]:
        assert state is marker, "what is no column stays whole"
        return [{"b": 0.0, "c": 1.0}[one] for one in answer]

    marker = object()
    with pytest.raises(RewardError, match="(?s)'picky' raised KeyError: 'a' .*on row 2 of 3.*prompt: three"):
        called(picky, answer=["b", "c", "a"], state=marker)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned None, not a list of 3 numbers"),
        (1.0, "returned float, not a list"),
        (np.zeros(3), "returned ndarray, not a list of 3 numbers (an array or a tensor has tolist())"),
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0, math.nan, 2.0], "returned nan: return a finite number, or None"),
        ([1.0, 2.0, -math.inf], "returned -inf"),
        ([1.0, 2.0, 10**400], "returned 1000"),
        ([1.0, "2", 3.0], "returned str ('2')"),
        ([1.0, [2.0], 3.0], "returned list ([2.0])"),
    ],
)
def test_what_is_no_reward_is_refused(value: Any, said: str) -> None:
    with pytest.raises(RewardError) as caught:
        called(returning(value))
    assert f"The reward 'made' {said}" in str(caught.value)


def test_the_row_of_a_wrong_value_is_shown() -> None:
    with pytest.raises(RewardError, match=r"(?s)on row 1 of 3.*prompt: two"):
        called(returning([1.0, math.nan, 2.0]))


def test_numbers_of_every_kind_are_taken() -> None:
    found = called(returning([True, np.float32(0.5), None]))
    assert found == [1.0, 0.5, None] and [type(value) for value in found] == [float, float, type(None)]


def test_long_texts_and_messages_are_shortened() -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "p" * 1000}]
    completion = [{"role": "assistant", "content": "c" * 100_000 + "END"}]
    with pytest.raises(RewardError) as caught:
        guarded(as_number)(prompts=[prompt], completions=[completion], completion_ids=[[1]])
    said = str(caught.value)
    assert len(said) < 2000 and "ppp ... ppp" in said and "cEND" in said


def test_an_async_reward_stays_async() -> None:
    function = guarded(awaited)
    assert inspect.iscoroutinefunction(function.__call__) and not inspect.iscoroutinefunction(
        guarded(as_number).__call__
    )
    assert asyncio.run(function(prompts=["q"], completions=["2"])) == [2.0]
    with pytest.raises(RewardError, match="(?s)'awaited' raised ValueError.*on row 1 of 3.*prompt: two"):
        asyncio.run(function(prompts=PROMPTS, completions=COMPLETIONS))


def test_the_trainer_sees_the_name_and_the_kind() -> None:
    """As TRL reads them."""
    from trl.trainer.utils import get_callable_name, is_async_callable

    assert get_callable_name(guarded(as_number)) == "as_number"
    assert get_callable_name(guarded(as_number, "other")) == "other"
    assert get_callable_name(load_reward("json_valid")()) == "json_valid"
    assert is_async_callable(guarded(awaited)) and not is_async_callable(guarded(as_number))
    assert not is_async_callable(guarded(load_reward("json_valid")()))


def test_a_missing_column_is_told_once() -> None:
    with pytest.raises(RewardError) as caught:
        guarded(load_reward("gsm8k_answer")())(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[]] * 3)
    said = "The reward 'gsm8k_answer' reads the column 'answer', which the rows do not have."
    assert str(caught.value) == said


def test_a_row_with_a_schema_that_is_none_is_named() -> None:
    reward = guarded(load_reward("json_schema")(schema_column="wanted"))
    with pytest.raises(RewardError, match="(?s)raised ValueError: column wanted: .*not JSON Schema.*on row 1 of 3"):
        reward(prompts=PROMPTS, completions=COMPLETIONS, wanted=["{}", '{"type": "x"}', "{}"])


def test_guarding_twice_changes_nothing_but_the_name() -> None:
    function = guarded(as_number)
    assert guarded(function) is function
    assert repr(guarded(function, "other")) == repr(function) and guarded(function, "other").__name__ == "other"


def test_a_guarded_reward_is_pickled() -> None:
    for reward in (as_number, load_reward("repetition")(n=2)):
        again = pickle.loads(pickle.dumps(guarded(reward, "other")))
        assert again.__name__ == "other" and again(prompts=["q"], completions=["1"]) == [1.0]
