"""What schedules may be told."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from alignkit.config.schedules import NEEDED, SETTINGS
from tests.configs.cases import load, problems_of

pytestmark = pytest.mark.usefixtures("workspace")
OF_A_RUN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
COSINE = "cosine_with_min_lr"


def test_settings_are_those_of_transformers() -> None:
    for schedule, settings in SETTINGS.items():
        parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters
        assert set(settings) == set(parameters) - OF_A_RUN, schedule
    assert all(set(names) <= set(SETTINGS[schedule]) for schedule, (names, _) in NEEDED.items())


@pytest.mark.parametrize(
    ("schedule", "given", "expected"),
    [
        (COSINE, None, "needs min_lr or min_lr_rate"),
        (COSINE, {"min_lr": 1e-7, "min_lr_rate": 0.1}, "gives min_lr and min_lr_rate, which say the same twice"),
        (COSINE, {"min_lr_rat": 0.1, "min_lr": 0.0}, "has no setting min_lr_rat of lr_scheduler_type: cosine_with_min"),
        (COSINE, {"min_lr_rate": 1.5}, "Write a number >= 0 and <= 1"),
        (COSINE, {"min_lr": 1e-3}, "ends at min_lr: 0.001, no less than learning_rate: 0.0001. Write a smaller one"),
        ("cosine_with_restarts", {"num_cycles": 2.5}, "cannot have num_cycles: 2.5. Write a whole number >= 1"),
        ("polynomial", {"lr_end": 1e-4}, "ends at lr_end: 0.0001, no less than"),
        ("polynomial", {"power": "2"}, "cannot have power: '2'. Write a number >= 0"),
        ("warmup_stable_decay", {"num_stable_steps": 3}, "needs num_decay_steps with lr_scheduler_type: warmup_st"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "root"}, "Write one of linear, cosine, 1-sqrt"),
        ("linear", {"num_cycles": 3}, "It has none; cosine, cosine_with_restarts"),
        ("constant", {"speed": 3}, "It has none: remove it"),
    ],
)
def test_what_a_schedule_cannot_be_told(schedule: str, given: dict[str, Any] | None, expected: str) -> None:
    changes = {"lr_scheduler_type": schedule, "learning_rate": 1e-4, "lr_scheduler_kwargs": given}
    (problem,) = problems_of(changes)
    assert expected in problem


@pytest.mark.parametrize("schedule", SETTINGS)
def test_every_setting_is_accepted(schedule: str) -> None:
    values = {name: each.choices[0] if each.choices else 1 for name, each in SETTINGS[schedule].items()}
    values |= {name: 1e-7 for name in ("lr_end",) if name in values}
    values.pop("min_lr", None)
    loaded = load({"lr_scheduler_type": schedule, "lr_scheduler_kwargs": values})
    assert loaded.config.lr_scheduler_kwargs == values
