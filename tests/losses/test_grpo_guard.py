"""``grpo_guard_loss`` against its equations, and the invariants of its specification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from alignkit.losses.grpo_guard import Guard, grpo_guard_loss
from alignkit.losses.types import LossOutput
from tests import guard_oracles as oracles
from tests.guard_oracles import Guarded, Past, Rules
from tests.losses.batches import metric_mean
from tests.losses.policies import changed, policy_batch, random_completions, slopes
from tests.losses.test_grpo import EDGES, EXTREMES, TIGHT, arguments
from tests.policy_oracles import Completion, Settings, Token

TOKEN_RULES = [
    Rules("entropy", scale="fisher", center="exact_kl", mode="full", reweight="bucket_rms", alpha=0.5),
    Rules(mode="full", reweight="inverse_kappa", kappa_max=1.05, kappa_min=0.95),
    Rules("position", ema=0.5, mode="full", min_count=1),
    Rules("entropy", scale="fixed", center="k3", mode="full", reweight="bucket_rms", min_count=5),
    Rules("position", mode="full", reweight="inverse_kappa", min_count=8),
    Rules("entropy", center="none", mode="gate", reweight="bucket_rms", wmax=1.1),
    Rules("position", scale="none", center="logmean", mode="full"),
    Rules("position", num_steps=6, mode="full", reweight="bucket_rms", min_count=1),
    Rules(ema=0.5, center="k3", scale="none", min_count=12),
    Rules(num_steps=2, scale="fisher", center="none", min_count=1000),
    Rules(),
    Rules(ema=0.5, mode="full"),
]
SEQUENCE_RULES = [
    Rules("length", 1, "sqrt_length", "logmean"),
    Rules("length", 2, "pooled", "exact_kl", "full", "bucket_rms"),
    Rules("length", 6, "pooled", "logmean", "full", "bucket_rms", min_count=1),
]
OFF = Rules(scale="none", center="none", min_count=1)
"""A guard that does nothing."""
CERTAIN = Token(policy=-0.4, old=0.0, advantage=1.5, old_entropy=0.6, entropy=0.6, sum_sq_probs=1 - 1e-6)
"""The old policy was certain, but for the last digits of its squared probabilities."""


def arguments_of(s: Settings, rules: Rules) -> dict[str, Any]:
    """The same settings as arguments of the loss."""
    found = arguments(s)
    del found["sapo_temperatures"]
    return {**found, "guard": Guard(**asdict(rules))}


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equations say about some batches; the mutation check calls it with broken losses."""
    batches = [[c[:2] for c in random_completions(10, count=6)], *(random_completions(s, count=8) for s in (11, 12))]
    batches[2].append([CERTAIN])
    token = Settings("dapo", low=0.15, high=0.2, longest=6)
    for rules in TOKEN_RULES:
        check_case(loss, batches if rules.ema else batches[2:], token, rules)
    for rules in SEQUENCE_RULES:
        check_case(loss, batches[1:2], replace(token, level="sequence", low=0.1, high=0.1), rules)
    more = replace(token, aggregation="grpo", delta=1.25, beta=0.1, entropy_coef=0.1)
    bare = ("old_sum_sq_probs", "old_policy_kl", "correction")
    check_case(loss, batches[2:], more, Rules("entropy", mode="full"), without=bare)
    check_case(loss, batches[2:], more, Rules("entropy", reweight="bucket_rms"), without=(*bare, "kept"))
    check_case(loss, batches[2:], more, Rules("entropy", reweight="bucket_rms"), without=("old_token_logps",))
    check_case(loss, [[EDGES]], replace(token, low=0.0, high=0.0), OFF)
    check_extremes(loss)
    check_nothing_kept(loss)


def check_extremes(loss: Callable[..., LossOutput]) -> None:
    """No ratio overflows, whatever is taken off and whatever it is multiplied with."""
    for center in ("none", "logmeanexp", "k3"):
        for mode in ("gate", "full"):
            batch = changed(policy_batch([EXTREMES] * 2), lambda _, t: t.float() if t.is_floating_point() else t)
            guard = Guard(scale="fixed", fixed_std=200.0, kappa_max=5.0, min_count=1, num_steps=1)
            output = loss(batch, guard=dataclasses.replace(guard, center=center, mode=mode, reweight="bucket_rms"))
            assert all(term.values.isfinite().all() for term in output.terms)
            assert slopes(output, batch).isfinite().all()
            assert all(metric.values.isfinite().all() for metric in output.metrics.values())


