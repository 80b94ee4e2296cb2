"""GRPO-Guard-style clipping for language models: ratios are made comparable between steps before they are clipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignkit.losses.grpo import (
    CLIPPED,
    LARGEST_LOG_RATIO,
    NO_REGULARIZERS,
    Clip,
    Regularizers,
    clip_metrics,
    clipped_surrogate,
    lengths,
    log_ratios,
    policy_terms,
    ratio_metrics,
    token_advantages,
    token_metric,
    written,
)
from alignkit.losses.step_statistics import (
    Moments,
    axis_values,
    counted_rows,
    moments,
    smoothed,
    step_bounds,
    step_sums,
    steps_of,
)
from alignkit.losses.types import LossOutput, PolicyBatch

SMALLEST_VARIANCE = 1e-8
"""Added to variances, nats^2, so that kappa is 1 on-policy, where all are 0."""
SMALLEST_GINI = 1e-4
"""Added to 1 - sum p^2, which is 0 where the old policy was certain."""
SMALLEST_PULL = 1e-8
"""Added to root mean squares of the gradient, so that steps without any are left alone."""
MEMORY = "grpo_guard"
"""Key of the smoothed statistics in ``batch.memory``: [4, S], the moments and the summed centre."""


@dataclass(frozen=True)
class Guard:
    """How log-ratios are normalised.

    Attributes:
        step_axis: What a step is: ``position``, ``position_quantile``, ``entropy``, or ``length`` at level sequence.
        num_steps: S.
        scale: What sets kappa: ``pooled``, ``fisher``, ``fixed``, ``sqrt_length`` or ``none``.
        center: What is taken off: ``logmean``, ``logmeanexp``, ``exact_kl``, ``k3`` or ``none``.
        mode: ``full``: the normalised ratio is the weight. ``gate``: it decides on clipping alone.
        reweight: ``none``, ``inverse_kappa`` or ``bucket_rms``.
        min_count: A step with fewer rows is left as it is.
        kappa_min, kappa_max: Bounds of kappa.
        fixed_std: Standard deviation that ``fixed`` gives every step, nats.
        alpha, wmax: Exponent and largest weight of ``bucket_rms``.
        ema: Share of the statistics that the next batch still counts; 0 forgets them.
    """

    step_axis: str = "position_quantile"
    num_steps: int = 8
    scale: str = "pooled"
    center: str = "logmeanexp"
    mode: str = "gate"
    reweight: str = "none"
    min_count: int = 64
    kappa_min: float = 0.25
    kappa_max: float = 4.0
    fixed_std: float = 0.1
    alpha: float = 1.0
    wmax: float = 4.0
    ema: float = 0.0


TOKEN_GUARD = Guard()


def grpo_guard_loss(
    batch: PolicyBatch,
    *,
    guard: Guard = TOKEN_GUARD,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    level: str = "token",
    aggregation: str = "dapo",
    delta: float | None = None,
    regularizers: Regularizers = NO_REGULARIZERS,
) -> LossOutput:
    r"""GRPO whose log-ratios l are centred and scaled step by step before they are clipped.

    The original (Wang et al. 2025, arXiv 2510.22319) normalises the ratio of every denoising step of a diffusion model;
    :func:`alignkit.losses.flow_guard.flow_guard_loss` is that. Here a step b is a set of n_b rows (tokens, or
    completions at level ``sequence``) with like positions, entropies or lengths.

    Equation (an analogue for language models, after Wang et al. 2025)::

        l_hat = kappa * (l - mu_b) - m_b,   r_hat = exp(l_hat)

        center logmean      mu_b the mean of l over b,  m_b = 0
               logmeanexp   mu_b the same,  m_b = log mean_b exp(kappa (l - mu_b)),  so that r_hat has the mean 1
               exact_kl     mu = -KL(pi_old || pi) of the row's own position,  m_b = 0
               k3           mu_b = -mean_b(e^l - 1 - l),  m_b = 0
               none         mu = m = 0
        scale  pooled       kappa_b = sqrt(vbar / v_b),  v_b the variance of l in b,  vbar = sum n_b v_b / sum n_b
               fisher       kappa = c / sqrt(1 - sum_k p_old,k^2),  c so that kappa has the mean 1
               fixed        kappa_b = fixed_std / sqrt(v_b)
               sqrt_length  kappa_i = sqrt(n_i / nbar),  n_i the tokens of completion i, nbar their mean
               none         kappa = 1
        mode   full         s = -min( min(r_hat, delta) A,  clip(r_hat, 1 - eps_low, 1 + eps_high) A )
               gate         s = -clip(r_hat, ...) A  without gradient, where r_hat is clipped;  -min(r, delta) A  else
        L as in GRPO from omega * s,  with sum n_b omega_b = sum n_b

        reweight none           omega = 1
                 inverse_kappa  omega ~ 1 / kappa
                 bucket_rms     omega_b ~ (G / G_b)^alpha, at most wmax and at least 1 / wmax,
                                G_b^2 = mean_b (A w)^2 q,  G^2 = mean of G_b^2 over rows,
                                w = r_hat kappa in mode full and r in mode gate,  q the squared gradient of log pi in
                                the logits: 1 - 2 p_old + sum_k p_old,k^2, or without that sum (1 - p_old)^2

    kappa is kept within [``kappa_min``, ``kappa_max``]. Statistics are of the rows of all processes whose surrogate
    counts, carry no gradient, and leave a step with fewer than ``min_count`` rows as it is (l_hat = l, omega = 1).
    A row's own mean is never taken off: it is the drift that the clip bounds.

    Level ``sequence`` with center ``logmean``, scale ``sqrt_length``, one step and mode ``gate`` bounds a completion by
    the band of FSPO (Mao et al. 2025, arXiv 2509.09177, first version): its summed log-ratio S leaves the surrogate
    where it leaves  mu n +- c sqrt(n),  with  c = log(1 +- eps) sqrt(nbar).  FSPO weights with e^S; here the weight is
    the geometric mean of GSPO. ``exact_kl`` takes the drift from the whole distributions.

    Symbols: l, A, eps, delta and the aggregation as in :func:`alignkit.losses.grpo.grpo_loss`; the rest as in
    :class:`Guard`.

    Deviations: the statistics of a language model replace what the noise schedule of a diffusion model says. Tokens
    have E r = 1 anyway, so that the mean below 1 that the paper corrects exists at level ``sequence`` alone; between
    steps of unequal entropy the spread differs at both.

    Fidelity: an engineering analogue; no form of GRPO-Guard for language models is published. The paper's authors are
    reported to leave text tokens alone in their unified model.

    Args:
        batch: Completions [B, T], nats, with what the guard's choices need.
        guard: How to normalise.
        epsilon_low: Distance of the lower clip from 1.
        epsilon_high: Distance of the upper clip from 1.
        level: ``token`` or ``sequence``.
        aggregation: A loss type with a hard clip.
        delta: Largest r_hat, or r in mode ``gate``, in the unclipped part.
        regularizers: As in GRPO; they are neither clipped nor reweighted.

    Returns:
        The terms of GRPO; its metrics, in which clipping is that of r_hat; and those of the guard.

    Raises:
        ValueError: The loss type has no hard clip, or the batch lacks what a choice needs.
    """
    if aggregation not in CLIPPED:
        raise ValueError(f"{aggregation} has no hard clip that a guard could move; write one of: {', '.join(CLIPPED)}")
    log_ratio, advantages, clip = (
        log_ratios(batch, level),
        token_advantages(batch),
        Clip(epsilon_low, epsilon_high, delta),
    )
    found = normalization(batch, log_ratio, level, guard)
    normalized = normalized_ratio(log_ratio, found.kappa, found.offset)
    ratio = log_ratio.exp()
    surrogate = (
        gated_surrogate(ratio, normalized, advantages, clip)
        if guard.mode == "gate"
        else clipped_surrogate(normalized, advantages, clip)
    )
    terms = policy_terms(batch, found.weight * surrogate, ratio, aggregation, regularizers)
    before = clip_metrics(ratio, advantages, clip, batch)
    metrics = {
        **clip_metrics(normalized, advantages, clip, batch),
        **ratio_metrics(batch, ratio, regularizers),
        "grpo_guard/raw_clip_low": before["clip_ratio/low_mean"],
        "grpo_guard/raw_clip_high": before["clip_ratio/high_mean"],
        "grpo_guard/ratio_mean": token_metric(normalized, batch),
        "grpo_guard/ratio_mean_square": token_metric(normalized.square(), batch),
        "grpo_guard/kappa": token_metric(found.kappa, batch),
        "grpo_guard/guarded": token_metric(found.guarded, batch),
    }
    return LossOutput(terms, metrics)


def normalized_ratio(
    log_ratio: Float[Tensor, "*N"], kappa: Float[Tensor, "*N"], offset: Float[Tensor, "*N"]
) -> Float[Tensor, "*N"]:
    """r_hat, of an l_hat cut at 20 nats either way."""
    return (kappa * log_ratio + offset).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def gated_surrogate(
    ratio: Float[Tensor, "B _"], normalized: Float[Tensor, "B _"], advantages: Float[Tensor, "B _"], clip: Clip
) -> Float[Tensor, "B _"]:
    """s of mode ``gate``, to be minimised."""
    low, high = 1 - clip.low, 1 + clip.high
    is_clipped = (normalized.gt(high) & advantages.gt(0)) | (normalized.lt(low) & advantages.lt(0))
    unclipped = ratio if clip.delta is None else ratio.clamp(max=clip.delta)
    return -torch.where(is_clipped, normalized.clamp(low, high), unclipped) * advantages


@dataclass(frozen=True)
class Normalization:
    """l_hat = kappa * l + offset, omega, and which rows are in a step that could be measured; no gradients."""

    kappa: Float[Tensor, "B _"]
    offset: Float[Tensor, "B _"]
    weight: Float[Tensor, "B _"]
    guarded: Bool[Tensor, "B _"]


@dataclass(frozen=True)
class Rows:
    """What is known of rows, in the order in which it is gathered.

    Attributes:
        log_ratio: l.
        axis: What the step is found by.
        factor: What kappa is proportional to, of a scale that is each row's own.
        kl: KL(pi_old || pi), nats.
        pull: A^2 q.
    """

    log_ratio: Float[Tensor, "*N"]
    axis: Float[Tensor, "*N"]
    factor: Float[Tensor, "*N"]
    kl: Float[Tensor, "*N"]
    pull: Float[Tensor, "*N"]


@dataclass(frozen=True)
class Steps:
    """Statistics of all processes.

    Attributes:
        moments: Of l, by step.
        measured: Steps with rows enough.
        mean_factor: What the factors of measured steps are divided by.
        center: m_b of ``logmeanexp``, b_b of ``k3``, else 0; by step.
    """

    moments: Moments
    measured: Bool[Tensor, " S"]
    mean_factor: Float[Tensor, ""]
    center: Float[Tensor, " S"]


@torch.no_grad()
def normalization(batch: PolicyBatch, log_ratio: Float[Tensor, "B _"], level: str, guard: Guard) -> Normalization:
    """Statistics over all processes, applied to the rows of this one.

    Args:
        batch: Completions.
        log_ratio: l at this level.
        level: ``token`` or ``sequence``.
        guard: How to normalise.
    """
    own = rows_of(batch, log_ratio, level, guard)
    columns = torch.stack(list(vars(own).values()), dim=-1)
    counted = columns[counted_rows(batch, level)]
    every = Rows(*batch.gather(counted.flatten()).view(-1, columns.shape[-1]).unbind(-1))
    bounds = step_bounds(every.axis, guard.step_axis, guard.num_steps, batch.max_completion_length)
    all_steps, own_steps = steps_of(every.axis, bounds), steps_of(own.axis, bounds)
    steps = measure(every, all_steps, batch.memory, guard)
    kappa, offset = affine(own, own_steps, steps, guard)
    weight = row_weights(every, all_steps, own_steps, kappa, steps, guard)
    return Normalization(kappa, offset, weight, steps.measured[own_steps])


def rows_of(batch: PolicyBatch, log_ratio: Float[Tensor, "B _"], level: str, guard: Guard) -> Rows:
    """The rows of this process, masked ones included; what the guard's choices do not use is 0."""
    nothing, axis = torch.zeros_like(log_ratio), axis_values(batch, level, guard.step_axis)
    kl = old_policy_kl(batch, level) if guard.center == "exact_kl" else nothing
    factor = nothing
    if guard.scale == "fisher":
        factor = (1 - old_sum_sq_probs(batch) + SMALLEST_GINI).rsqrt()
    elif guard.scale == "sqrt_length":
        factor = lengths(batch).unsqueeze(-1).to(log_ratio.dtype).sqrt()
    return Rows(
        log_ratio,
        *(part.to(log_ratio.dtype).expand(log_ratio.shape) for part in (axis, factor, kl, squared_pull(batch, level))),
    )


