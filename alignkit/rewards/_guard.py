"""A reward whose errors say which reward, which row and which completion.

A reward is somebody's own code, run on text that a model made up: a list index in it may hold for a million completions
and fail on the next. What it raises would stop the run with a line of that code and nothing of the text.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import traceback
from collections.abc import Sequence
from typing import Any

from alignkit.errors import RewardError
from alignkit.parts.reward import Reward, completion_text, prompt_text
from alignkit.plain_text import visible

MOST_PROMPT, MOST_COMPLETION = 300, 1000
"""Characters of them that an error quotes."""


class Guarded:
    """A reward function that fails with a :class:`~alignkit.errors.RewardError`; made by :func:`guarded`.

    Args:
        reward: The function.
        name: What it is called in logs and errors.
        again: Function and arguments that make it anew in another process, of a reward that cannot be pickled.
    """

    def __init__(self, reward: Any, name: str, again: tuple[Any, ...] | None = None) -> None:
        if inspect.isroutine(reward):
            functools.update_wrapper(self, reward)
        self._reward, self._again = reward, again
        self.__name__ = name

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it is made of."""
        return self._again or (type(self), (self._reward, self.__name__))

    def __repr__(self) -> str:
        return f"guarded({self._reward!r})"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """What the reward returns for a batch, as numbers and None."""
        try:
            values = self._reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        except RewardError:  # says what it is about already, such as a column that is missing
            raise
        except Exception as error:  # a reward is any code: whatever it raises is told with the row that it raised on
            place = self._row_that_raises(prompts, completions, completion_ids, columns)
            raise self._error(_raised(error), prompts, completions, place) from error
        return self._checked(values, prompts, completions)

    def _row_that_raises(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, columns: dict[str, Any]
    ) -> int | None:
        """The first row on which the reward raises when it is called on that alone; None where it is on none."""
        for row in range(len(prompts)):
            alone = _of_row(row, len(prompts), columns)
            ids = None if completion_ids is None else completion_ids[row : row + 1]
            try:
                self._reward(
                    prompts=prompts[row : row + 1],
                    completions=completions[row : row + 1],
                    completion_ids=ids,
                    **alone,
                )
            except Exception:  # noqa: BLE001  # as above: the same call, of one row
                return row
        return None

    def _checked(self, values: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            said = f"returned {_kind(values)}, not a list of {len(prompts)} numbers (an array or a tensor has tolist())"
            raise self._error(said, prompts, completions, None)
        if len(values) != len(prompts):
            said = f"returned {len(values)} rewards for {len(prompts)} completions"
            raise self._error(said, prompts, completions, None)
        for row, value in enumerate(values):
            if value is not None and not _is_finite(value):
                shown = f"{value!r:.60}" if isinstance(value, numbers.Real) else f"{_kind(value)} ({value!r:.60})"
                advice = "return a finite number, or None for a completion that it does not judge"
                raise self._error(f"returned {shown}: {advice}", prompts, completions, row)
        return [None if value is None else float(value) for value in values]

    def _error(self, said: str, prompts: Sequence[Any], completions: Sequence[Any], row: int | None) -> RewardError:
        if row is None:
            where = f", on the batch of {len(prompts)} rows"
            return RewardError(f"The reward {self.__name__!r} {said}{where}; no single row is to blame.")
        return RewardError(
            f"The reward {self.__name__!r} {said}, on row {row} of {len(prompts)} (from 0).\n"
            f"  prompt: {_shortened(prompts[row], prompt_text, MOST_PROMPT)}\n"
            f"  completion: {_shortened(completions[row], completion_text, MOST_COMPLETION)}"
        )


class AsyncGuarded(Guarded):
    """The same of a reward that is awaited."""

    async def __call__(  # type: ignore[override]  # a trainer tells by this which it is
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """What the reward returns for a batch, as numbers and None."""
        try:
            values = await self._reward(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
            )
        except RewardError:  # says what it is about already, such as a column that is missing
            raise
        except Exception as error:  # a reward is any code: whatever it raises is told with the row that it raised on
            place = await self._awaited_row(prompts, completions, completion_ids, columns)
            raise self._error(_raised(error), prompts, completions, place) from error
        return self._checked(values, prompts, completions)

    async def _awaited_row(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, columns: dict[str, Any]
    ) -> int | None:
        for row in range(len(prompts)):
            alone = _of_row(row, len(prompts), columns)
            ids = None if completion_ids is None else completion_ids[row : row + 1]
            try:
                await self._reward(
                    prompts=prompts[row : row + 1],
                    completions=completions[row : row + 1],
                    completion_ids=ids,
                    **alone,
                )
            except Exception:  # noqa: BLE001  # as above: the same call, of one row
                return row
        return None


def guarded(reward: Any, name: str | None = None, again: tuple[Any, ...] | None = None) -> Guarded:
    """A reward function whose errors name it, the row and the completion; one that is guarded stays as it is.

    What it raises, and a list of another length, a value that is no number, NaN and infinity become a
    :class:`~alignkit.errors.RewardError`. After an error it is called again row by row to find the one to blame.

    Args:
        reward: ``reward(prompts, completions, completion_ids, **columns) -> list``; stays async if it is.
        name: What it is called in logs and errors, by default its own name.
        again: Function and arguments that make it anew in another process, of a reward that cannot be pickled.
    """
    own = reward.__name__ if isinstance(reward, (Guarded, Reward)) or inspect.isroutine(reward) else None
    called = name or own or type(reward).__name__
    if isinstance(reward, Guarded):
        return reward if called == reward.__name__ else guarded(reward._reward, called, reward._again)
    is_async = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    return (AsyncGuarded if is_async else Guarded)(reward, called, again)


def _of_row(row: int, count: int, columns: dict[str, Any]) -> dict[str, Any]:
    """Columns of one row: of lists with a value a row that value, whatever else a trainer passes as it is."""
    is_column = {key: isinstance(value, (list, tuple)) and len(value) == count for key, value in columns.items()}
    return {key: value[row : row + 1] if is_column[key] else value for key, value in columns.items()}


def _raised(error: Exception) -> str:
    """What was raised, and at which line of which file."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    said = f"raised {type(error).__name__}: {error}" if str(error) else f"raised {type(error).__name__}"
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _shortened(value: Any, text_of: Any, most: int) -> str:
    """A text on one line, without its middle where it is long; what is neither text nor messages as Python shows it."""
    is_messages = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    text = text_of(value) if isinstance(value, str) or is_messages else repr(value)
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return visible(repr(text)[1:-1])
