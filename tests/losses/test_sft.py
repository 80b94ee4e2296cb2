"""The supervised loss against its definition in plain Python, and what a mask must do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.losses.sft import sft_loss
from alignkit.losses.types import LossOutput, TokenBatch

TOKENS = st.tuples(st.floats(-50, 0), st.booleans())
ROWS = st.lists(st.lists(TOKENS, min_size=3, max_size=3), min_size=1, max_size=4)


def batch_of(rows: list[list[tuple[float, bool]]], dtype: torch.dtype = torch.float64) -> TokenBatch:
    """A batch from (log-prob, is trained) by row; masked log-probs are 0, as the bridge hands them over."""
    logps = torch.tensor([[logp if trained else 0.0 for logp, trained in row] for row in rows], dtype=dtype)
    return TokenBatch(logps, torch.tensor([[trained for _, trained in row] for row in rows]))


@given(ROWS)
def test_it_is_the_mean_over_trained_tokens(rows: list[list[tuple[float, bool]]]) -> None:
    trained = [logp for row in rows for logp, is_trained in row if is_trained]
    expected = -math.fsum(trained) / max(len(trained), 1)
    result = sft_loss(batch_of(rows))
    assert result.mean().item() == pytest.approx(expected, abs=1e-12)
    (term,) = result.terms
    assert (term.name, term.item, int(term.num_items), term.weight) == ("nll", "token", len(trained), 1.0)


def check_loss(loss: Callable[[TokenBatch], LossOutput]) -> None:
    """The definition on rows whose masked tokens carry a number too; tests/losses/test_mutations.py calls this."""
    logps = torch.tensor([[-1.0, -2.5, -4.0], [-0.5, -3.0, -7.0]], dtype=torch.float64)
    result = loss(TokenBatch(logps, torch.tensor([[True, False, True], [False, True, False]])))
    (term,) = result.terms
    assert (term.name, term.item, int(term.num_items), term.weight) == ("nll", "token", 3, 1.0)
    assert term.values.tolist() == [1.0, 0.0, 4.0, 0.0, 3.0, 0.0]
    assert result.mean().item() == pytest.approx(8 / 3, abs=1e-12)


def test_the_loss_on_given_rows() -> None:
    check_loss(sft_loss)


def test_uniform_guesses_cost_log_v() -> None:
    row = [(-math.log(7), True), (-math.log(7), True), (-9.0, False)]
    assert sft_loss(batch_of([row])).mean().item() == pytest.approx(math.log(7), abs=1e-12)


@given(ROWS)
def test_micro_batches_divided_by_the_global_count_are_the_whole(rows: list[list[tuple[float, bool]]]) -> None:
    (whole,) = sft_loss(batch_of(rows)).terms
    parts = [sft_loss(batch_of([row])).terms[0] for row in rows]
    total = whole.num_items.clamp(min=1)
    assert sum(part.values.sum() / total for part in parts).item() == pytest.approx(
        (whole.values.sum() / total).item(), abs=1e-12
    )


def test_the_gradient_is_minus_one_over_n_where_trained_and_nothing_elsewhere() -> None:
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    sft_loss(TokenBatch(logps, mask)).mean().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [[-0.5, 0.0, -0.5], [0.0, 0.0, 0.0]]


def test_what_is_masked_cannot_spoil_the_loss() -> None:
    logps = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    loss = sft_loss(TokenBatch(logps, torch.tensor([[True, False, False]]))).mean()
    loss.backward()
    assert loss.item() == 1.0 and logps.grad is not None and logps.grad.isfinite().all()
