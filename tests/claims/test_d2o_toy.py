"""The toy of D2O is what it claims to be, and the directions that are safe to assert hold with few seeds."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from scripts.claims.d2o_drift import FROZEN, GA, INSTRUCTED, NPO, STALLED, TOLD
from scripts.claims.d2o_toy import (
    BAD_POSITIVES,
    BLOCK,
    HARMFUL,
    PROMPTS,
    RESPONSES,
    RUNS,
    Figures,
    ascent,
    d2o,
    dpo,
    draw,
    fit_reference,
    instructed,
    logps,
    measure,
    negatives,
    npo,
    target_distribution,
    train,
)
from scripts.claims.toy_networks import Parameters, initial_parameters, outputs, repeated

SEEDS = 3


@cache
def start() -> Parameters:
    return fit_reference(SEEDS)


@cache
def reference() -> torch.Tensor:
    return logps(start()).detach()


@cache
def figures(name: str) -> Figures:
    return train(start(), RUNS[name], steps=300, learning_rate=3e-3)


def test_the_reference_has_the_masses_of_its_blocks() -> None:
    blocks = reference().exp().unflatten(-1, (3, BLOCK)).sum(-1)
    for prompts, expected in ((slice(0, PROMPTS), (0.47, 0.43, 0.10)), (slice(PROMPTS, None), (0.89, 0.01, 0.10))):
        torch.testing.assert_close(blocks[:, prompts].mean((0, 1)), torch.tensor(expected), atol=2e-3, rtol=0)
    assert (reference().exp() - target_distribution(SEEDS)).abs().max().item() < 5e-3


def test_the_instructed_sampler_keeps_the_answers_within_a_block() -> None:
    told = instructed(reference())
    torch.testing.assert_close(told[:, :PROMPTS, HARMFUL].exp().sum(-1), torch.full((SEEDS, PROMPTS), 0.02))
    torch.testing.assert_close(
        told[:, :PROMPTS, :BLOCK].log_softmax(-1), reference()[:, :PROMPTS, :BLOCK].log_softmax(-1)
    )
    assert torch.equal(told[:, PROMPTS:], reference()[:, PROMPTS:])


def test_samples_follow_the_sampler() -> None:
    drawn = draw(reference(), 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (SEEDS, PROMPTS * BLOCK, 4000)
    share = ((drawn[:, :BLOCK] >= BLOCK) & (drawn[:, :BLOCK] < 2 * BLOCK)).double().mean()
    expected = reference()[:, 0, HARMFUL].exp().sum(-1).mean().item()
    assert share.item() == pytest.approx(expected, abs=0.01)


def test_every_harmful_response_is_a_negative_once() -> None:
    rows = negatives(2).reshape(2, PROMPTS, BLOCK)
    assert torch.equal(rows, torch.arange(BLOCK, 2 * BLOCK).expand(2, PROMPTS, BLOCK))


def test_losses_at_the_reference_and_their_limits() -> None:
    """z = 0 at the reference: log 2. GA is the mean log-prob of the negatives. NPO is 2/alpha log 2."""
    policy = reference()
    log2 = float(np.log(2.0))
    assert d2o(policy)(policy).item() == pytest.approx(log2, abs=1e-6)
    assert dpo(policy)(policy).item() == pytest.approx(log2, abs=1e-6)
    assert npo(policy)(policy).item() == pytest.approx(20 * log2, abs=1e-4)
    assert ascent(policy)(policy).item() == pytest.approx(policy[:, :PROMPTS, HARMFUL].mean().item(), abs=1e-5)


def test_npo_away_from_the_reference_in_closed_form() -> None:
    """2/alpha * mean log(1 + (pi/pi_ref)^alpha) over the negatives."""
    policy = reference() + 0.3 * torch.randn(reference().shape, generator=torch.Generator().manual_seed(0))
    ratio = (policy - reference())[:, :PROMPTS, HARMFUL]
    expected = (20.0 * torch.log1p(torch.exp(0.1 * ratio))).mean().item()
    assert npo(reference())(policy).item() == pytest.approx(expected, rel=1e-5)


def test_the_stated_share_of_dpo_positives_is_harmful() -> None:
    """With beta 1 and a policy that moved all harmful responses by one nat, a harmful positive has z = 0."""
    policy = reference().clone()
    policy[:, :PROMPTS, HARMFUL] += 1.0
    loss = dpo(reference(), beta=1.0)(policy).item()
    flat, pushed = float(np.log(2.0)), float(np.log1p(np.exp(1.0)))
    assert (pushed - loss) / (pushed - flat) == pytest.approx(BAD_POSITIVES, abs=0.06)


def test_measures_in_closed_form() -> None:
    """All mass moved within benign prompts by a known tilt."""
    uniform = torch.zeros(1, 2 * PROMPTS, RESPONSES).log_softmax(-1)
    tilted = torch.zeros(1, 2 * PROMPTS, RESPONSES)
    tilted[..., 0] = 1.0
    found = measure(tilted.log_softmax(-1), uniform)
    partition = float(np.log((np.e + RESPONSES - 1) / RESPONSES))
    assert found.drift[0] == pytest.approx(partition - 1 / RESPONSES, abs=1e-5)
    assert found.safe_drift[0] == pytest.approx(np.log((np.e + BLOCK - 1) / BLOCK) - 1 / BLOCK, abs=1e-5)
    assert found.harm[0] == found.junk[0] == pytest.approx(BLOCK / (np.e + RESPONSES - 1), abs=1e-5)
    same = measure(uniform, uniform)
    assert same.drift[0] == pytest.approx(0.0, abs=1e-6) and same.harm[0] == pytest.approx(1 / 3, abs=1e-6)


def test_drift_is_greatest_without_a_leash_and_least_with_frozen_samples() -> None:
    assert (figures(GA).drift > figures(NPO).drift + 1.0).all()
    assert (figures(NPO).drift > figures(FROZEN).drift + 1.0).all()
    for name in (GA, NPO, FROZEN, INSTRUCTED):
        assert (figures(name).harm < 0.01).all(), "all of them remove the harm"


def test_an_instructed_sampler_lowers_harm_where_raw_samples_stall() -> None:
    assert (figures(STALLED).harm > 0.08).all() and (figures(TOLD).harm < 0.02).all()


def test_stacked_networks_do_not_interact() -> None:
    parameters = initial_parameters(4, (3, 5, 2))
    inputs = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    together = outputs(parameters, inputs)
    alone = torch.tanh(inputs[2] @ parameters[0][2] + parameters[1][2]) @ parameters[2][2] + parameters[3][2]
    torch.testing.assert_close(together[2], alone)
    torch.testing.assert_close(outputs(repeated(parameters, 2), inputs.repeat(2, 1, 1))[4:], together)
