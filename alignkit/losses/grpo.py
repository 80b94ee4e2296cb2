"""GRPO: a clipped policy gradient on completions whose advantages are relative to their group; every form of TRL's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignkit.losses.types import LossOutput, LossTerm, Metric, PolicyBatch, count_policy_items

LARGEST_LOG_RATIO = 20.0
"""Nats at which a log-ratio is cut before exp, which is 5e8 there."""

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types with PPO's hard clip; they differ in what the sum over tokens is divided by."""

ITEMS = {
    "grpo": "completion",
    "sapo": "completion",
    "dr_grpo": "completion",
    "luspo": "completion",
    "dapo": "completion_token",
    "cispo": "completion_token",
    "bnpo": "micro_batch",
}
"""What each loss type is averaged over. Tensors annotated [B, _] below hold a value a token, or one a completion."""


@dataclass(frozen=True)
class Clip:
    """Where PPO's surrogate stops rewarding a change of the ratio r.

    Attributes:
        low: Below 1 - low a worse-than-expected token is not pushed down further.
        high: Above 1 + high a better one is not pushed up further.
        delta: Largest r that a worse-than-expected token is weighted with; None for any.
    """

    low: float
    high: float
    delta: float | None = None


@dataclass(frozen=True)
class Regularizers:
    """What is added to the policy's loss.

    Attributes:
        beta: Weight of the divergence from the reference; 0 leaves it out.
        bias_correction_kl: Whether that divergence is weighted by the ratio, which makes it unbiased off-policy.
        entropy_coef: Weight of the entropy bonus; 0 leaves it out.
    """

    beta: float = 0.0
    bias_correction_kl: bool = True
    entropy_coef: float = 0.0


NO_REGULARIZERS = Regularizers()


def grpo_loss(
    batch: PolicyBatch,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    level: str = "token",
    aggregation: str = "dapo",
    delta: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    regularizers: Regularizers = NO_REGULARIZERS,
) -> LossOutput:
    r"""GRPO on completions with advantages.

    Equation (Shao et al. 2024, arXiv 2402.03300, Eq. 3, and its successors; A the advantage)::

        l_t   = log pi(y_t | y_<t) - log pi_old(y_t | y_<t)
        r     = exp(l_t)                          level token
        r     = exp( (1/n) * sum_t l_t )          level sequence (GSPO, arXiv 2507.18071), n tokens a completion
        s_t   = -min( min(r, delta) * A,  clip(r, 1 - eps_low, 1 + eps_high) * A )
        L     = aggregate(s)  +  beta * aggregate( e^d - d - 1 )  -  c * mean entropy,     d = log pi_ref - log pi

    Aggregation of s over tokens t of B completions, N their tokens::

        grpo       (1/B) * sum_i (1/n_i) * sum_t s               bnpo    (1/N) * sum s within each micro-batch
        dr_grpo    (1/B) * sum_i sum_t s / max_completion_length dapo    (1/N) * sum s over the optimizer step
        luspo      (1/B) * sum_i sum_t s                         (arXiv 2602.05261)
        cispo      as dapo, with  s = -sg(min(r, eps_high)) * A * log pi                     (arXiv 2506.13585)
        sapo       as grpo, with  s = -A * sigmoid(tau (r - 1)) * 4 / tau,  tau by the sign of A  (arXiv 2511.20347)

    Symbols: pi_old is ``old_token_logps``, ``eps_low`` and ``eps_high`` are ``epsilon_low`` and ``epsilon_high``, tau
    is ``sapo_temperatures``, c is ``regularizers.entropy_coef``; sg stops the gradient. ``batch.kept`` and
    ``batch.correction`` multiply s, not the divergence. With ``bias_correction_kl`` e^d - d - 1 is multiplied by r,
    through which the gradient passes.

    Deviations: exp is taken of log-ratios cut at 20 nats either way, and d is cut at 20 from above, so that no loss
    overflows. Rows without a token count among the B and contribute 0.

    Fidelity: operation for operation the loss of TRL 1.16's ``GRPOTrainer``, without its ``vespo`` and its adaptive
    entropy coefficient; the equations are those of the papers named.

    Args:
        batch: Completions [B, T], nats.
        epsilon_low: Distance of the lower clip from 1.
        epsilon_high: Distance of the upper clip from 1; of ``cispo`` the largest weight itself.
        level: ``token`` or ``sequence``.
        aggregation: One of :data:`ITEMS`.
        delta: Largest ratio in the unclipped part; None for any.
        sapo_temperatures: tau where A > 0, and elsewhere.
        regularizers: Divergence from the reference, and entropy.

    Returns:
        The terms ``policy``, and where asked for ``kl`` and ``entropy``; and metrics over tokens, or over completions
        at level ``sequence``.

    Raises:
        ValueError: The batch lacks reference log-probs or entropies that a regulariser needs.
    """
    ratio = log_ratios(batch, level).exp()
    advantages = token_advantages(batch)
    clip = Clip(epsilon_low, epsilon_high, delta)
    match aggregation:
        case "cispo":
            surrogate = -ratio.clamp(max=epsilon_high).detach() * advantages * written(batch.policy_token_logps, batch)
            metrics = {"cispo_clip_ratio": token_metric((ratio > epsilon_high) & (advantages > 0), batch)}
        case "sapo":
            tau = torch.full_like(advantages, sapo_temperatures[1]).masked_fill(advantages.gt(0), sapo_temperatures[0])
            surrogate, metrics = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages, {}
        case _:
            surrogate, metrics = (
                clipped_surrogate(ratio, advantages, clip),
                clip_metrics(ratio, advantages, clip, batch),
            )
    terms = policy_terms(batch, surrogate, ratio, aggregation, regularizers)
    return LossOutput(terms, {**metrics, **ratio_metrics(batch, ratio, regularizers)})