def check_nothing_kept(loss: Callable[..., LossOutput]) -> None:
    """A batch of which nothing counts, though its steps are known from an earlier one, has no gradient."""
    completions = random_completions(11, count=7)
    for scale, reweight in (("fisher", "inverse_kappa"), ("pooled", "bucket_rms")):
        rules = Guard(scale=scale, reweight=reweight, mode="full", ema=0.9, min_count=1, num_steps=3)
        batch = policy_batch(completions)
        loss(batch, guard=rules)
        empty = changed(batch, lambda name, t: t & False if name == "kept" else t, memory=batch.memory)
        output = loss(empty, guard=rules)
        assert output.mean().item() == 0.0 and not slopes(output, empty).any()


def check_case(
    loss: Callable[..., LossOutput],
    batches: list[list[Completion]],
    s: Settings,
    rules: Rules,
    without: tuple[str, ...] = (),
) -> None:
    """Batch after batch with one memory."""
    memory: dict[str, torch.Tensor] = {}
    past = Past()
    for given in batches:
        completions = [[seen_without(token, without) for token in completion] for completion in given]
        batch = changed(policy_batch(completions, longest=s.longest, without=without), lambda _, t: t, memory=memory)
        output = loss(batch, **arguments_of(s, rules))
        expected = oracles.grpo_guard(
            completions,
            s,
            rules,
            past=past,
            exact="old_sum_sq_probs" not in without,
            off_policy="old_token_logps" not in without,
        )
        past = expected.past
        assert output.mean().item() == pytest.approx(expected.outcome.loss, **TIGHT)
        gradient = slopes(output, batch)
        wanted = [slope for row in expected.outcome.gradient for slope in row]
        assert gradient[batch.completion_mask].tolist() == pytest.approx(wanted, **TIGHT)
        assert not gradient[~batch.completion_mask].any()
        check_metrics(output, expected, completions, s)
    assert bool(memory) == (rules.ema > 0)


def seen_without(token: Token, without: tuple[str, ...]) -> Token:
    """The token as a loss sees it that is not given these fields."""
    token = replace(token, kept=True) if "kept" in without else token
    token = replace(token, correction=1.0) if "correction" in without else token
    return replace(token, old=token.policy) if "old_token_logps" in without else token


def check_metrics(output: LossOutput, expected: Guarded, completions: list[Completion], s: Settings) -> None:
    """The guard's own, by row; clipping by token."""
    rows = [row for of in expected.rows for row in of]
    pairs = [
        (row, token.advantage)
        for of, completion in zip(expected.rows, completions, strict=True)
        for row, token in zip(of if s.level == "token" else of * len(completion), completion, strict=True)
    ]
    got = {key: metric_mean(metric) for key, metric in output.metrics.items()}
    for key, clips in {
        "clip_ratio/low_mean": lambda r, a: r.normalized < 1 - s.low and a < 0,
        "clip_ratio/high_mean": lambda r, a: r.normalized > 1 + s.high and a > 0,
        "grpo_guard/raw_clip_low": lambda r, a: oracles.math.exp(r.log_ratio) < 1 - s.low and a < 0,
        "grpo_guard/raw_clip_high": lambda r, a: oracles.math.exp(r.log_ratio) > 1 + s.high and a > 0,
    }.items():
        assert got[key] == pytest.approx(oracles.mean([clips(row, a) for row, a in pairs]), **TIGHT), key
    for key, value in {
        "ratio/mean": lambda r: oracles.math.exp(r.log_ratio),
        "grpo_guard/ratio_mean": lambda r: r.normalized,
        "grpo_guard/ratio_mean_square": lambda r: r.normalized**2,
        "grpo_guard/kappa": lambda r: r.kappa,
        "grpo_guard/guarded": lambda r: float(r.guarded),
    }.items():
        assert got[key] == pytest.approx(oracles.mean([value(row) for row in rows]), **TIGHT), key
    assert not any(metric.values.requires_grad for metric in output.metrics.values())


def test_agrees_with_the_equations() -> None:
    check_loss(grpo_guard_loss)