def old_policy_kl(batch: PolicyBatch, level: str) -> Float[Tensor, "B _"]:
    """KL(pi_old || pi) of each row, of a completion the mean over its tokens."""
    if batch.old_policy_kl is None:
        raise ValueError("center exact_kl needs KL(pi_old || pi), this batch carries none (old_policy_kl is None)")
    values = written(batch.old_policy_kl, batch)
    return (values.sum(-1) / lengths(batch)).unsqueeze(-1) if level == "sequence" else values


def old_sum_sq_probs(batch: PolicyBatch) -> Float[Tensor, "B T"]:
    """Sum over the vocabulary of the old policy's squared probabilities."""
    if batch.old_sum_sq_probs is None:
        raise ValueError("scale fisher needs the old policy's sum of squared probabilities (old_sum_sq_probs is None)")
    return written(batch.old_sum_sq_probs, batch)


def squared_pull(batch: PolicyBatch, level: str) -> Float[Tensor, "B _"]:
    """A^2 q: the squared gradient of A * l in the logits; of a completion, whose l is a mean, that of the mean."""
    old = batch.policy_token_logps if batch.old_token_logps is None else batch.old_token_logps
    probs = written(old, batch).exp()
    q = (1 - probs).square()
    if batch.old_sum_sq_probs is not None:
        q = q + (written(batch.old_sum_sq_probs, batch) - probs.square()).clamp(min=0)
    pull = written(token_advantages(batch).square() * q, batch)
    return (pull.sum(-1) / lengths(batch).square()).unsqueeze(-1) if level == "sequence" else pull


