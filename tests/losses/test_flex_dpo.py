"""``flex_dpo_loss`` against its equation, and the invariants that follow from it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from alignkit.losses.dpo import dpo_loss
from alignkit.losses.flex_dpo import flex_dpo_loss
from alignkit.losses.types import CandidateBatch, LossOutput
from alignkit.objectives.flex_dpo import FlexDPOOptions
from tests import oracles
from tests.losses.batches import batch_loss, batch_of, gradient, metric_mean, random_pairs
from tests.losses.test_dpo import GOLDEN, TIGHT, awkward_pairs, check_gradient, check_metrics
from tests.oracles import Pair


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    for beta_neg, length_normalize in itertools.product((0.08, 0.0, 0.3), (False, True)):
        betas = {"beta_pos": 0.1, "beta_neg": beta_neg, "length_normalize": length_normalize}
        check_case(loss, betas)
        check_case(loss, betas, eta=0.25, sft_normalization="token")
        check_case(loss, betas, eta=0.25, sft_normalization="sequence_sum")


def check_case(loss: Callable[..., LossOutput], betas: dict[str, float], **sft: Any) -> None:
    pairs, present, trains = awkward_pairs(seed=2)
    batch = batch_of(pairs, present=present)
    output = loss(batch, **betas, **sft)
    terms = {term.name: term for term in output.terms}
    assert set(terms) == ({"preference", "sft"} if sft else {"preference"})
    preference = terms["preference"]
    assert (preference.item, preference.weight, preference.num_items.item()) == ("group", 1.0, len(pairs))
    expected = [oracles.flex_dpo(p, **betas) if real else 0.0 for p, real in zip(pairs, trains, strict=True)]
    assert preference.values.tolist() == pytest.approx(expected, **TIGHT)
    check_metrics(output, oracles.pair_metrics([p for p, real in zip(pairs, trains, strict=True) if real], **betas))

    sft_weight = 0.0
    if sft:
        items = oracles.sft_items(pairs, sft["sft_normalization"])
        assert terms["sft"].item == {"token": "chosen_token", "sequence_sum": "group"}[sft["sft_normalization"]]
        assert (terms["sft"].weight, terms["sft"].num_items.item()) == (sft["eta"], items)
        rows = [oracles.sft_sum([p]) if chosen else 0.0 for p, (chosen, _) in zip(pairs, present, strict=True)]
        assert terms["sft"].values.tolist() == pytest.approx(rows, **TIGHT)
        sft_weight = sft["eta"] / items
    wanted = []
    for pair, (chosen, _), real in zip(pairs, present, trains, strict=True):
        grad_w, grad_l = oracles.flex_dpo_gradient(pair, **betas) if real else (0.0, 0.0)
        wanted.append((grad_w / len(pairs) - sft_weight * chosen, grad_l / len(pairs)))
    check_gradient(gradient(output, batch), pairs, wanted)


def test_agrees_with_the_equation() -> None:
    check_loss(flex_dpo_loss)


def test_defaults_of_the_loss_are_those_of_the_method() -> None:
    options = {f.name: f.default for f in fields(FlexDPOOptions)}
    parameters = [p for p in inspect.signature(flex_dpo_loss).parameters.values() if p.name != "batch"]
    assert {p.name for p in parameters} == set(options)
    assert all(p.default in (inspect.Parameter.empty, options[p.name]) for p in parameters)
    assert options == {
        "beta_pos": 0.1,
        "beta_neg": 0.08,
        "eta": 0.0,
        "sft_normalization": "token",
        "length_normalize": False,
    }


# The invariants of the method, in the order of its specification.


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_1_equal_betas_are_dpo(beta: float) -> None:
    pairs = random_pairs(seed=3, count=16)
    flex_batch, dpo_batch = batch_of(pairs), batch_of(pairs)
    flex, dpo = flex_dpo_loss(flex_batch, beta_pos=beta, beta_neg=beta), dpo_loss(dpo_batch, beta=beta)
    torch.testing.assert_close(flex.terms[0].values, dpo.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(flex, flex_batch), gradient(dpo, dpo_batch), rtol=1e-12, atol=1e-14)
    assert batch_loss(flex_dpo_loss(batch_of([GOLDEN]), beta_pos=0.1, beta_neg=0.1), batch_of([GOLDEN])).item() == (
        pytest.approx(0.6209570478, abs=5e-11)
    )


def test_1_equal_betas_are_dpo_in_float32() -> None:
    batch = batch_of(random_pairs(seed=4, count=16), dtype=torch.float32)
    flex, dpo = flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.1), dpo_loss(batch, beta=0.1)
    torch.testing.assert_close(flex.terms[0].values, dpo.terms[0].values, rtol=1e-6, atol=1e-6)


def test_2_golden_value_and_gradient() -> None:
    batch = batch_of([GOLDEN])
    output = flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.08)
    assert metric_mean(output.metrics["rewards/margins"]) == pytest.approx(0.14, **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(0.6255951823, abs=5e-11)
    grad = gradient(output, batch)
    assert grad[0, :, 0].tolist() == pytest.approx([-0.0465057055, 0.0372045644], abs=5e-11)
    assert (grad[0, 1, 0] / grad[0, 0, 0]).item() == pytest.approx(-0.08 / 0.1, **TIGHT)


@pytest.mark.parametrize(("beta_pos", "beta_neg"), [(0.1, 0.08), (2.0, 0.0), (0.5, 3.0)])
def test_3_log_two_at_the_reference(beta_pos: float, beta_neg: float) -> None:
    pairs = [Pair(p.ref_chosen, p.ref_rejected, p.ref_chosen, p.ref_rejected) for p in random_pairs(seed=5, count=4)]
    values = flex_dpo_loss(batch_of(pairs), beta_pos=beta_pos, beta_neg=beta_neg).terms[0].values
    assert values.tolist() == pytest.approx([0.6931471805599453] * 4, **TIGHT)


def test_4_gradient_ratio_in_probability_space() -> None:
    pi = torch.tensor([[0.25, 0.01]], dtype=torch.float64, requires_grad=True)
    batch = CandidateBatch(
        policy_token_logps=pi.log().unsqueeze(-1),
        ref_token_logps=torch.tensor([[[0.3], [0.2]]], dtype=torch.float64).log(),
        completion_mask=torch.ones(1, 2, 1, dtype=torch.bool),
        candidate_mask=torch.ones(1, 2, dtype=torch.bool),
        scores=torch.tensor([[1.0, 0.0]], dtype=torch.float64),
    )
    output = flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.05)
    (grad,) = torch.autograd.grad(batch_loss(output, batch), pi)
    assert (grad[0, 1] / grad[0, 0]).item() == pytest.approx(-12.5, **TIGHT)
    logged = torch.tensor(metric_mean(output.metrics["grad_ratio_log"])).double().exp().item()
    assert logged == pytest.approx(12.5, rel=1e-6)


def test_5_without_beta_neg_the_rejected_side_is_free() -> None:
    pairs = random_pairs(seed=6, count=4)
    batch = batch_of(pairs)
    output = flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.0)
    grad = gradient(output, batch)
    assert torch.equal(grad[:, 1], torch.zeros_like(grad[:, 1]))
    assert bool((grad[:, 0][batch.completion_mask[:, 0]] < 0).all())
    rho_w = [oracles.logratio(p.policy_chosen, p.ref_chosen) for p in pairs]
    expected = [-torch.tensor(0.1 * r).double().sigmoid().log().item() for r in rho_w]
    assert output.terms[0].values.tolist() == pytest.approx(expected, rel=1e-6)
    assert "grad_ratio_log" not in output.metrics


def test_6_eta_adds_exactly_its_share_of_the_likelihood() -> None:
    pairs = random_pairs(seed=7, count=6)
    plain_batch, batch = batch_of(pairs), batch_of(pairs)
    plain = flex_dpo_loss(plain_batch, beta_pos=0.1, beta_neg=0.08)
    output = flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.08, eta=0.3)
    added = batch_loss(output, batch) - batch_loss(plain, plain_batch)
    assert added.item() == pytest.approx(0.3 * oracles.sft(pairs, "token"), **TIGHT)
    assert torch.equal(gradient(output, batch)[:, 1], gradient(plain, plain_batch)[:, 1])


def test_7_a_lookup_table_cannot_show_the_three_properties() -> None:
    """Without shared parameters the others keep their mutual ratios and the chosen probability never falls."""
    logits = torch.linspace(-1.0, 1.0, 10, dtype=torch.float64).requires_grad_()
    reference = logits.detach().log_softmax(-1)
    chosen, rejected, others = 2, 6, [0, 1, 3, 4, 5, 7, 8, 9]
    sides, chosen_logps = torch.tensor([[chosen, rejected]]), []
    for _ in range(300):
        batch = CandidateBatch(
            policy_token_logps=logits.log_softmax(-1)[sides].unsqueeze(-1),
            ref_token_logps=reference[sides].unsqueeze(-1),
            completion_mask=torch.ones(1, 2, 1, dtype=torch.bool),
            candidate_mask=torch.ones(1, 2, dtype=torch.bool),
            scores=torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        )
        (grad,) = torch.autograd.grad(batch_loss(dpo_loss(batch, beta=0.1), batch), logits)
        assert grad[others].abs().max().item() < 1e-15
        assert grad[chosen] < 0 < grad[rejected]
        chosen_logps.append(logits.detach().log_softmax(-1)[chosen].item())
        with torch.no_grad():
            logits -= 5.0 * grad
    final = logits.detach().log_softmax(-1)
    assert (final - reference)[others].std().item() < 1e-12
    assert all(later >= earlier for earlier, later in itertools.pairwise(chosen_logps))
    assert chosen_logps[-1] - chosen_logps[0] > 0.5


def test_8_padding_and_order_do_not_matter() -> None:
    pairs = random_pairs(seed=8, count=6)
    order = [3, 0, 5, 1, 4, 2]
    options = {"beta_pos": 0.1, "beta_neg": 0.08, "eta": 0.1}
    batch, shuffled = batch_of(pairs), batch_of([pairs[i] for i in order])
    loss, other = (batch_loss(flex_dpo_loss(b, **options), b).item() for b in (batch, shuffled))
    assert loss == pytest.approx(other, **TIGHT)
    alone = [flex_dpo_loss(batch_of([p]), **options).terms[0].values.item() for p in pairs]
    assert flex_dpo_loss(batch, **options).terms[0].values.tolist() == pytest.approx(alone, **TIGHT)


@pytest.mark.parametrize("length_normalize", [False, True])
def test_length_normalisation_removes_the_length_bias(length_normalize: bool) -> None:
    """A response twice as long, with the same log-ratio per token, gets the same reward only when normalised."""
    short, long = Pair([-1.0] * 2, [-1.5], [-2.0] * 2, [-1.0]), Pair([-1.0] * 4, [-1.5], [-2.0] * 4, [-1.0])
    batch = batch_of([short, long])
    values = flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.08, length_normalize=length_normalize).terms[0].values
    assert bool(torch.isclose(values[0], values[1], rtol=1e-12)) is length_normalize
