"""Adapters of PEFT's other kinds."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from transformers import PreTrainedModel

from alignkit.errors import ConfigError

SETTLED = {field.name for field in dataclasses.fields(PeftConfig)}
"""What PEFT's configurations of all kinds have: it says whose adapter it is, which a run knows."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("c3a", "fourierft", "waveft"), {"init_weights": True}),
    "ia3": {"feedforward_modules": []},
    "ln_tuning": {"target_modules": None},
}
"""Where PEFT's own defaults will not do: the model is to start as the base, which is its reference, and all linear
layers are to be changed; normalisation layers are chosen by PEFT, which knows them by the type of the model."""


def check(config: Any) -> None:
    """Compare the options with those that PEFT's configuration of this kind has.

    Raises:
        ConfigError: Lists those that it has not, and values of another type.
    """
    hints = _hints(config.peft_type)
    problems = list(_problems(config, hints))
    if not problems:
        try:
            adapter_config(config)
        except (ValueError, TypeError) as error:
            problems = [f"`peft_options`: PEFT refuses them: {error}"]
    if problems:
        raise ConfigError(f"the options of peft_type {config.peft_type} cannot be used", problems)


def prepare(config: Any, model: PreTrainedModel) -> PeftConfig:
    """PEFT's configuration of the adapter a run starts."""
    return adapter_config(config)


def attach(config: Any, trainer: Any) -> None:
    """Nothing: it trains as the trainer does."""


def adapter_config(config: Any) -> PeftConfig:
    """The same, whatever the model."""
    kind = config.peft_type
    options = {"target_modules": "all-linear", **DEFAULTS.get(kind, {}), **(config.peft_options or {})}
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()](task_type="CAUSAL_LM", **options)


def _hints(kind: str) -> dict[str, Any]:
    """Annotation by name of the options of a kind."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()]
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name not in SETTLED}


def _problems(config: Any, hints: dict[str, Any]) -> Iterator[str]:
    for name, value in (config.peft_options or {}).items():
        if name in SETTLED:
            yield f"`peft_options`: {name} is settled by the run. Remove it"
        elif name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            advice = f"Did you mean {near[0]}?" if near else f"Its options are {', '.join(hints)}"
            yield f"`peft_options`: {name} is not an option of peft_type {config.peft_type}. {advice}"
        elif not _fits(value, hints[name]):
            yield f"`peft_options`: {name} is {value!r}, expected {_words(hints[name])}. Write such a value"


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value from YAML can be meant for a field with this annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list or annotation is list:
        return isinstance(value, list) and all(_fits(item, member) for item in value for member in arguments[:1])
    if origin is dict or annotation is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values() if arguments)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return value in [member.value for member in annotation]
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation in (int, bool, str, types.NoneType):
        return type(value) is annotation
    return True


def _words(annotation: Any) -> str:
    """An annotation as it is written in PEFT."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
