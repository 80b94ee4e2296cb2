"""``dft_loss`` against its definition in plain Python, its gradient, and what a mask must do."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given

from alignkit.losses.dft import dft_loss
from alignkit.losses.sft import sft_loss
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, TokenBatch
from tests.losses.batches import list_batch, metric_mean, random_pairs
from tests.losses.test_sft import ROWS
from tests.losses.test_sft import batch_of as rows_of
from tests.losses.test_treg import rows_of as pair_rows

TIGHT = {"rel": 1e-12, "abs": 1e-12}


def check_loss(loss: Callable[[TokenBatch], LossOutput]) -> None:
    """The definition on rows whose masked tokens carry a number too; tests/losses/test_mutations.py calls this."""
    logps = torch.tensor([[-1.0, -2.5, -4.0], [-0.5, -3.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    trained = [[True, False, True], [False, True, False]]
    result = loss(TokenBatch(logps, torch.tensor(trained)))
    (term,) = result.terms
    assert (term.name, term.item, int(term.num_items), term.weight) == ("weighted_nll", "token", 3, 1.0)
    wanted = [math.exp(-1) * 1, 0.0, math.exp(-4) * 4, 0.0, math.exp(-3) * 3, 0.0]
    assert term.values.tolist() == pytest.approx(wanted, **TIGHT)
    assert result.mean().item() == pytest.approx(math.fsum(wanted) / 3, **TIGHT)
    (slopes,) = torch.autograd.grad(term.values.sum(), logps)
    # The weight is a constant: the slope of a trained token in its log-prob is minus its probability.
    wanted = [-math.exp(-1), 0.0, -math.exp(-4), 0.0, -math.exp(-3), 0.0]
    assert slopes.flatten().tolist() == pytest.approx(wanted, **TIGHT)
    assert metric_mean(result.metrics["dft/probability"]) == pytest.approx(-math.fsum(wanted) / 3, **TIGHT)
    assert not result.metrics["dft/probability"].values.requires_grad
    check_term(importlib.import_module(loss.__module__).dft_term)


def check_term(term_of: Callable[[CandidateBatch], LossTerm]) -> None:
    """As a term of a preference loss it trains the chosen responses alone."""
    pairs = random_pairs(61, count=4)
    there = [(True, True), (True, False), (False, True), (True, True)]
    batch = list_batch(pair_rows(pairs, [((), ())] * len(pairs), there))
    term = term_of(batch)
    wanted = [-math.fsum(math.exp(t) * t for t in p.policy_chosen) for p in pairs]
    wanted[2] = 0.0
    assert term.values.tolist() == pytest.approx(wanted, **TIGHT)
    assert (term.item, int(term.num_items)) == ("chosen_token", sum(len(p.policy_chosen) for p in pairs))
    (slopes,) = torch.autograd.grad(term.values.sum(), batch.policy_token_logps)
    assert not slopes[:, 1].any() and slopes[0, 0, 0].item() == pytest.approx(-math.exp(pairs[0].policy_chosen[0]))


def test_the_loss_on_given_rows() -> None:
    check_loss(dft_loss)


@given(ROWS)
def test_it_is_the_mean_of_minus_p_log_p_over_trained_tokens(rows: list[list[tuple[float, bool]]]) -> None:
    trained = [logp for row in rows for logp, is_trained in row if is_trained]
    expected = -math.fsum(math.exp(logp) * logp for logp in trained) / max(len(trained), 1)
    assert dft_loss(rows_of(rows)).mean().item() == pytest.approx(expected, **TIGHT)


def test_of_certain_tokens_it_is_supervised_fine_tuning_to_first_order() -> None:
    batch = rows_of([[(-1e-9, True), (-2e-9, True), (0.0, False)]])
    assert dft_loss(batch).mean().item() == pytest.approx(sft_loss(batch).mean().item(), rel=1e-8)


def test_what_is_masked_cannot_spoil_the_loss() -> None:
    logps = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    loss = dft_loss(TokenBatch(logps, torch.tensor([[True, False, False]]))).mean()
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(-1)) and logps.grad is not None and logps.grad.isfinite().all()