def written(values: Float[Tensor, "B _"], batch: PolicyBatch) -> Float[Tensor, "B _"]:
    """The values in float32 or wider, 0 where the model wrote nothing, whatever stands there."""
    mask = batch.completion_mask
    hidden = ~mask if values.shape[-1] == mask.shape[-1] else ~mask.any(-1, keepdim=True)
    return values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(hidden, 0.0)


def lengths(batch: PolicyBatch) -> Int[Tensor, " B"]:
    """Tokens of each completion, 1 of one without."""
    return batch.completion_mask.sum(-1).clamp(min=1)


def token_log_ratios(batch: PolicyBatch) -> Float[Tensor, "B T"]:
    """log pi - log pi_old of every token, 0 where masked."""
    policy = written(batch.policy_token_logps, batch)
    return policy - (policy.detach() if batch.old_token_logps is None else written(batch.old_token_logps, batch))


def log_ratios(batch: PolicyBatch, level: str) -> Float[Tensor, "B _"]:
    """Logarithm of r: [B, T] at level ``token``, the mean over tokens [B, 1] at level ``sequence``."""
    values = token_log_ratios(batch)
    if level == "sequence":
        values = (values.sum(-1) / lengths(batch)).unsqueeze(-1)
    return values.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def token_advantages(batch: PolicyBatch) -> Float[Tensor, "B _"]:
    """Advantages [B, 1] or [B, T], 0 where masked."""
    advantages = batch.advantages
    return written(advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages, batch)


def clipped_surrogate(
    ratio: Float[Tensor, "B _"], advantages: Float[Tensor, "B _"], clip: Clip
) -> Float[Tensor, "B _"]:
    """s of the equation, to be minimised."""
    unclipped = ratio if clip.delta is None else ratio.clamp(max=clip.delta)
    return -torch.min(unclipped * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages)


def policy_terms(
    batch: PolicyBatch,
    surrogate: Float[Tensor, "B _"],
    ratio: Float[Tensor, "B _"],
    aggregation: str,
    regularizers: Regularizers,
) -> tuple[LossTerm, ...]:
    """The terms of a surrogate, with the regularisers that are switched on.

    Args:
        batch: Completions.
        surrogate: s, before the tokens that are not kept leave and the correction is applied.
        ratio: r, for the bias correction of the divergence.
        aggregation: One of :data:`ITEMS`.
        regularizers: What is added.
    """
    mask, kept = batch.completion_mask, batch.kept
    surrogate = surrogate.expand(mask.shape)
    surrogate = surrogate if kept is None else surrogate.masked_fill(~kept, 0.0)
    surrogate = surrogate if batch.correction is None else surrogate * written(batch.correction, batch)
    terms = [aggregate("policy", surrogate, batch, aggregation)]
    if regularizers.beta != 0:
        divergence = reference_kl(batch, ratio if regularizers.bias_correction_kl else None)
        terms.append(aggregate("kl", divergence, batch, aggregation, regularizers.beta))
    if regularizers.entropy_coef != 0:
        acts = mask if kept is None else mask & kept
        entropy = (_entropies(batch) * acts).sum() / acts.sum().clamp(min=1)
        items = count_policy_items(mask)["micro_batch"]
        terms.append(LossTerm("entropy", entropy.view(1), items, "micro_batch", -regularizers.entropy_coef))
    return tuple(terms)