def measure(every: Rows, steps: Int[Tensor, " N"], memory: dict[str, Tensor], guard: Guard) -> Steps:
    """Statistics of the rows of all processes and, where they are smoothed, of earlier batches, whose memory is kept.

    Args:
        every: Rows of all processes.
        steps: Their steps.
        memory: Of the batch.
        guard: How to normalise.
    """
    now = moments(every.log_ratio, steps, guard.num_steps)
    past = memory[MEMORY].to(now.count) if MEMORY in memory else now.count.new_zeros(4, guard.num_steps)
    *past_moments, past_sum = past
    seen = smoothed(now, Moments(*past_moments), guard.ema)
    measured = seen.count >= guard.min_count
    factor = every.factor[measured[steps]]
    mean_factor = mean_or_one(factor.square()).sqrt() if guard.scale == "sqrt_length" else mean_or_one(factor)
    found = Steps(seen, measured, mean_factor, torch.zeros_like(seen.mean))
    if guard.center == "k3":
        terms = torch.expm1(every.log_ratio) - every.log_ratio
    else:
        kappa, offset = affine(every, steps, found, guard)
        terms = normalized_ratio(every.log_ratio, kappa, offset)
    summed = step_sums(terms, steps, guard.num_steps) + guard.ema * past_sum
    if guard.ema > 0:
        memory[MEMORY] = torch.stack([seen.count, seen.mean, seen.spread, summed])
    mean = summed / seen.count
    center = {"k3": mean, "logmeanexp": mean.log()}.get(guard.center, found.center)
    return Steps(seen, measured, mean_factor, center)


