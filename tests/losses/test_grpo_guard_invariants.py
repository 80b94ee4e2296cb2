"""What must hold of GRPO-Guard-style clipping whatever the batch: the invariants of its specification."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.losses.grpo import CLIPPED, ITEMS, Regularizers, grpo_loss, log_ratios
from alignkit.losses.grpo_guard import Guard, Normalization, grpo_guard_loss, normalization
from alignkit.losses.step_statistics import axis_values, counted_rows, step_bounds, steps_of
from alignkit.losses.types import LossOutput, PolicyBatch
from tests.losses.batches import metric_mean
from tests.losses.policies import changed, policy_batch, random_completions, slopes
from tests.policy_oracles import Completion, Token

SCALES, CENTERS = ("pooled", "fisher", "fixed", "none"), ("logmean", "logmeanexp", "exact_kl", "k3", "none")
MODES, REWEIGHTS = ("full", "gate"), ("none", "inverse_kappa", "bucket_rms")
FEW = Guard(num_steps=3, min_count=2, kappa_min=1e-3, kappa_max=1e3)
"""For small batches, with bounds of kappa that nothing meets."""


def a_batch(seed: int = 21, count: int = 14, **given: Any) -> PolicyBatch:
    return policy_batch(random_completions(seed, count), longest=6, **given)


def on_policy(batch: PolicyBatch) -> PolicyBatch:
    """The batch with the old policy's log-probs those of the policy."""
    same = batch.policy_token_logps.detach().clone()
    return changed(batch, lambda name, t: same if name == "old_token_logps" else t)


