"""Rewards as a run's YAML names them: found, given their options, and checked against the data."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from alignkit.errors import ConfigError, DataError, ProblemListError
from alignkit.parts.options import OptionInfo
from alignkit.parts.reward import Reward, load_reward, reward_names
from alignkit.rewards._files import file_function, is_file_function
from alignkit.rewards._guard import Guarded, guarded

_OF_THE_ENTRY = ("name", "as", "weight")
_FROM_THE_TRAINER = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_LARGEST = 1e300
"""Bound of every number, which NaN, infinity and a whole number that no float holds are not below."""
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


class Refused(Exception):
    """An entry cannot be used; ``problems`` say why."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__(*problems)


@dataclass(frozen=True)
class ChosenReward:
    """A reward of a run.

    Attributes:
        function: What a trainer is given; its errors name the reward, the row and the completion.
        name: What it is called in logs, ``rewards/<name>/mean``; no two of a run are called the same.
        weight: Its weight in the sum.
        needs_columns: Columns that the data must have.
        counts_tokens: Whether it reads ``completion_ids``.
    """

    function: Guarded
    name: str
    weight: float
    needs_columns: tuple[str, ...]
    counts_tokens: bool


def load_rewards(entries: Sequence[str | Mapping[str, Any]]) -> list[ChosenReward]:
    """The rewards that a run's YAML names.

    Args:
        entries: Each the name of a reward, or ``file.py:function``, or a mapping with that as ``name``, perhaps
            ``weight`` and ``as`` (what it is called in logs), and the options of the reward.

    Raises:
        ConfigError: Every entry that cannot be used, with what to write in its place.
    """
    chosen: list[ChosenReward] = []
    problems: list[str] = []
    if not entries:
        problems.append(f"there is none. Choose from {', '.join(reward_names())}, or write file.py:function")
    for place, entry in enumerate(entries):
        try:
            reward = _chosen(entry)
            if reward.name in [other.name for other in chosen]:
                raise Refused(f"another one is called {reward.name!r}. Give one of them a name with `as: ...`")
            chosen.append(reward)
        except Refused as refused:
            problems += [f"rewards[{place}]: {problem}" for problem in refused.problems]
    if problems:
        raise ConfigError("rewards", problems)
    return chosen


def check_columns(chosen: Sequence[ChosenReward], columns: Collection[str]) -> None:
    """Refuse data without the columns that rewards read.

    Args:
        chosen: The rewards of a run.
        columns: The columns of its data.

    Raises:
        DataError: Some are missing; every one is told.
    """
    problems = []
    for reward in chosen:
        for column in reward.needs_columns:
            if column not in columns:
                near = difflib.get_close_matches(column, list(columns), n=1)
                advice = f"did you mean {near[0]!r}? Rename it" if near else "Add it"
                problems.append(f"the reward {reward.name!r} reads the column {column!r}; {advice}, or leave it out")
    if problems:
        listed = ", ".join(sorted(columns)) or "none"
        raise DataError(f"the data lacks columns that rewards read (it has {listed})", problems)


def _chosen(entry: Any) -> ChosenReward:
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise Refused(f"{entry!r:.80} is no reward. Write a name, or {{name: ..., weight: ...}}")
    name: str = given["name"]
    options = {key: value for key, value in given.items() if key not in _OF_THE_ENTRY}
    found = _found(name)
    if isinstance(found, type) and issubclass(found, Reward):
        reward = _built(found, options)
        needs, weight, own, counts = reward.columns(), reward.weight, reward.name, reward.counts_tokens
    else:
        if options:
            advice = "a function of yours has none: read a column, or write a class (docs/howto/rewards.md)"
            raise Refused(f"{name} is given the option {next(iter(options))!r}; {advice}")
        reward, weight, own, counts = found, 1.0, name.rpartition(":")[2], False
        needs = _columns_of_function(name, reward)
    called = given.get("as", own)
    if not isinstance(called, str) or not called.strip():
        raise Refused(f"`as: {called!r:.40}` is no name. Write text")
    again = None
    if is_file_function(name):
        path, _, function = name.rpartition(":")
        # Its module has no name that another process could import: there it is loaded from the file once more.
        again = (_function_of, ({**given, "name": f"{Path(path).expanduser().absolute()}:{function}"},))
    return ChosenReward(guarded(reward, called, again), called, _weight(given.get("weight", weight)), needs, counts)


def _function_of(entry: Mapping[str, Any]) -> Guarded:
    return load_rewards([entry])[0].function


def _found(name: str) -> Any:
    """The class or function of a name."""
    if is_file_function(name):
        try:
            return file_function(name)
        except ProblemListError as error:
            raise Refused(*error.problems) from error
    known = reward_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}; one of yours is file.py:name"
        raise Refused(f"there is no reward {name!r:.60}. {advice}")
    return load_reward(name)


def _built(reward: type[Reward], options: Mapping[str, Any]) -> Reward:
    """A reward with its options, all of which are checked."""
    fields = {field.name: field for field in dataclasses.fields(reward)}
    hints = get_type_hints(reward)
    problems = []
    for key, value in options.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            advice = f"Did you mean {near[0]}?" if near else f"It has {', '.join(fields) or 'none'}"
            problems.append(f"{reward.name} has no option {key!r:.60}. {advice}")
        elif problem := _problem(value, hints[key], fields[key].metadata["option"]):
            problems.append(f"{reward.name}: {key} {problem}, not {value!r:.60}")
    required = [key for key, f in fields.items() if f.default is MISSING and f.default_factory is MISSING]
    problems += [f"{reward.name} needs {key}" for key in required if key not in options]
    if problems:
        raise Refused(*problems)
    try:
        return reward(**{str(key): value for key, value in options.items()})
    except ConfigError as error:
        raise Refused(*(f"{reward.name}: {problem}" for problem in error.problems)) from error


def _problem(value: Any, annotation: Any, info: OptionInfo) -> str | None:
    """What is wrong with the value of an option; None if nothing is."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = [get_origin(member) or member for member in members]
    if value is None and types.NoneType in kinds:
        return None
    if not any(_fits(value, kind) for kind in kinds):
        return f"must be {' or '.join(_KINDS[kind] for kind in kinds if kind is not types.NoneType)}"
    if info.choices is not None and value not in info.choices:
        return f"must be one of {', '.join(map(str, info.choices))}"
    if isinstance(value, (int, float)):
        broken = {
            f"above {info.gt}": info.gt is not None and not value > info.gt,
            f"at least {info.ge}": info.ge is not None and not value >= info.ge,
            f"below {info.lt}": info.lt is not None and not value < info.lt,
            f"at most {info.le}": info.le is not None and not value <= info.le,
        }
        return next((f"must be {limit}" for limit, is_broken in broken.items() if is_broken), None)
    return None


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST
    return kind is not types.NoneType and isinstance(value, kind)


def _weight(value: Any) -> float:
    if not _fits(value, float):
        raise Refused(f"`weight: {value!r:.40}` must be a finite number")
    return float(value)


def _columns_of_function(name: str, reward: Any) -> tuple[str, ...]:
    """Columns that a function of a user names without a default, which the data must have."""
    try:
        parameters = inspect.signature(reward).parameters
    except ValueError as error:
        raise Refused(f"{name} cannot be called as a reward ({error})") from error
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        advice = "a trainer passes every column of the data and more: end its parameters with **columns"
        raise Refused(f"{name} takes {', '.join(parameters) or 'nothing'}; {advice}")
    named = [
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    return tuple(key for key in named if key not in _FROM_THE_TRAINER)
