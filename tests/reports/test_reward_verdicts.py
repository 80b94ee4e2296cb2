"""Verdicts on reward models, on synthetic logs, both ways."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from alignkit.runs.health import HealthMonitor

Curve = Callable[[float], float]
SETTINGS = {"learning_rate": 1e-4, "eval_rows": 400}


def verdicts(centre: Curve, margin: Curve, held_out: Curve, count: int = 30, seed: int = 0) -> list[str]:
    """Names of the verdicts on a run whose curves are these over 0..1; its loss falls and stays low when held out."""
    draw = random.Random(seed)
    monitor = HealthMonitor(SETTINGS)
    monitor._series.max_steps = count * 5
    monitor.observe(0, {"eval_loss": 0.7, "eval_accuracy": 0.5, "eval_mean_reward": 0.0, "eval_margin": 0.0})
    for i in range(1, count + 1):
        t = i / count
        values = {"mean_reward": centre(t) + draw.gauss(0, 0.1), "margin": margin(t) + draw.gauss(0, 0.1)}
        monitor.observe(
            i * 5, {"loss": 0.7 - 0.3 * t + draw.gauss(0, 0.02), "grad_norm": 1.0, "accuracy": 0.7, **values}
        )
        if i % 10 == 0:
            monitor.observe(i * 5, {"eval_loss": 0.7 - 0.1 * t, "eval_accuracy": held_out(t)})
    return [verdict.name for verdict in monitor.verdicts]


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_learns_about_its_centre_is_healthy(seed: int) -> None:
    assert verdicts(lambda t: 0.5 * t, lambda t: t, lambda t: 0.5 + 0.2 * t, seed=seed) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_rewards_that_drift_together(sign: int) -> None:
    assert verdicts(lambda t: sign * 9 * t, lambda t: t, lambda t: 0.7) == ["centre_drift"]


def test_a_centre_that_is_far_off_and_stays_there_or_is_small_beside_the_margin_is_no_drift() -> None:
    assert verdicts(lambda t: 9.0, lambda t: t, lambda t: 0.7) == []
    assert verdicts(lambda t: 9 * t, lambda t: 6 * t, lambda t: 0.7) == []


def test_held_out_pairs_that_are_guessed() -> None:
    assert verdicts(lambda t: 0.0, lambda t: t, lambda t: 0.52) == ["guessing"]
    assert verdicts(lambda t: 0.0, lambda t: t, lambda t: 0.56) == []
