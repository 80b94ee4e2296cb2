"""Verdicts on synthetic logs of online runs, both ways."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from alignkit.reports.series import Verdict
from alignkit.runs.health import HealthMonitor

Curve = Callable[[float], float]


def logs(count: int = 40, every: int = 5, seed: int = 0, **curves: Curve) -> Iterator[tuple[int, dict[str, float]]]:
    """Logs of a run that learns, clips a little and keeps its length and entropy, but for some curves over 0..1."""
    draw = random.Random(seed)
    healthy: dict[str, Curve] = {
        "reward": lambda t: 0.3 + 0.4 * t + draw.gauss(0, 0.03),
        "frac_reward_zero_std": lambda t: 0.3 + draw.gauss(0, 0.05),
        "completions/mean_length": lambda t: 120 + 10 * t + draw.gauss(0, 6),
        "completions/length_reward_correlation": lambda t: 0.1 + draw.gauss(0, 0.1),
        "entropy": lambda t: 0.6 - 0.2 * t + draw.gauss(0, 0.02),
        "clip_ratio/region_mean": lambda t: 0.01 + abs(draw.gauss(0, 0.01)),
        "ratio/spread/position_4": lambda t: 0.02,
        "grad_norm": lambda t: 0.5 + abs(draw.gauss(0, 0.1)),
        "loss": lambda t: draw.gauss(0, 0.02),
    }
    named = {name.replace("__", "/"): curve for name, curve in curves.items()}
    for i in range(1, count + 1):
        yield i * every, {key: curve(i / count) for key, curve in (healthy | named).items()}


def verdicts(found: Iterator[tuple[int, dict[str, float]]]) -> list[Verdict]:
    monitor = HealthMonitor({"learning_rate": 1e-6})
    for step, log in found:
        monitor.observe(step, log)
    return monitor.verdicts


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_healthy(seed: int) -> None:
    assert verdicts(logs(seed=seed)) == []


def test_rewards_without_spread_are_the_reason_and_not_a_gradient_of_zero() -> None:
    (verdict,) = verdicts(logs(frac_reward_zero_std=lambda t: 1.0, grad_norm=lambda t: 0.0, entropy=lambda t: 0.6))
    assert verdict.name == "no_spread" and verdict.step == 25
    assert "no reward has spread" in verdict.title and "frac_reward_zero_std is 1" in verdict.evidence
    assert verdicts(logs(frac_reward_zero_std=lambda t: 0.8)) == []
    (other,) = verdicts(logs(grad_norm=lambda t: 0.0))
    assert other.name == "no_gradient", "rewards have spread, and still nothing moves"


def test_length_that_earns_the_reward() -> None:
    grows: dict[str, Curve] = {
        "completions/mean_length": lambda t: 100 + 200 * t,
        "completions/length_reward_correlation": lambda t: 0.5,
    }
    (verdict,) = verdicts(logs(**grows))
    assert verdict.name == "length_hacking" and "completions/mean_length rose from" in verdict.evidence
    assert "soft_overlong" in verdict.fixes[0]
    assert verdicts(logs(**grows | {"completions/length_reward_correlation": lambda t: 0.1})) == [], "not paid for"
    assert verdicts(logs(**grows | {"reward": lambda t: 0.3})) == [], "nothing is gained"
    assert verdicts(logs(**grows | {"completions/mean_length": lambda t: 100 + 20 * t})) == [], "hardly longer"


def test_entropy_that_is_lost_and_entropy_that_explodes() -> None:
    (lost,) = verdicts(logs(entropy=lambda t: 0.8 * (1 - t) + 0.01))
    assert lost.name == "entropy_collapse" and "entropy fell from" in lost.evidence
    (exploded,) = verdicts(logs(entropy=lambda t: 0.5 + 3 * t))
    assert exploded.name == "entropy_explosion" and exploded.fixes[0].startswith("learning_rate: 3e-07")
    assert verdicts(logs(entropy=lambda t: 0.03)) == [], "it began there"
    assert verdicts(logs(entropy=lambda t: 0.5 + 0.8 * t)) == []


def test_a_clip_that_never_acts() -> None:
    never: dict[str, Curve] = {"clip_ratio/region_mean": lambda t: 0.0}
    (verdict,) = verdicts(logs(**never))
    assert verdict.name == "inert_clip" and verdict.step == 50 and verdict.title == "the clip never acts"
    on_policy = never | {"ratio/spread/position_4": lambda t: 0.0}
    assert verdicts(logs(**on_policy)) == [], "usual, and said when the run began"
    (guarded,) = verdicts(logs(**on_policy | {"grpo_guard/kappa": lambda t: 1.0}))
    assert guarded.title.startswith("the guard") and "num_iterations: 2" in guarded.fixes[0]


def test_the_loss_of_completions_says_nothing() -> None:
    """Held-out loss that rises, or stays at 0, would be overfitting, collapse or a still model elsewhere."""
    found = list(logs(loss=lambda t: 3 * t))
    monitor = HealthMonitor({})
    monitor._series.max_steps = found[-1][0]
    for step, log in found:
        monitor.observe(step, log | {"eval_loss": 2 * step / found[-1][0], "eval_reward": log["reward"]})
    assert monitor.verdicts == []
