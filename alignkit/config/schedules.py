"""The learning-rate schedules and what each may be told in ``lr_scheduler_kwargs``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.config.settings import Settings
from alignkit.config.values import show

_WAVES = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class Setting:
    """One entry of ``lr_scheduler_kwargs``.

    Attributes:
        kind: ``int``, ``float`` or, with ``choices``, ``str``.
        least: Smallest value.
        most: Largest value, or None.
        choices: Admissible texts.
    """

    kind: type = float
    least: float = 0
    most: float | None = None
    choices: tuple[str, ...] = ()

    def admits(self, value: Any) -> bool:
        """Whether a value from YAML can be meant."""
        if self.choices:
            return value in self.choices
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or (self.kind is int and not isinstance(value, int)):
            return False
        return bool(value >= self.least) and (self.most is None or bool(value <= self.most))

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        upper = "" if self.most is None else f" and <= {self.most:g}"
        return f"a {'whole ' * (self.kind is int)}number >= {self.least:g}{upper}"


_SHARE = Setting(most=1)
_FLOOR = {"min_lr": Setting(), "min_lr_rate": _SHARE}
SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "linear": {},
    "cosine": {"num_cycles": Setting()},
    "cosine_with_restarts": {"num_cycles": Setting(int, least=1)},
    "cosine_with_min_lr": {"num_cycles": Setting(), **_FLOOR},
    "cosine_warmup_with_min_lr": {"num_cycles": Setting(), **_FLOOR, "warmup_lr_rate": _SHARE},
    "constant": {},
    "constant_with_warmup": {},
    "polynomial": {"lr_end": Setting(), "power": Setting()},
    "inverse_sqrt": {"timescale": Setting(int, least=1)},
    "warmup_stable_decay": {
        "num_decay_steps": Setting(int, least=1),
        "num_stable_steps": Setting(int),
        "warmup_type": Setting(choices=_WAVES),
        "decay_type": Setting(choices=_WAVES),
        "min_lr_ratio": _SHARE,
        "num_cycles": Setting(),
    },
}
"""Schedule to its settings, by the names that transformers gives them."""
NEEDED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), "{min_lr_rate: 0.1}"),
    "cosine_warmup_with_min_lr": (("min_lr", "min_lr_rate"), "{min_lr_rate: 0.1}"),
    "warmup_stable_decay": (("num_decay_steps",), "{num_decay_steps: 100}"),
}
"""Schedule to the settings of which exactly one must be there, and an example."""


def check_schedule(settings: Settings) -> None:
    """Report settings that the schedule has not, values it cannot take, and what it lacks."""
    values = settings.values
    schedule = values.get("lr_scheduler_type", "")
    if schedule not in SETTINGS or "lr_scheduler_kwargs" not in values:
        return
    given: Mapping[str, Any] = values["lr_scheduler_kwargs"] or {}
    key = "lr_scheduler_kwargs" if given else "lr_scheduler_type"
    for why, fix in _problems(schedule, given, values.get("learning_rate")):
        settings.report(key, why, fix)


def _problems(schedule: str, given: Mapping[str, Any], learning_rate: float | None) -> Iterator[tuple[str, str]]:
    known = SETTINGS[schedule]
    for name, value in given.items():
        if name not in known:
            yield f"has no setting {name} of lr_scheduler_type: {schedule}", _known_settings(schedule, name)
        elif not known[name].admits(value):
            yield f"cannot have {name}: {show(value)}", f"Write {known[name]}"
    one_of, example = NEEDED.get(schedule, ((), ""))
    found = [name for name in one_of if name in given]
    if one_of and len(found) != 1:
        needed = " or ".join(one_of)
        why = f"needs {needed}" if not found else f"gives {' and '.join(found)}, which say the same twice"
        yield f"{why} with lr_scheduler_type: {schedule}", f"Write lr_scheduler_kwargs: {example}"
    for name in ("min_lr", "lr_end"):
        end = given.get(name)
        if learning_rate is not None and isinstance(end, (int, float)) and name in known and end >= learning_rate:
            yield f"ends at {name}: {end:g}, no less than learning_rate: {learning_rate:g}", "Write a smaller one"


def _known_settings(schedule: str, name: str) -> str:
    known = SETTINGS[schedule]
    if near := difflib.get_close_matches(name, known, n=1):
        return f"Did you mean {near[0]}?"
    if known:
        return f"Its settings are {', '.join(known)}"
    having = [other for other, settings in SETTINGS.items() if name in settings]
    return f"It has none; {', '.join(having)} would have it" if having else "It has none: remove it"
