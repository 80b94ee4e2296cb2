"""What would never happen in a run is said when it begins, with the key, the number of steps and what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from alignkit.gradients._schedule import ScheduleCheck, acts
from alignkit.parts.method import AnchorSchedule
from alignkit.parts.rule import load_rule
from alignkit.references._anchor import still
from alignkit.sampling.refresh import SampleRefresh
from tests.runs.saved import arguments

MAX_STEPS = 8


@pytest.mark.parametrize("name", ["glad", "perpgrad"])
@pytest.mark.parametrize(
    ("warmup", "options", "advice"),
    [
        (0, {}, None),
        (7, {}, None),
        (8, {}, "rule_in_warmup: true, or warmup_steps below 8"),
        (50, {}, "rule_in_warmup: true, or warmup_steps below 8"),
        (50, {"rule_in_warmup": True}, None),
        (0, {"every_k": 50}, None),
        (1, {"every_k": 7}, None),
        (1, {"every_k": 8}, "every_k: 1"),  # the ninth step
    ],
)
def test_a_rule_that_never_acts(
    name: str, warmup: int, options: dict[str, Any], advice: str | None, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if name == "perpgrad":
        options, advice = {}, None
    args, chosen = arguments(tmp_path, warmup_steps=warmup), load_rule(name).options(**options)
    ScheduleCheck(name, chosen).on_train_begin(args, TrainerState(max_steps=MAX_STEPS), TrainerControl())
    printed = capsys.readouterr().out
    if advice is None:
        assert printed == ""
    else:
        assert f"gradient_rule: {name} never acts" in printed and "the run has 8. " in printed
        assert f"Write {advice}." in printed and (f"warms up, {warmup} steps" in printed) == (warmup >= MAX_STEPS)
    taken = (TrainerState(global_step=step, max_steps=MAX_STEPS) for step in range(MAX_STEPS))
    assert any(acts(chosen, args, state) for state in taken) == (advice is None)


@pytest.mark.parametrize(
    ("schedule", "key"),
    [
        (AnchorSchedule("ema"), None),
        (AnchorSchedule("periodic", steps=7), None),
        (AnchorSchedule("periodic", steps=8), "anchor_steps"),
        (AnchorSchedule("periodic", window=100, steps=1), None),
        (AnchorSchedule("kl_triggered", window=7), None),
        (AnchorSchedule("kl_triggered", window=10), "anchor_window"),
    ],
)
def test_an_anchor_that_never_moves(schedule: AnchorSchedule, key: str | None) -> None:
    said = still(schedule, MAX_STEPS)
    if key is None:
        assert said is None
    else:
        assert said is not None and f"anchor: {schedule.kind} never moves" in said and "the run has 8 steps" in said
        assert f"Write {key} below 8" in said


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (1, "sample_refresh_steps 1: every step the samples"),
        (7, "sample_refresh_steps 7: every 7 steps the samples"),
        (8, "sample_refresh_steps 8: the samples are never drawn anew in this run, which has 8 steps"),
    ],
)
def test_samples_that_are_never_refreshed(steps: int, words: str) -> None:
    trainer: Any = None
    resampler: Any = None
    warning = SampleRefresh(trainer, resampler, steps).warning(MAX_STEPS)
    assert words in warning and ("Write sample_refresh_steps below 8, or 0" in warning) == (steps == 8)
