"""One family: with the right options every loss is DPO, and TRL's own ``sigmoid`` is the judge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.adpo import adpo_loss
from alignkit.losses.d2o import d2o_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.flex_dpo import flex_dpo_loss
from alignkit.losses.treg import treg_loss
from alignkit.losses.types import CandidateBatch, LossOutput
from tests.losses.batches import batch_of, gradient, random_pairs, replace
from tests.losses.test_dpo import trl_outcome

FAMILY: dict[str, Callable[[CandidateBatch, float], LossOutput]] = {
    "dpo": lambda batch, beta: dpo_loss(batch, beta=beta),
    "flex_dpo(b, b)": lambda batch, beta: flex_dpo_loss(batch, beta_pos=beta, beta_neg=beta),
    "treg(alpha = 0)": lambda batch, beta: treg_loss(batch, beta=beta, alpha=0.0),
    "treg(r_hat = 0)": lambda batch, beta: treg_loss(
        replace(batch, lambda key, t: t * 0.0 if key == "token_rewards" else t), beta=beta, alpha=0.5
    ),
    "adpo(K = 2, one-hot, tau = 1/b)": lambda batch, beta: adpo_loss(batch, target="pairwise_hard", tau=1.0 / beta),
    "adpo(K = 2, ranking, tau = 1/b)": lambda batch, beta: adpo_loss(batch, target="plackett_luce", tau=1.0 / beta),
    "d2o(K = 1, alpha = beta)": lambda batch, beta: d2o_loss(batch, alpha=beta, beta=beta),
}


def random_family_batch(seed: int, dtype: torch.dtype) -> CandidateBatch:
    """Sixteen pairs with token rewards."""
    batch = batch_of(random_pairs(seed, count=16, max_tokens=9), dtype)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(batch.policy_token_logps.shape, generator=generator, dtype=dtype) - 0.5
    return CandidateBatch(**{**vars(batch), "token_rewards": rewards * batch.completion_mask})


@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 0.4])
def test_every_member_is_trl_sigmoid(member: str, dtype: torch.dtype, tolerance: float, seed: int, beta: float) -> None:
    batch = random_family_batch(seed, dtype)
    judge, judge_gradient, metrics = trl_outcome(batch, beta)
    output = FAMILY[member](batch, beta)
    mean = torch.stack([term.weight * term.values.mean() for term in output.terms]).sum()
    assert mean.item() == pytest.approx(judge.item(), rel=tolerance, abs=tolerance)
    assert output.mean().item() == pytest.approx(judge.item(), rel=tolerance, abs=tolerance)
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        values = output.metrics[key].values
        assert values.mean().item() == pytest.approx(metrics[key], rel=10 * tolerance, abs=10 * tolerance), key
    if member != "treg(r_hat = 0)":  # which has its own leaf
        (grad,) = torch.autograd.grad(mean, batch.policy_token_logps)
        mask = batch.completion_mask
        wanted = torch.stack(judge_gradient.chunk(2), dim=1)[mask]
        torch.testing.assert_close(grad[mask], wanted, rtol=tolerance, atol=tolerance)


def test_members_part_ways_with_other_options() -> None:
    """The identity is no accident of the batch: unequal betas, an alpha or soft labels break it."""
    batch = random_family_batch(7, torch.float64)
    dpo = gradient(dpo_loss(batch, beta=0.1), batch)
    others = {
        "flex_dpo": flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.08),
        "treg": treg_loss(batch, beta=0.1, alpha=0.25),
        "adpo": adpo_loss(batch, target="pairwise_soft", tau=10.0),
        "d2o": d2o_loss(batch, alpha=0.08, beta=0.1),
    }
    for name, output in others.items():
        assert (gradient(output, batch) - dpo).abs().max().item() > 1e-5, name
