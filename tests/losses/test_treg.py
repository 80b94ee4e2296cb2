"""``treg_loss`` against its equation, and the invariants of the method."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from alignkit.losses.dpo import dpo_loss
from alignkit.losses.treg import treg_loss
from alignkit.losses.types import CandidateBatch, LossOutput
from alignkit.objectives.treg import TREGOptions, needs
from tests import oracles
from tests.list_oracles import Candidate, Row
from tests.losses.batches import batch_loss, gradient, list_batch, metric_mean, random_pairs
from tests.losses.test_dpo import TIGHT, awkward_pairs, check_metrics
from tests.oracles import Pair, TREGOutcome

HATS_W = [0.1224593312, -0.2310585786, 0.0]
HATS_L = [-0.0986876601, -0.1224593312]
GOLDEN = Pair([-1.0, -1.2, -0.7], [-0.9, -2.0], [-1.1, -1.3, -0.9], [-0.8, -1.7])
Rewards = tuple[list[float], list[float]]


def evened(pair: Pair) -> Pair:
    """The same pair with as many reference tokens as policy tokens, those in want of a value having 0."""
    pad = lambda ref, policy: ref + [0.0] * (len(policy) - len(ref))  # noqa: E731
    ref_chosen, ref_rejected = pad(pair.ref_chosen, pair.policy_chosen), pad(pair.ref_rejected, pair.policy_rejected)
    return Pair(pair.policy_chosen, pair.policy_rejected, ref_chosen, ref_rejected)


def random_rewards(pairs: list[Pair], seed: int) -> list[Rewards]:
    """Token rewards in (-1/2, 1/2) of the shape of some pairs."""
    rng = random.Random(seed)
    draw = lambda side: [rng.uniform(-0.5, 0.5) for _ in side]  # noqa: E731
    return [(draw(p.policy_chosen), draw(p.policy_rejected)) for p in pairs]


def rows_of(pairs: list[Pair], rewards: list[Rewards], present: list[tuple[bool, bool]] | None = None) -> list[Row]:
    """Pairs as rows of two candidates."""
    return [
        [
            Candidate(p.policy_chosen, p.ref_chosen, 1.0, tuple(hats[0]), there[0]),
            Candidate(p.policy_rejected, p.ref_rejected, 0.0, tuple(hats[1]), there[1]),
        ]
        for p, hats, there in zip(pairs, rewards, present or [(True, True)] * len(pairs), strict=True)
    ]


def batch_with(pairs: list[Pair], rewards: list[Rewards], reference: bool = True, **options: Any) -> CandidateBatch:
    return list_batch(rows_of(pairs, rewards, **options), reference=reference, token_rewards=True)


def golden_batch() -> CandidateBatch:
    return batch_with([GOLDEN], [(HATS_W, HATS_L)])


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    for gamma, detach, static in itertools.product((None, 0.6), (True, False), (True, False)):
        check_case(loss, 0.3, 0.7, gamma=gamma, detach_weight=detach, static_weight=static)


def check_case(loss: Callable[..., LossOutput], beta: float, alpha: float, *, gamma: float | None, **how: bool) -> None:
    pairs, present, trains = awkward_pairs(seed=10)
    pairs = [evened(pair) for pair in pairs]
    rewards = random_rewards(pairs, seed=11)
    batch = batch_with(pairs, rewards, reference=gamma is None, present=present)
    form = {"form": "dpo"} if gamma is None else {"form": "simpo", "gamma": gamma}
    output = loss(batch, beta=beta, alpha=alpha, **form, **how)
    wanted = [
        oracles.treg(p, hats, beta, alpha, gamma=gamma, **how) if real else None
        for p, hats, real in zip(pairs, rewards, trains, strict=True)
    ]
    assert [(t.name, t.item, t.weight, t.num_items.item()) for t in output.terms] == [
        ("preference", "group", 1.0, len(pairs)),
        ("token_regularizer", "group", alpha, len(pairs)),
    ]
    preference, regularizer = (term.values.tolist() for term in output.terms)
    assert preference == pytest.approx([0.0 if o is None else o.preference for o in wanted], **TIGHT)
    assert regularizer == pytest.approx([0.0 if o is None else o.weighted for o in wanted], **TIGHT)
    check_metrics(output, expected_metrics(pairs, rewards, wanted, beta, gamma))
    grads = torch.autograd.grad(
        batch_loss(output, batch), (batch.policy_token_logps, batch.token_rewards), allow_unused=True
    )
    assert grads[1] is None, "token rewards get no gradient"
    for row, outcome in enumerate(wanted):
        for side in (0, 1):
            share = [] if outcome is None else (outcome.gradient_w, outcome.gradient_l)[side]
            got = grads[0][row, side].tolist()
            assert got[: len(share)] == pytest.approx([g / len(pairs) for g in share], **TIGHT)
            assert not any(got[len(share) :])


def expected_metrics(
    pairs: list[Pair], rewards: list[Rewards], wanted: list[TREGOutcome | None], beta: float, gamma: float | None
) -> dict[str, float]:
    real = [(p, r, o) for p, r, o in zip(pairs, rewards, wanted, strict=True) if o is not None]
    metrics = oracles.pair_metrics([p for p, _, _ in real], beta, beta)
    if gamma is not None:
        metrics = {k: v for k, v in metrics.items() if "grad_ratio" not in k and "logratio" not in k}
    rows = [(o.reward_w, o.reward_l, o.reward_w - o.reward_l, o.fading, o.regularizer) for _, _, o in real]
    keys = ("rewards/chosen", "rewards/rejected", "rewards/margins", "effective_weight", "treg/regularizer")
    metrics |= {k: math.fsum(values) / len(real) for k, values in zip(keys, zip(*rows, strict=True), strict=True)}
    metrics["rewards/accuracies"] = sum(o.reward_w > o.reward_l for _, _, o in real) / len(real)
    for side, role in enumerate(("chosen", "rejected")):
        hats, agreement = [], []
        for pair, reward, _ in real:
            policy = (pair.policy_chosen, pair.policy_rejected)[side]
            ref = (pair.ref_chosen, pair.ref_rejected)[side]
            scale = beta if gamma is None else beta / len(policy)
            for logp, ref_logp, hat in zip(policy, ref, reward[side], strict=True):
                hats.append(hat)
                agreement.append(hat * scale * (logp - (ref_logp if gamma is None else 0.0)))
        metrics[f"treg/token_reward_{role}"] = math.fsum(hats) / len(hats)
        metrics[f"treg/similarity_{role}"] = math.fsum(agreement) / len(hats)
    return metrics


def test_agrees_with_the_equation() -> None:
    check_loss(treg_loss)


def test_defaults_of_the_loss_are_those_of_the_method() -> None:
    options = {f.name: f.default for f in fields(TREGOptions)}
    parameters = [p for p in inspect.signature(treg_loss).parameters.values() if p.name != "batch"]
    made_before_training = {"include_response", "contrast_prompts"}
    assert {p.name for p in parameters} == set(options) - made_before_training
    assert all(p.default in (inspect.Parameter.empty, options[p.name]) for p in parameters)
    assert (options["beta"], options["alpha"], options["detach_weight"]) == (0.1, 0.25, True)


def test_needs_follow_the_form() -> None:
    assert needs(TREGOptions()) == {"reference", "token_rewards"}
    assert needs(TREGOptions(form="simpo")) == {"token_rewards"}


# The invariants of the method, in the order of its specification.


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_1_without_alpha_or_without_rewards_it_is_dpo(alpha: float) -> None:
    pairs = random_pairs(seed=12, count=8)
    rewards = random_rewards(pairs, seed=13)
    if alpha:
        rewards = [([0.0] * len(w), [0.0] * len(r)) for w, r in rewards]
    batch = batch_with(pairs, rewards)
    output, dpo = treg_loss(batch, beta=0.1, alpha=alpha), dpo_loss(batch, beta=0.1)
    assert batch_loss(output, batch).item() == pytest.approx(batch_loss(dpo, batch).item(), **TIGHT)
    torch.testing.assert_close(gradient(output, batch), gradient(dpo, batch), rtol=1e-12, atol=1e-14)


def test_3_golden_value() -> None:
    batch = golden_batch()
    output = treg_loss(batch, beta=0.1, alpha=0.25)
    assert metric_mean(output.metrics["rewards/margins"]) == pytest.approx(0.08, **TIGHT)
    assert metric_mean(output.metrics["effective_weight"]) == pytest.approx(0.4800106598, abs=5e-11)
    assert metric_mean(output.metrics["treg/regularizer"]) == pytest.approx(-0.0488548520, abs=5e-11)
    assert output.terms[0].values.item() == pytest.approx(0.6539469673, abs=5e-11)
    assert batch_loss(output, batch).item() == pytest.approx(0.6480842549, abs=5e-11)


def test_4_golden_gradient() -> None:
    batch = golden_batch()
    grad = gradient(treg_loss(batch, beta=0.1, alpha=0.25), batch)
    assert grad[0, 0].tolist() == pytest.approx([-0.0494706106, -0.0452283014, -0.0480010660], abs=1e-10)
    assert grad[0, 1, :2].tolist() == pytest.approx([0.0491853442, 0.0494706106], abs=5e-11)


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5])
def test_4_a_token_differs_from_dpo_by_at_most_half_of_alpha(alpha: float) -> None:
    pairs = random_pairs(seed=14, count=8)
    rewards = random_rewards(pairs, seed=15)
    batch = batch_with(pairs, rewards)
    grad, dpo = (gradient(o, batch) for o in (treg_loss(batch, beta=0.1, alpha=alpha), dpo_loss(batch, beta=0.1)))
    factor = (grad / dpo)[batch.completion_mask]
    hats = (batch.token_rewards.detach() * torch.tensor([1.0, -1.0]).view(1, 2, 1))[batch.completion_mask]
    torch.testing.assert_close(factor, 1.0 + alpha * hats, rtol=1e-12, atol=1e-12)
    assert factor.min() >= 1 - alpha / 2 and factor.max() <= 1 + alpha / 2


@pytest.mark.parametrize("form", ["dpo", "simpo"])
def test_5_no_gradient_into_rewards_and_no_nan_without_tokens(form: str) -> None:
    empty = Pair([], [-1.0], [], [-2.0])
    batch = batch_with([GOLDEN, empty], [(HATS_W, HATS_L), ([], [0.3])])
    output = treg_loss(batch, form=form, beta=0.1, alpha=0.25)
    loss = batch_loss(output, batch)
    grad, rewards_grad = torch.autograd.grad(loss, (batch.policy_token_logps, batch.token_rewards), allow_unused=True)
    assert rewards_grad is None
    assert bool(grad.isfinite().all()) and bool(loss.isfinite())
    assert not grad[1].any() and not grad[0, 1, 2]


def test_6_the_regulariser_fades_on_solved_pairs() -> None:
    """The static weight does not."""
    shares = []
    for lead in (0.0, 50.0, 500.0):
        pair = Pair([-1.0, -2.0], [-1.0 - lead], [-1.0, -2.0], [-1.0])
        batch = batch_with([pair], [([0.4, -0.1], [0.2])])
        for static in (False, True):
            output = treg_loss(batch, beta=0.1, alpha=0.25, static_weight=static)
            shares.append(output.terms[1].values.item() / metric_mean(output.metrics["treg/regularizer"]))
    assert shares == pytest.approx([0.5, 1.0, oracles.sigma(-5.0), 1.0, oracles.sigma(-50.0), 1.0], **TIGHT)


def test_7_rewards_moved_by_one_token_change_the_loss() -> None:
    moved = batch_with([GOLDEN], [(HATS_W[-1:] + HATS_W[:-1], HATS_L)])
    losses = [batch_loss(treg_loss(b, beta=0.1, alpha=0.25), b).item() for b in (golden_batch(), moved)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_detached_and_attached_weights_have_the_same_value_and_another_gradient() -> None:
    """Each chosen token gains - alpha beta w (1 - w) L_reg, each rejected one the opposite."""
    batch = golden_batch()
    constant, moving = (treg_loss(batch, beta=0.1, alpha=0.25, detach_weight=detach) for detach in (True, False))
    assert batch_loss(constant, batch).item() == batch_loss(moving, batch).item()
    gained = (gradient(moving, batch) - gradient(constant, batch))[0]
    weight = 0.4800106598
    share = -0.25 * 0.1 * weight * (1 - weight) * -0.0488548520
    assert gained[0].tolist() == pytest.approx([share] * 3, abs=1e-11)
    assert gained[1, :2].tolist() == pytest.approx([-share] * 2, abs=1e-11)


def test_the_simpo_form_needs_no_reference_and_has_a_margin() -> None:
    """Two tokens of -1 against one of -3, beta 2: z = -2 + 6 - gamma."""
    pair = Pair([-1.0, -1.0], [-3.0], [0.0, 0.0], [0.0])
    batch = batch_with([pair], [([0.0, 0.0], [0.0])], reference=False)
    output = treg_loss(batch, form="simpo", beta=2.0, alpha=0.25, gamma=1.5)
    assert batch_loss(output, batch).item() == pytest.approx(math.log(1 + math.exp(-2.5)), **TIGHT)
    assert metric_mean(output.metrics["rewards/margins"]) == pytest.approx(4.0, **TIGHT)
    assert not any(key.startswith(("logratio", "grad_ratio")) for key in output.metrics)


def test_what_is_missing_is_named() -> None:
    rows = rows_of([GOLDEN], [(HATS_W, HATS_L)])
    with pytest.raises(ValueError, match="token_rewards is None"):
        treg_loss(list_batch(rows), beta=0.1, alpha=0.25)
    with pytest.raises(ValueError, match="ref_token_logps is None"):
        treg_loss(batch_with([GOLDEN], [(HATS_W, HATS_L)], reference=False), beta=0.1, alpha=0.25)
