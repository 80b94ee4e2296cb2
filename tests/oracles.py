"""The papers' equations in plain Python: floats and loops, no torch, no padding, no masks.

A response is the list of its token log-probs. An empty list is a response that is not there; a pair with one of those
trains nothing. Expectations come from here and never from a retyped torch expression.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """Token log-probs of a chosen and a rejected response under the policy and the reference, nats."""

    policy_chosen: list[float]
    policy_rejected: list[float]
    ref_chosen: list[float]
    ref_rejected: list[float]

    @property
    def complete(self) -> bool:
        return len(self.policy_chosen) > 0 and len(self.policy_rejected) > 0


def sigma(z: float) -> float:
    """The logistic function."""
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def logratio(policy: list[float], ref: list[float]) -> float:
    """rho = log pi(y|x) - log pi_ref(y|x), a sequence being the product of its tokens."""
    return math.fsum(policy) - math.fsum(ref)


def dpo(pair: Pair, beta: float) -> float:
    """-log( a^beta / (a^beta + b^beta) ), a and b the probability ratios of the two sides (arXiv 2305.18290, Eq. 7)."""
    a = math.exp(logratio(pair.policy_chosen, pair.ref_chosen))
    b = math.exp(logratio(pair.policy_rejected, pair.ref_rejected))
    return -math.log(a**beta / (a**beta + b**beta))


def flex_rewards(pair: Pair, beta_pos: float, beta_neg: float, length_normalize: bool = False) -> tuple[float, float]:
    """beta^+ rho_w and beta^- rho_l, each over the number of its tokens if asked."""
    rho_w = logratio(pair.policy_chosen, pair.ref_chosen)
    rho_l = logratio(pair.policy_rejected, pair.ref_rejected)
    if length_normalize:
        rho_w, rho_l = rho_w / len(pair.policy_chosen), rho_l / len(pair.policy_rejected)
    return beta_pos * rho_w, beta_neg * rho_l


def flex_dpo(pair: Pair, beta_pos: float, beta_neg: float, length_normalize: bool = False) -> float:
    """-log sigma(z) = log(1 + e^-z) with z = beta^+ rho_w - beta^- rho_l (arXiv 2406.07327, as its reviews read it)."""
    reward_w, reward_l = flex_rewards(pair, beta_pos, beta_neg, length_normalize)
    return math.log(1.0 + math.exp(reward_l - reward_w))


def flex_dpo_gradient(
    pair: Pair, beta_pos: float, beta_neg: float, length_normalize: bool = False
) -> tuple[float, float]:
    """(dl/dL_w, dl/dL_l) = (-beta^+ sigma(-z), +beta^- sigma(-z)) of one pair, L the sequence log-probs."""
    reward_w, reward_l = flex_rewards(pair, beta_pos, beta_neg, length_normalize)
    weight = sigma(reward_l - reward_w)
    if length_normalize:
        return -beta_pos * weight / len(pair.policy_chosen), beta_neg * weight / len(pair.policy_rejected)
    return -beta_pos * weight, beta_neg * weight


def sft_items(pairs: list[Pair], normalization: str) -> int:
    """N: what the summed negative log-likelihood of the chosen responses is divided by."""
    if normalization == "sequence_sum":
        return len(pairs)
    count = 0
    for pair in pairs:
        for _ in pair.policy_chosen:
            count += 1
    return count


def sft_sum(pairs: list[Pair]) -> float:
    """- sum over all chosen tokens of log pi(y_t | x, y_<t)."""
    total = 0.0
    for pair in pairs:
        for token_logp in pair.policy_chosen:
            total -= token_logp
    return total


def sft(pairs: list[Pair], normalization: str) -> float:
    """The same over N."""
    return sft_sum(pairs) / sft_items(pairs, normalization)


def pair_metrics(
    pairs: list[Pair], beta_pos: float, beta_neg: float, length_normalize: bool = False
) -> dict[str, float]:
    """The logged figures of a batch: means over the complete pairs, or over their tokens for ``mean_logps``."""
    rows = [_pair_metrics(p, beta_pos, beta_neg, length_normalize) for p in pairs if p.complete]
    metrics = {key: math.fsum(row[key] for row in rows) / len(rows) for key in rows[0]}
    for role in ("chosen", "rejected"):
        tokens = [t for p in pairs if p.complete for t in (p.policy_chosen if role == "chosen" else p.policy_rejected)]
        metrics[f"mean_logps/{role}"] = math.fsum(tokens) / len(tokens)
    return metrics


def _pair_metrics(pair: Pair, beta_pos: float, beta_neg: float, length_normalize: bool) -> dict[str, float]:
    reward_w, reward_l = flex_rewards(pair, beta_pos, beta_neg, length_normalize)
    logp_w, logp_l = math.fsum(pair.policy_chosen), math.fsum(pair.policy_rejected)
    row = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": 1.0 if reward_w > reward_l else 0.0,
        "logps/chosen": logp_w,
        "logps/rejected": logp_l,
        "logratio/chosen": logratio(pair.policy_chosen, pair.ref_chosen),
        "logratio/rejected": logratio(pair.policy_rejected, pair.ref_rejected),
        "effective_weight": sigma(reward_l - reward_w),
    }
    if beta_neg > 0:
        per_token = logp_w / len(pair.policy_chosen) - logp_l / len(pair.policy_rejected)
        # dl/dpi = (dl/dL) / pi, from the gradient in the log-probs rather than from the formula of the ratio.
        grad_w, grad_l = flex_dpo_gradient(pair, beta_pos, beta_neg, length_normalize)
        row["grad_ratio_log"] = math.log(abs((grad_l / math.exp(logp_l)) / (grad_w / math.exp(logp_w))))
        row["grad_ratio_log_per_token"] = math.log(beta_neg / beta_pos * math.exp(per_token))
    return row


@dataclass(frozen=True)
class TREGOutcome:
    """Of one pair: rewards, terms without alpha, and the gradient of the loss (with alpha) in every token."""

    reward_w: float
    reward_l: float
    fading: float
    preference: float
    regularizer: float
    weighted: float
    gradient_w: list[float]
    gradient_l: list[float]


def treg(
    pair: Pair,
    rewards: tuple[list[float], list[float]],
    beta: float,
    alpha: float,
    *,
    gamma: float | None = None,
    detach_weight: bool = True,
    static_weight: bool = False,
) -> TREGOutcome:
    """-log sigma(z) + alpha * w * (L_reg(y_w) + L_reg(y_l)) (arXiv 2412.02685); with ``gamma`` the simpo form.

    The gradient in a chosen token is -beta * (w_z + alpha * w * r_hat + alpha * w' * L_reg) with w' = w (1 - w) where
    the weight is not held constant; on the rejected side the first and last have the opposite sign.
    """
    beta_w = beta if gamma is None else beta / len(pair.policy_chosen)
    beta_l = beta if gamma is None else beta / len(pair.policy_rejected)
    if gamma is None:
        reward_w = beta_w * logratio(pair.policy_chosen, pair.ref_chosen)
        reward_l = beta_l * logratio(pair.policy_rejected, pair.ref_rejected)
    else:
        reward_w, reward_l = beta_w * math.fsum(pair.policy_chosen), beta_l * math.fsum(pair.policy_rejected)
    fading = sigma(reward_l - reward_w + (gamma or 0.0))
    weight = 1.0 if static_weight else fading
    slope = 0.0 if static_weight or detach_weight else weight * (1.0 - weight)
    regularizer = 0.0
    for scale, side, hats in ((beta_w, pair.policy_chosen, rewards[0]), (beta_l, pair.policy_rejected, rewards[1])):
        for token_logp, hat in zip(side, hats, strict=True):
            regularizer -= scale * hat * token_logp
    return TREGOutcome(
        reward_w=reward_w,
        reward_l=reward_l,
        fading=fading,
        preference=-math.log(1.0 - fading),
        regularizer=regularizer,
        weighted=weight * regularizer,
        gradient_w=[-beta_w * (fading + alpha * weight * r + alpha * slope * regularizer) for r in rewards[0]],
        gradient_l=[beta_l * (fading - alpha * weight * r + alpha * slope * regularizer) for r in rewards[1]],
    )


def head_logits(
    hidden: list[float], weight: list[list[float]], bias: list[float] | None, scale: float, softcap: float | None
) -> list[float]:
    """A head on one hidden state: product and bias, then the factor, then the bound, as models compute them."""
    found = []
    for v, row in enumerate(weight):
        z = math.fsum(w * h for w, h in zip(row, hidden, strict=True)) + (bias[v] if bias else 0.0)
        z *= scale
        found.append(z if softcap is None else softcap * math.tanh(z / softcap))
    return found


def forward_kl(teacher: list[float], student: list[float], temperature: float) -> float:
    """sum_v p_v log(p_v / q_v) with the probabilities themselves, p and q proportional to exp(logit / T)."""
    p, q = ([math.exp(z / temperature) for z in logits] for logits in (teacher, student))
    p, q = ([x / math.fsum(each) for x in each] for each in (p, q))
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def distill(rows: list[list[tuple[float, float]]], kd_alpha: float, kd_temperature: float) -> float:
    """(1 - a) CE + a T^2 KD over (log-prob of the label, KL) of the trained tokens of some rows (arXiv 1503.02531)."""
    tokens = [token for row in rows for token in row]
    cross_entropy = -math.fsum(logp for logp, _ in tokens) / len(tokens)
    divergence = math.fsum(kl for _, kl in tokens) / len(tokens)
    return (1 - kd_alpha) * cross_entropy + kd_alpha * kd_temperature * kd_temperature * divergence