def aggregate(
    name: str, per_token: Float[Tensor, "B T"], batch: PolicyBatch, aggregation: str, weight: float = 1.0
) -> LossTerm:
    """The term of a loss per token: its sums by completion, or of ``bnpo`` the one mean of this micro-batch.

    Args:
        name: Of the term.
        per_token: The loss, whatever where masked.
        batch: Completions.
        aggregation: One of :data:`ITEMS`.
        weight: Of the term.
    """
    items = count_policy_items(batch.completion_mask)
    values = written(per_token, batch).sum(-1)
    match aggregation:
        case "grpo" | "sapo":
            values = values / lengths(batch)
        case "dr_grpo":
            values = values / batch.max_completion_length
        case "bnpo":
            values = (values.sum() / items["completion_token"].clamp(min=1)).view(1)
    return LossTerm(name, values, items[ITEMS[aggregation]], ITEMS[aggregation], weight)


def reference_kl(batch: PolicyBatch, ratio: Float[Tensor, "B _"] | None) -> Float[Tensor, "B T"]:
    """e^d - d - 1 with d = log pi_ref - log pi, an estimate of KL(pi || pi_ref), times the ratio where one is given."""
    if batch.ref_token_logps is None:
        raise ValueError("beta needs reference log-probs, this batch carries none (ref_token_logps is None)")
    gap = written(batch.ref_token_logps, batch) - written(batch.policy_token_logps, batch)
    gap = gap.clamp(max=LARGEST_LOG_RATIO)
    divergence = torch.exp(gap) - gap - 1
    return divergence if ratio is None else divergence * ratio


@torch.no_grad()
def clip_metrics(
    ratio: Float[Tensor, "B _"], advantages: Float[Tensor, "B _"], clip: Clip, batch: PolicyBatch
) -> dict[str, Metric]:
    """Shares of tokens, or completions, that are clipped from below, from above, and at all."""
    low, high = (ratio < 1 - clip.low) & (advantages < 0), (ratio > 1 + clip.high) & (advantages > 0)
    shares = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    return {f"clip_ratio/{side}": token_metric(is_clipped, batch) for side, is_clipped in shares.items()}


@torch.no_grad()
def ratio_metrics(batch: PolicyBatch, ratio: Float[Tensor, "B _"], regularizers: Regularizers) -> dict[str, Metric]:
    """The ratio's mean and mean square, the entropy where it is known, and the divergence where it is in the loss."""
    metrics = {"ratio/mean": token_metric(ratio, batch), "ratio/mean_square": token_metric(ratio.square(), batch)}
    if batch.entropies is not None:
        metrics["entropy"] = token_metric(_entropies(batch), batch)
    if regularizers.beta != 0:
        divergence = reference_kl(batch, ratio if regularizers.bias_correction_kl else None)
        metrics["kl"] = token_metric(divergence, batch)
    return metrics


@torch.no_grad()
def token_metric(values: Float[Tensor, "B _"] | Bool[Tensor, "B _"], batch: PolicyBatch) -> Metric:
    """A mean over the tokens written, or over completions with any where there is one value for each."""
    mask = batch.completion_mask
    counted = mask if values.shape[-1] == mask.shape[-1] else mask.any(-1, keepdim=True)
    wide = values.to(torch.promote_types(batch.policy_token_logps.dtype, torch.float32))
    return Metric(wide.masked_fill(~counted, 0.0).sum(-1), counted.sum(-1).to(wide.dtype))


def _entropies(batch: PolicyBatch) -> Float[Tensor, "B T"]:
    if batch.entropies is None:
        raise ValueError("entropy_coef needs entropies, this batch carries none (entropies is None)")
    return written(batch.entropies, batch)
