"""What modifies the DPO family: equalities that the papers claim, on DPO itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from alignkit.losses.dpo import dpo_loss
from alignkit.losses.scored_pairs import policy_weights, scored_pairs
from alignkit.parts.method import load_method
from tests.dpo_oracles import LOSSES
from tests.losses.batches import gradient, random_pairs
from tests.losses.dpo_family import agree, family_batch, golden, random_family_batch

SAME: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "alpha = 1 is the reverse KL": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, {}),
    "alpha = 0 is the forward KL": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0},
        {"f_divergence_type": "forward_kl"},
    ),
    "ld_alpha = 1 weighs all tokens alike": ({"ld_alpha": 1.0}, {}),
    "no smoothing is DPO": ({"label_smoothing": 0.0}, {}),
}


@pytest.mark.parametrize("which", SAME)
def test_limits_of_modifiers(which: str) -> None:
    one, other = SAME[which]
    batch = random_family_batch(seed=5, count=16)
    agree(dpo_loss(batch, beta=0.3, **one), dpo_loss(batch, beta=0.3, **other), batch)


def test_alpha_passes_into_the_reverse_kl() -> None:
    """The closer alpha comes to 1, the closer the loss to DPO: by the square of a log-ratio times the distance."""
    batch = random_family_batch(seed=5, count=16)
    plain = dpo_loss(batch, beta=0.3).terms[0].values
    gaps = []
    for distance in (1e-2, 1e-4):
        close = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0 - distance}
        gaps.append((dpo_loss(batch, beta=0.3, **close).terms[0].values - plain).abs().max().item())
    assert 0 < gaps[1] < gaps[0] / 50 and gaps[1] < 1e-2


@pytest.mark.parametrize(
    ("divergence", "slope"),
    [("reverse_kl", 1.0), ("forward_kl", 1.0), ("js_divergence", 0.5), ("alpha_divergence", 1.0)],
)
def test_at_the_reference_every_divergence_is_its_curvature_times_the_reverse_kl(divergence: str, slope: float) -> None:
    """d f'(t) / d log t at t = 1 is f''(1): 1, and 1/2 for Jensen-Shannon as f-DPO scales it."""
    pairs = [
        dataclasses.replace(p, policy_chosen=p.ref_chosen, policy_rejected=p.ref_rejected) for p in random_pairs(6, 4)
    ]
    batch = family_batch(pairs)
    own = gradient(dpo_loss(batch, beta=0.3, f_divergence_type=divergence), batch)
    torch.testing.assert_close(own, slope * gradient(dpo_loss(batch, beta=0.3), batch), rtol=1e-12, atol=1e-15)


def test_responses_of_one_length_have_nothing_to_desensitise() -> None:
    pairs = [p for p in random_pairs(seed=7, count=60) if len(p.policy_chosen) == len(p.policy_rejected)]
    assert len(pairs) > 5
    batch = family_batch(pairs)
    agree(dpo_loss(batch, beta=0.3, ld_alpha=0.0), dpo_loss(batch, beta=0.3), batch)


def test_without_a_tail_longer_responses_are_judged_by_their_beginning() -> None:
    """GOLDEN: the second chosen token counts for nothing; -4 + 5 against -12 + 11.5 is the same margin of 1.5."""
    assert golden(dpo_loss, beta=0.1, ld_alpha=0.0) == pytest.approx(0.6209570478, abs=5e-11)


def test_a_policy_sure_of_its_tokens_weighs_them_with_one() -> None:
    """log pi(y_t) = log sum_v pi(v)^2 where pi is one token, or where all tokens are as likely as y_t."""
    batch = random_family_batch(seed=8)
    sure = dataclasses.replace(batch, policy_log_sum_sq_probs=batch.policy_token_logps.detach())
    assert policy_weights(sure).tolist() == pytest.approx([1.0] * 6, rel=1e-12)
    agree(dpo_loss(sure, beta=0.3, use_weighting=True), dpo_loss(sure, beta=0.3), sure)


def test_weights_have_no_gradient() -> None:
    """A pair's gradient is its weight times that of the plain loss."""
    batch = random_family_batch(seed=9)
    weights = policy_weights(batch)
    assert not weights.requires_grad and weights.std() > 0.01
    wanted = weights[:, None, None] * gradient(dpo_loss(batch, beta=0.3), batch)
    torch.testing.assert_close(
        gradient(dpo_loss(batch, beta=0.3, use_weighting=True), batch), wanted, rtol=1e-12, atol=0
    )


def test_what_is_not_there_is_said() -> None:
    batch = dataclasses.replace(random_family_batch(seed=10), policy_log_sum_sq_probs=None)
    with pytest.raises(ValueError, match="policy_log_sum_sq_probs is None"):
        dpo_loss(batch, beta=0.1, use_weighting=True)
    bare = dataclasses.replace(batch, ref_token_logps=None)
    for ld_alpha in (None, 0.5):
        with pytest.raises(ValueError, match="ref_token_logps is None"):
            scored_pairs(bare, ld_alpha=ld_alpha)


@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_gives_all_tokens_only_where_pairs_are_weighed(name: str) -> None:
    method = load_method(name)
    assert "policy_log_sum_sq_probs" not in method.needs(method.options())
    if name not in ("aot", "aot_unpaired"):
        assert "policy_log_sum_sq_probs" in method.needs(method.options(use_weighting=True))