def mean_or_one(values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The mean; 1 of nothing, which then divides nothing that counts but must not make it NaN."""
    return values.mean() if len(values) else values.new_ones(())


def affine(
    rows: Rows, steps: Int[Tensor, "*N"], found: Steps, guard: Guard
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """kappa and the offset of each row: 1 and 0 in a step that is not measured.

    Args:
        rows: Any rows.
        steps: Their steps.
        found: Statistics of the steps.
        guard: How to normalise.
    """
    kappa = row_kappa(rows, steps, found, guard)
    mean, center = found.moments.mean[steps], found.center[steps]
    match guard.center:
        case "logmean" | "logmeanexp":
            offset = -kappa * mean - center
        case "exact_kl":
            offset = kappa * rows.kl
        case "k3":
            offset = kappa * center
        case _:
            offset = torch.zeros_like(kappa)
    measured = found.measured[steps]
    return kappa.masked_fill(~measured, 1.0), offset.masked_fill(~measured, 0.0)


def row_kappa(rows: Rows, steps: Int[Tensor, "*N"], found: Steps, guard: Guard) -> Float[Tensor, "*N"]:
    """kappa of each row, as if its step were measured."""
    variance = found.moments.variance + SMALLEST_VARIANCE
    match guard.scale:
        case "pooled":
            counts = found.moments.count * found.measured
            kappa = ((counts * variance).sum() / counts.sum() / variance).sqrt()[steps]
        case "fixed":
            kappa = (guard.fixed_std * variance.rsqrt())[steps]
        case "fisher" | "sqrt_length":
            kappa = rows.factor / found.mean_factor
        case _:
            return torch.ones_like(rows.factor)
    return kappa.clamp(guard.kappa_min, guard.kappa_max)


def row_weights(
    every: Rows,
    all_steps: Int[Tensor, " N"],
    own_steps: Int[Tensor, "B _"],
    own_kappa: Float[Tensor, "B _"],
    found: Steps,
    guard: Guard,
) -> Float[Tensor, "B _"]:
    """omega of the rows of this process: their mean over the measured rows of all is 1.

    Args:
        every: Rows of all processes.
        all_steps: Their steps.
        own_steps: Steps of the rows of this process.
        own_kappa: kappa of these.
        found: Statistics of the steps.
        guard: How to reweight.
    """
    if guard.reweight == "none":
        return torch.ones_like(own_kappa)
    kappa, offset = affine(every, all_steps, found, guard)
    if guard.reweight == "inverse_kappa":
        all_weights, own_weights = 1 / kappa, 1 / own_kappa
    else:
        full = kappa * normalized_ratio(every.log_ratio, kappa, offset)
        weight = every.log_ratio.exp() if guard.mode == "gate" else full
        by_step = rms_weights(every.pull * weight.square(), all_steps, found.measured, guard)
        all_weights, own_weights = by_step[all_steps], by_step[own_steps]
    mean = mean_or_one(all_weights[found.measured[all_steps]])
    return (own_weights / mean).masked_fill(~found.measured[own_steps], 1.0)


def rms_weights(
    pulls: Float[Tensor, " N"], steps: Int[Tensor, " N"], measured: Bool[Tensor, " S"], guard: Guard
) -> Float[Tensor, " S"]:
    """omega of ``bucket_rms`` by step, before its mean is made 1.

    Args:
        pulls: (A w)^2 q of the rows of all processes.
        steps: Their steps.
        measured: Steps with rows enough.
        guard: The exponent and the largest weight.
    """
    count = step_sums(torch.ones_like(pulls), steps, guard.num_steps)
    rms = (step_sums(pulls, steps, guard.num_steps) / count.clamp(min=1)).sqrt()
    pooled = mean_or_one(pulls[measured[steps]]).sqrt()
    weights = ((pooled + SMALLEST_PULL) / (rms + SMALLEST_PULL)).pow(guard.alpha)
    return weights.clamp(1 / guard.wmax, guard.wmax)
