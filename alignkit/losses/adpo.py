"""ADPO: a group's candidates, in coordinates relative to an anchor, are drawn to a target distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.lists import candidate_metrics, existing_candidates, masked_log_softmax, masked_mean, pick, roles
from alignkit.losses.pairs import masked_metric
from alignkit.losses.sft import sft_term
from alignkit.losses.targets import TARGETS, Choices
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, Metric, count_items, sequence_logps

LARGEST_K3_GAP = 20.0
"""Nats at which the gap of one token is cut in the k3 estimate; exp of it is 5e8."""


LOGP_REDUCTIONS = {"sum": False, "mean": True}
"""Whether a ``logp_reduction`` divides by the number of tokens."""


@dataclass(frozen=True)
class AdaptiveTau:
    """The temperature rule "smooth hybrid": a group's tau follows its surprise H and its mean reward R.

    tau = clamp(base * (1 + a * H + b * (1 - H) * (1 - R)), minimum, maximum). H is the mean NLL of a token of the group
    over log V, at most 1; R is the group's mean reward, scaled to [0, 1] by the least and the largest of the
    micro-batch, and 1/2 where these are equal. No gradient passes through tau.

    Attributes:
        base: tau_base; > 0.
        entropy_coef: a.
        error_coef: b.
        minimum, maximum: Bounds of tau.
    """

    base: float
    entropy_coef: float
    error_coef: float
    minimum: float
    maximum: float


def adpo_loss(
    batch: CandidateBatch,
    *,
    target: str = "listwise_zscore",
    tau: float | int | AdaptiveTau = 1.0,
    beta_reward: float = 0.5,
    logp_reduction: str = "sum",
    anchor_kl_coef: float = 0.0,
    eta: float = 0.0,
    sft_normalization: str = "token",
) -> LossOutput:
    r"""ADPO on groups of scored candidates, any number of them in a group.

    Equation (Wang 2025, arXiv 2510.18913)::

        u_i = (l_i - l_ref_i) / tau,     p = softmax(u) over the candidates,     L = E[ - sum_i q_i * log p_i ]

    Targets q, with R the rewards of the group::

        listwise_zscore   softmax(A / beta_r),  A = (R - mean) / (std + 1e-8), unbiased std, R divided by its range
        listwise_raw      softmax(R / beta_r)
        kde               softmax(logit(F(R)) / beta_r),  F a Gaussian kernel estimate of the group's rewards
        pairwise_hard     (1, 0) on every pair with R_i > R_j;  mean over the pairs
        pairwise_soft     (sigma((R_i - R_j) / beta_r), 1 - that) on every pair;  mean over the pairs
        plackett_luce     first place among all, second among the rest, ...;  mean over the places

    Symbols: l_i is the log-prob of candidate i under the policy, l_ref_i under the anchor (``ref_token_logps``; None is
    the uniform anchor, l_ref = 0); ``tau``, beta_r = ``beta_reward``, R = ``scores``. With two candidates of unequal
    reward ``pairwise_hard`` is DPO with beta = 1 / tau. The gradient in l is (p - q) / tau and sums to 0 over the
    group, so the total likelihood of the candidates is not controlled; ``eta`` adds
    :func:`alignkit.losses.sft.sft_term` on the first candidate against that. At the optimum pi is proportional to
    pi_ref * q^tau: a smaller tau stays closer to the anchor, though it makes the raw gradient larger.

    ``anchor_kl_coef`` adds that many times the mean over tokens of exp(d) - d - 1, d = l_ref - l of the token, cut at
    20 nats from above.

    Deviations: ``sum`` is the default of ``logp_reduction`` so that two candidates compare with DPO (``mean`` is the
    author's advice for long completions), and neither u nor the log-ratio is clipped. Rewards are divided by their
    range before z-scores are taken, so that the 1e-8 means the same whatever their scale. Equal rewards under
    ``plackett_luce`` share their places, q uniform over them, and under ``pairwise_hard`` train nothing. A group with
    fewer than two candidates is left out of the preference term.

    Fidelity: author's text and code for the objective, the listwise targets, the temperature rule and the
    regulariser towards the anchor. ``kde`` is our reconstruction of a name; the pairwise targets follow from the
    objective with two candidates, and their mean over more is ours, as are the ties.

    Args:
        batch: Groups [B, K, T], nats; the best candidate first for ``eta`` and the metrics.
        target: One of :data:`alignkit.losses.targets.TARGETS`.
        tau: Temperature, nats; > 0, or the rule by which it varies.
        beta_reward: Temperature of the rewards, in their unit; > 0.
        logp_reduction: ``sum`` or ``mean`` over the tokens of a completion.
        anchor_kl_coef: Weight of the estimate of the divergence from the anchor; 0 leaves it out.
        eta: Weight of the SFT term; 0 leaves it out.
        sft_normalization: Denominator of the SFT term, ``token`` or ``sequence_sum``.

    Returns:
        The terms ``preference`` [B], ``anchor_kl`` [B] and ``sft`` [B], the latter two only where asked for, in nats;
        and metrics, those about the anchor only where there is one.

    Raises:
        ValueError: ``tau`` is a rule and the batch does not know the vocabulary, or a divergence from no anchor is
            asked for.
    """
    exists = existing_candidates(batch)
    scores = batch.scores.to(batch.policy_logps.dtype)
    logratio = _logratio(batch, LOGP_REDUCTIONS[logp_reduction])
    temperature = _temperature(batch, scores, exists, tau)
    u = logratio / temperature.unsqueeze(-1)
    choices = TARGETS[target](scores, exists, beta_reward)
    log_p = masked_log_softmax(u.unsqueeze(1).expand(choices.sets.shape), choices.sets)
    values = masked_mean(-(choices.q * log_p).sum(-1), choices.valid)
    terms = [LossTerm("preference", values, count_items(batch.completion_mask)["group"])]
    if anchor_kl_coef > 0:
        terms.append(_anchor_kl_term(batch, anchor_kl_coef))
    if eta > 0:
        terms.append(sft_term(batch, eta=eta, sft_normalization=sft_normalization))
    metrics = {
        **_target_metrics(choices, log_p, values, exists),
        **candidate_metrics(batch, scores, exists, u),
        **_anchor_metrics(batch, exists, logratio),
        "adpo/tau": masked_metric(temperature, exists.sum(-1) > 1),
    }
    return LossOutput(tuple(terms), metrics)


def adaptive_tau(
    batch: CandidateBatch, scores: Float[Tensor, "B K"], exists: Bool[Tensor, "B K"], rule: AdaptiveTau
) -> Float[Tensor, " B"]:
    """Temperature of every group by :class:`AdaptiveTau`, detached.

    Args:
        batch: Groups that know the ``vocabulary_size``.
        scores: Rewards [B, K].
        exists: Existing candidates [B, K].
        rule: The coefficients.

    Raises:
        ValueError: The batch does not know the vocabulary.
    """
    if batch.vocabulary_size is None:
        raise ValueError("the adaptive temperature needs the vocabulary size (vocabulary_size is None)")
    token_logps = batch.policy_token_logps.detach().to(scores.dtype)
    nll = -masked_mean(token_logps.flatten(1), (batch.completion_mask & exists.unsqueeze(-1)).flatten(1))
    surprise = (nll / math.log(batch.vocabulary_size)).clamp(max=1.0)
    reward, trains = masked_mean(scores, exists), exists.sum(-1) > 1
    least = reward.masked_fill(~trains, torch.inf).amin()
    largest = reward.masked_fill(~trains, -torch.inf).amax()
    scaled = torch.where(largest > least, (reward - least) / (largest - least), 0.5)
    factor = 1.0 + rule.entropy_coef * surprise + rule.error_coef * (1.0 - surprise) * (1.0 - scaled)
    return (rule.base * factor).clamp(min=rule.minimum, max=rule.maximum)


def _temperature(
    batch: CandidateBatch, scores: Float[Tensor, "B K"], exists: Bool[Tensor, "B K"], tau: float | int | AdaptiveTau
) -> Float[Tensor, " B"]:
    if isinstance(tau, (float, int)):
        return scores.new_full(scores.shape[:1], tau)
    return adaptive_tau(batch, scores, exists, tau)


def _logratio(batch: CandidateBatch, is_mean: bool) -> Float[Tensor, "B K"]:
    """l - l_ref of every candidate that exists; l_ref is 0 without an anchor."""
    total = batch.policy_logps
    if batch.ref_token_logps is not None:
        total = total - sequence_logps(batch.ref_token_logps, batch.completion_mask)
    # The 0 / 0 of a candidate that does not exist is masked wherever log-ratios are used.
    return total / batch.completion_mask.sum(-1) if is_mean else total


def _anchor_kl_term(batch: CandidateBatch, coefficient: float) -> LossTerm:
    """exp(d) - d - 1 with d = l_ref - l, summed over the tokens of each group, averaged over tokens."""
    if batch.ref_token_logps is None:
        raise ValueError("there is no divergence from the uniform anchor (ref_token_logps is None)")
    wide = torch.promote_types(batch.policy_token_logps.dtype, torch.float32)
    gap = (batch.ref_token_logps.to(wide) - batch.policy_token_logps.to(wide)).clamp(max=LARGEST_K3_GAP)
    counts = batch.completion_mask & batch.candidate_mask.unsqueeze(-1)
    values = (torch.expm1(gap) - gap).masked_fill(~counts, 0.0).flatten(1).sum(-1)
    items = count_items(batch.completion_mask)["completion_token"]
    return LossTerm("anchor_kl", values, items, item="completion_token", weight=coefficient)


@torch.no_grad()
def _target_metrics(
    choices: Choices,
    log_p: Float[Tensor, "B C K"],
    values: Float[Tensor, " B"],
    exists: Bool[Tensor, "B K"],
) -> dict[str, Metric]:
    """How far the loss is from the least it can be, and what is left of its gradient."""
    trains = exists.sum(-1) > 1
    entropy = masked_mean(choices.entropy, choices.valid)
    # The gradient in u [B, K]: choices that pull a candidate to and fro cancel, so it is summed before it is measured.
    pulls = (log_p.exp() - choices.q).mT
    slope = masked_mean(pulls, choices.valid.unsqueeze(1).expand_as(pulls))
    return {
        "adpo/target_entropy": masked_metric(entropy, trains),
        "adpo/target_kl": masked_metric(values - entropy, trains),
        "effective_weight": masked_metric(0.5 * slope.abs().sum(-1), trains),
    }


@torch.no_grad()
def _anchor_metrics(
    batch: CandidateBatch, exists: Bool[Tensor, "B K"], logratio: Float[Tensor, "B K"]
) -> dict[str, Metric]:
    """How far the policy is from its anchor; nothing where there is none."""
    if batch.ref_token_logps is None:
        return {}
    trains = exists.sum(-1) > 1
    gaps = batch.policy_logps - sequence_logps(batch.ref_token_logps, batch.completion_mask)
    drift = logratio.abs().masked_fill(~exists, 0.0).sum(-1)
    return {
        **{f"logratio/{role}": masked_metric(pick(gaps, is_it), trains) for role, is_it in roles(exists).items()},
        "adpo/anchor_drift": masked_metric(drift, trains, exists.sum(-1)),
    }
