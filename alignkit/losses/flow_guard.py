"""GRPO-Guard as published: one denoising step of a flow-matching model, its ratio normalised by the step's noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from alignkit.losses.types import LossOutput, LossTerm, Metric

BIASES = ("sample", "batch")
"""What the bias of the log-ratio is averaged over."""


@dataclass(frozen=True)
class FlowStepBatch:
    """One denoising step of B samples with D latent dimensions: x <- N(mu_old, s^2).

    Attributes:
        samples: x, what the step drew.
        policy_means: mu, with gradient.
        old_means: mu_old, of the policy that drew.
        noise_scale: s = sigma_t sqrt(dt), the standard deviation of the step.
        step_size: dt, flow time.
        advantages: How much better than expected the finished sample was.
    """

    samples: Float[Tensor, "B D"]
    policy_means: Float[Tensor, "B D"]
    old_means: Float[Tensor, "B D"]
    noise_scale: Float[Tensor, " B"]
    step_size: Float[Tensor, " B"]
    advantages: Float[Tensor, " B"]


def flow_guard_loss(
    batch: FlowStepBatch,
    *,
    epsilon: float = 2e-6,
    ratio_norm: bool = True,
    bias: str = "sample",
    advantage_clip: float = 5.0,
) -> LossOutput:
    r"""GRPO-Guard on one denoising step, or Flow-GRPO without it.

    Equation (Wang et al. 2025, arXiv 2510.22319; means are over the D latent dimensions)::

        l         = mean[ ((x - mu_old)^2 - (x - mu)^2) / (2 s^2) ]                     log-ratio of mean log-probs
        log r_hat = s * ( l + mean[(mu - mu_old)^2] / (2 s^2) )
        L         = (1/dt) * E max( -A r_hat, -A clip(r_hat, 1 - eps, 1 + eps) ),       A clipped to +-5

    Under x ~ N(mu_old, s^2) the mean of l is -mean[(mu - mu_old)^2] / (2 s^2), below 0 and the lower the less noise;
    log r_hat has the mean 0 and a variance without s. ``ratio_norm=False`` is Flow-GRPO (arXiv 2505.05470):
    log r = l, and no 1/dt.

    Symbols: x is ``samples``, mu ``policy_means``, mu_old ``old_means``, s ``noise_scale``, dt ``step_size``, A
    ``advantages``, eps ``epsilon``.

    Deviations: none. ``bias="sample"`` is the equation, as two other implementations have it; the author's code takes
    the mean of (mu - mu_old)^2 over the samples of the micro-batch too, which is ``bias="batch"``.

    Fidelity: author's code, for a micro-batch of one denoising step. The divergence from a reference, which the
    author's configurations switch off, is left to the caller.

    Args:
        batch: One denoising step.
        epsilon: Distance of both clips from 1; a mean over D dimensions makes it small. 2e-6 and 4e-6 are the author's.
        ratio_norm: Whether to normalise the ratio and divide by dt.
        bias: ``sample`` or ``batch``.
        advantage_clip: Largest absolute advantage.

    Returns:
        The term ``policy`` [B] over samples; the mean and mean square of the ratio, and the share clipped by side.

    Raises:
        ValueError: ``bias`` is neither.
    """
    if bias not in BIASES:
        raise ValueError(f"bias is {bias}; write one of: {', '.join(BIASES)}")
    variance = batch.noise_scale.square()
    distance = (batch.samples - batch.old_means).square() - (batch.samples - batch.policy_means).square()
    log_ratio = distance.mean(-1) / (2 * variance)
    scale = torch.ones_like(log_ratio)
    if ratio_norm:
        moved = (batch.policy_means - batch.old_means).square().mean(-1)
        moved = moved.mean() if bias == "batch" else moved
        log_ratio = batch.noise_scale * (log_ratio + moved / (2 * variance))
        scale = 1 / batch.step_size
    ratio, advantages = log_ratio.exp(), batch.advantages.clamp(-advantage_clip, advantage_clip)
    values = scale * torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - epsilon, 1 + epsilon))
    items = torch.full_like(values, 1, dtype=torch.int64).sum()
    low, high = ratio.lt(1 - epsilon) & advantages.lt(0), ratio.gt(1 + epsilon) & advantages.gt(0)
    metrics = {
        "ratio/mean": ratio,
        "ratio/mean_square": ratio.square(),
        "clip_ratio/low_mean": low.to(ratio.dtype),
        "clip_ratio/high_mean": high.to(ratio.dtype),
    }
    terms = (LossTerm("policy", values, items, item="sample"),)
    return LossOutput(terms, {name: Metric(value.detach()) for name, value in metrics.items()})