def assert_same(output: LossOutput, batch: PolicyBatch, other: LossOutput, other_batch: PolicyBatch) -> None:
    """Equal losses, terms and gradients."""
    torch.testing.assert_close(output.mean(), other.mean(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slopes(output, batch), slopes(other, other_batch), rtol=1e-12, atol=1e-14)
    for term, same in zip(output.terms, other.terms, strict=True):
        torch.testing.assert_close(term.values, same.values, rtol=1e-12, atol=1e-14)


def found(batch: PolicyBatch, guard: Guard, level: str = "token") -> tuple[Normalization, Tensor, Tensor, Tensor]:
    """The normalisation, l_hat, the step of each row, and which rows count."""
    log_ratio = log_ratios(batch, level).detach()
    result = normalization(batch, log_ratio, level, guard)
    counted, axis = counted_rows(batch, level), axis_values(batch, level, guard.step_axis)
    steps = steps_of(axis, step_bounds(axis[counted], guard.step_axis, guard.num_steps, batch.max_completion_length))
    return result, result.kappa * log_ratio + result.offset, steps, counted


def by_step(values: Tensor, steps: Tensor, counted: Tensor, count: int) -> list[Tensor]:
    return [values[counted & (steps == b)] for b in range(count)]


# It reduces to GRPO.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", CLIPPED)
def test_r1_switched_off_it_is_grpo(mode: str, level: str, aggregation: str) -> None:
    axis = "length" if level == "sequence" else "entropy"
    guard = Guard(axis, 3, scale="none", center="none", mode=mode, min_count=1)
    options: dict[str, Any] = {
        "level": level, "aggregation": aggregation, "epsilon_low": 0.1, "epsilon_high": 0.15, "delta": 1.2,
        "regularizers": Regularizers(0.1, True, 0.1),
    }  # fmt: skip
    batch = a_batch()
    assert_same(grpo_guard_loss(batch, guard=guard, **options), batch, grpo_loss(batch, **options), batch)


@pytest.mark.parametrize("mode", MODES)
def test_r2_on_policy_it_is_grpo(mode: str) -> None:
    """In mode full but for the scales that do not follow the spread of the ratios: they would scale the gradient."""
    scales = ("pooled", "none") if mode == "full" else SCALES
    centers = [center for center in CENTERS if center != "exact_kl"]  # where the policy is the old one, KL is 0
    for scale, center, axis in itertools.product(scales, centers, ("position", "position_quantile", "entropy")):
        guard = dataclasses.replace(FEW, step_axis=axis, scale=scale, center=center, mode=mode)
        batch = on_policy(a_batch())
        assert_same(grpo_guard_loss(batch, guard=guard), batch, grpo_loss(batch), batch)


@pytest.mark.parametrize("mode", MODES)
def test_r3_one_step_scaled_to_its_own_spread_is_grpo(mode: str) -> None:
    guard = Guard(num_steps=1, center="none", mode=mode, min_count=1)
    batch = a_batch()
    assert_same(grpo_guard_loss(batch, guard=guard), batch, grpo_loss(batch), batch)


# What the normalisation does.


@pytest.mark.parametrize("axis", ["position", "position_quantile", "entropy"])
def test_every_step_has_mean_ratio_one_and_the_same_spread(axis: str) -> None:
    batch = a_batch(count=60)
    _, l_hat, steps, counted = found(batch, dataclasses.replace(FEW, step_axis=axis))
    log_ratio = log_ratios(batch, "token").detach()
    raw = by_step(log_ratio, steps, counted, 3)
    means = [of.exp().mean().item() for of in by_step(l_hat, steps, counted, 3)]
    spreads = [of.std(correction=0).item() for of in by_step(l_hat, steps, counted, 3)]
    assert means == pytest.approx([1.0] * 3, abs=1e-6)
    assert spreads == pytest.approx([spreads[0]] * 3, rel=1e-6)
    pooled = sum(len(of) * of.var(correction=0).item() for of in raw) / sum(map(len, raw))
    assert spreads[0] ** 2 == pytest.approx(pooled, rel=1e-6), "the spread that they share is that of before"
    assert max(of.std().item() for of in raw) > 1.5 * min(of.std().item() for of in raw)


def test_the_log_mean_is_zero_under_logmean() -> None:
    _, l_hat, steps, counted = found(a_batch(count=40), dataclasses.replace(FEW, center="logmean"))
    assert [of.mean().item() for of in by_step(l_hat, steps, counted, 3)] == pytest.approx([0.0] * 3, abs=1e-12)


def test_a_drift_that_all_of_a_step_share_is_taken_off() -> None:
    guard = dataclasses.replace(FEW, step_axis="position", mode="full")
    batch = a_batch()
    drift = torch.tensor([0.7, 0.7, -0.4, -0.4, 0.2, 0.2, 0.0], dtype=torch.float64)
    moved = changed(batch, lambda name, t: t + drift if name == "policy_token_logps" else t)
    before, after = found(batch, guard)[1], found(moved, guard)[1]
    mask = batch.completion_mask
    torch.testing.assert_close(after[mask], before[mask], rtol=1e-12, atol=1e-12)


def test_one_inflated_sequence_is_still_clipped() -> None:
    """What is taken off is the drift of a step, never that of a sequence: there the clip has to hold."""
    usual = [[Token(-1.0 + 0.01 * (-1) ** t, -1.0, advantage=-0.1) for t in range(6)] for _ in range(15)]
    inflated = [Token(-0.5, -1.0, advantage=1.0) for _ in range(6)]
    batch = policy_batch([*usual, inflated], longest=6)
    for axis, mode, center in itertools.product(("position", "position_quantile"), MODES, ("logmean", "logmeanexp")):
        guard = dataclasses.replace(FEW, step_axis=axis, mode=mode, center=center, kappa_min=0.25, kappa_max=4.0)
        output = grpo_guard_loss(batch, guard=guard)
        assert not slopes(output, batch)[-1].any(), "its gradient is gone, as under GRPO"
        assert output.metrics["clip_ratio/high_mean"].values[-1] == 6
    longest = Guard("length", 1, "sqrt_length", "logmean", min_count=2)
    output = grpo_guard_loss(batch, guard=longest, level="sequence")
    assert not slopes(output, batch)[-1].any()


def test_kappa_stays_between_its_bounds() -> None:
    batch = a_batch(count=30)
    for scale in ("pooled", "fisher", "fixed"):
        guard = dataclasses.replace(FEW, scale=scale, fixed_std=5.0, kappa_min=0.95, kappa_max=1.05)
        kappa = found(batch, guard)[0].kappa
        assert kappa.min() >= 0.95 and kappa.max() <= 1.05 and (kappa != 1).any()


@pytest.mark.parametrize("reweight", REWEIGHTS)
def test_weights_have_the_mean_one(reweight: str) -> None:
    for mode, scale in itertools.product(MODES, SCALES):
        result, _, _, counted = found(a_batch(), dataclasses.replace(FEW, mode=mode, scale=scale, reweight=reweight))
        assert result.weight[counted].mean().item() == pytest.approx(1.0, rel=1e-12)


def test_a_step_with_few_rows_is_left_alone() -> None:
    batch = a_batch(count=10)
    for scale, center, reweight in itertools.product(SCALES, CENTERS, REWEIGHTS):
        guard = dataclasses.replace(FEW, step_axis="position", scale=scale, center=center, reweight=reweight)
        _, _, steps, counted = found(batch, guard)
        sizes = [int((counted & (steps == b)).sum()) for b in range(3)]
        guard = dataclasses.replace(guard, min_count=max(sizes))
        result, l_hat, _, _ = found(batch, guard)
        few = batch.completion_mask & (torch.tensor(sizes)[steps] < max(sizes))
        assert few.any() and not result.guarded[few].any() and result.guarded[batch.completion_mask & ~few].all()
        assert torch.equal(l_hat[few], log_ratios(batch, "token").detach()[few])
        assert torch.equal(result.weight[few], torch.ones_like(result.weight[few]))


# What it must not depend on.


def test_what_stands_at_masked_positions_is_never_read() -> None:
    batch = a_batch()
    hidden = ~batch.completion_mask
    clean = changed(batch, lambda name, t: t if t.dtype == torch.bool or t.dim() < 2 else t.masked_fill(hidden, 0.0))
    for center, scale, reweight in itertools.product(CENTERS, SCALES, REWEIGHTS):
        guard = dataclasses.replace(FEW, step_axis="entropy", center=center, scale=scale, reweight=reweight)
        assert_same(grpo_guard_loss(batch, guard=guard), batch, grpo_guard_loss(clean, guard=guard), clean)


def test_the_order_of_completions_does_not_matter() -> None:
    batch = a_batch()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    shuffled = changed(batch, lambda _, t: t[order])
    for reweight in REWEIGHTS:
        guard = dataclasses.replace(FEW, reweight=reweight, mode="full")
        before, after = grpo_guard_loss(batch, guard=guard), grpo_guard_loss(shuffled, guard=guard)
        torch.testing.assert_close(after.terms[0].values, before.terms[0].values[order], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(slopes(after, shuffled), slopes(before, batch)[order], rtol=1e-12, atol=1e-13)


class Processes:
    """Processes that run one after another: the first round hands over what they gather, the second uses it."""

    def __init__(self, count: int) -> None:
        self.handed: list[list[Tensor]] = [[] for _ in range(count)]

    def first(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gather(values: Tensor) -> Tensor:
            self.handed[rank].append(values)
            return values

        return gather

    def second(self) -> Callable[[Tensor], Tensor]:
        rounds = iter(zip(*self.handed, strict=True))
        return lambda values: torch.cat(next(rounds))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [(slice(0, 5), slice(5, 14)), (slice(0, 14), slice(13, 14))], ids=["even", "empty"])
def test_processes_agree_with_their_concatenation(level: str, rows: tuple[slice, slice]) -> None:
    """Also where one has nothing to add; each asks for the others' rows once."""
    axis = "length" if level == "sequence" else "position_quantile"
    for center, scale, reweight in itertools.product(("logmeanexp", "k3"), ("pooled", "none"), REWEIGHTS):
        guard = dataclasses.replace(
            FEW, step_axis=axis, center=center, scale=scale, reweight=reweight, mode="full", ema=0.5
        )
        whole = changed(a_batch(), lambda _, t: t, memory={})
        # The last completion has no token: a process with it alone has no rows.
        shards = [changed(whole, lambda _, t, of=of: t[of]) for of in rows]
        grpo_guard_loss(whole, guard=guard, level=level)
        processes = Processes(2)
        for rank, shard in enumerate(shards):
            grpo_guard_loss(
                dataclasses.replace(shard, gather=processes.first(rank), memory={}), guard=guard, level=level
            )
        assert [len(handed) for handed in processes.handed] == [1, 1]
        for of, shard in zip(rows, shards, strict=True):
            memory: dict[str, Tensor] = {}
            result = normalization(
                dataclasses.replace(shard, gather=processes.second(), memory=memory),
                log_ratios(shard, level).detach(), level, guard,
            )  # fmt: skip
            expected = normalization(
                dataclasses.replace(whole, memory={}), log_ratios(whole, level).detach(), level, guard
            )
            for name in ("kappa", "offset", "weight", "guarded"):
                assert torch.equal(getattr(result, name), getattr(expected, name)[of]), name
            assert all(torch.equal(memory[key], whole.memory[key]) for key in whole.memory) and memory


# Gradients.


@pytest.mark.parametrize("mode", MODES)
def test_statistics_carry_no_gradient(mode: str) -> None:
    """The gradient is that of the formula with kappa, offset and weight held constant."""
    guard = dataclasses.replace(FEW, mode=mode, reweight="bucket_rms")
    batch = a_batch(without=("kept", "correction"))
    constant = normalization(batch, log_ratios(batch, "token").detach(), "token", guard)
    output = grpo_guard_loss(batch, guard=guard, aggregation="grpo")
    mask, logps = batch.completion_mask, batch.policy_token_logps
    log_ratio = torch.where(mask, logps - batch.old_token_logps, 0.0)
    r_hat, adv = (constant.kappa * log_ratio + constant.offset).exp(), torch.where(mask, batch.advantages, 0.0)
    s = -torch.minimum(r_hat * adv, r_hat.clamp(0.8, 1.2) * adv)
    if mode == "gate":
        held = ((adv > 0) & (r_hat > 1.2)) | ((adv < 0) & (r_hat < 0.8))
        s = torch.where(held, -r_hat.detach().clamp(0.8, 1.2) * adv, -log_ratio.exp() * adv)
    loss = torch.where(mask, constant.weight * s, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    (expected,) = torch.autograd.grad(loss.mean(), logps)
    torch.testing.assert_close(output.mean(), loss.mean(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(slopes(output, batch), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck_with_the_statistics_held(level: str) -> None:
    """They come from the gathered rows alone, so a gather that hands out the same rows holds them."""
    axis = "length" if level == "sequence" else "entropy"
    for mode, reweight in itertools.product(MODES, ("none", "bucket_rms")):
        guard = dataclasses.replace(FEW, step_axis=axis, mode=mode, reweight=reweight, min_count=1)
        batch, processes = a_batch(count=5), Processes(1)
        batch = changed(batch, lambda _, t: t.nan_to_num(0.0, 0.0, 0.0), gather=processes.first(0))
        grpo_guard_loss(batch, guard=guard, level=level)

        def loss(
            logps: Tensor, batch: PolicyBatch = batch, guard: Guard = guard, rows: Tensor = processes.handed[0][0]
        ) -> Tensor:
            given = dataclasses.replace(batch, policy_token_logps=logps, gather=lambda values: rows)
            return grpo_guard_loss(given, guard=guard, level=level, epsilon_low=0.1).mean()

        assert torch.autograd.gradcheck(loss, (batch.policy_token_logps,), eps=1e-6, atol=1e-8, rtol=1e-6)


# Smoothing over batches.


def test_a_smoothed_step_is_measured_once_enough_batches_have_been_seen() -> None:
    guard = dataclasses.replace(FEW, num_steps=1, min_count=40, ema=0.9)
    memory: dict[str, Tensor] = {}
    shares = []
    for seed in range(3):
        batch = changed(a_batch(seed, count=10), lambda _, t: t, memory=memory)
        shares.append(metric_mean(grpo_guard_loss(batch, guard=guard).metrics["grpo_guard/guarded"]))
    assert shares[0] == 0.0 and shares[-1] == 1.0


# FSPO, by sums and its own band.


def fspo_gradient_rows(completions: list[Completion], band: float) -> list[bool]:
    """Whether a completion's surrogate still moves: S within mu n +- c sqrt(n) on the side its advantage pushes to."""
    sums = [math.fsum(t.log_ratio for t in c) for c in completions]
    drift = math.fsum(s / len(c) for s, c in zip(sums, completions, strict=True)) / len(completions)
    moves = []
    for s, c in zip(sums, completions, strict=True):
        off, edge = s - drift * len(c), band * math.sqrt(len(c))
        moves.append(c[0].advantage != 0 and not (off > edge if c[0].advantage > 0 else off < -edge))
    return moves


@pytest.mark.parametrize("band", [0.1, 0.3, 0.6])
def test_at_level_sequence_the_band_is_that_of_fspo(band: float) -> None:
    completions = [c for c in random_completions(31, count=40) if c]
    completions = [[replace(t, kept=True, correction=1.0) for t in c] for c in completions]
    batch = policy_batch(completions, longest=6)
    average = sum(map(len, completions)) / len(completions)
    high = math.exp(band / math.sqrt(average)) - 1
    low = 1 - math.exp(-band / math.sqrt(average))
    guard = Guard("length", 1, "sqrt_length", "logmean", min_count=2, kappa_min=1e-3, kappa_max=1e3)
    output = grpo_guard_loss(batch, guard=guard, level="sequence", epsilon_low=low, epsilon_high=high)
    moves = fspo_gradient_rows(completions, band)
    assert slopes(output, batch).any(-1).tolist() == moves and 0 < sum(moves) < len(moves)


# What is refused.


def test_loss_types_without_a_hard_clip_are_refused() -> None:
    for aggregation in ITEMS.keys() - set(CLIPPED):
        with pytest.raises(ValueError, match=f"{aggregation} has no hard clip.*write one of: grpo, bnpo"):
            grpo_guard_loss(a_batch(), aggregation=aggregation)


@pytest.mark.parametrize(
    ("guard", "level", "without", "message"),
    [
        (Guard("length"), "token", (), "step_axis length does not exist at level token; write one of: position"),
        (Guard("entropy"), "sequence", (), "step_axis entropy does not exist at level sequence; write one of: length"),
        (Guard("entropy"), "token", ("old_entropies",), "old_entropies is None"),
        (Guard(scale="fisher"), "token", ("old_sum_sq_probs",), "old_sum_sq_probs is None"),
        (Guard(center="exact_kl"), "token", ("old_policy_kl",), "old_policy_kl is None"),
    ],
)
def test_what_a_choice_needs_is_said(guard: Guard, level: str, without: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_guard_loss(a_batch(without=without), guard=guard, level=level)
