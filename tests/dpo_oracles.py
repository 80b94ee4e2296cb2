"""The DPO family in plain Python: scores of two responses, what modifies them, and each loss with its derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.oracles import Pair, sigma

CUT = 40.0
"""No exponent is larger: see ``LARGEST_EXPONENT``."""


@dataclass(frozen=True)
class Modifiers:
    """The options that modify any loss of the family."""

    ld_alpha: float | None = None
    use_weighting: bool = False
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5


@dataclass(frozen=True)
class Scored:
    """A pair as a loss sees it: scores, and what they are made of.

    ``chosen`` and ``rejected`` are scores; ``chosen_slopes`` the derivative of the score in each token's log-prob.
    ``policy_margin`` and ``ref_margin`` are differences of log-probs, which AOT compares.
    """

    chosen: float
    rejected: float
    chosen_slopes: list[float]
    rejected_slopes: list[float]
    policy_margin: float
    ref_margin: float
    weight: float


@dataclass(frozen=True)
class Outcome:
    """Loss of a pair, and its derivatives in the two scores."""

    loss: float
    chosen: float
    rejected: float


def token_weights(own: int, other: int, ld_alpha: float | None) -> list[float]:
    """1 for tokens that both responses have, alpha for those beyond the shorter (arXiv 2409.06411)."""
    alpha = 1.0 if ld_alpha is None else ld_alpha
    return [1.0 if t < min(own, other) else alpha for t in range(own)]


def score(rho: float, kind: str, alpha: float) -> tuple[float, float]:
    """(f'(t), d f'(t) / d log t) at the ratio t = e^rho (arXiv 2309.16240, Table 1, up to constants)."""
    if kind == "forward_kl":
        return (1.0 - 1.0 / math.exp(rho), 1.0 / math.exp(rho)) if -rho <= CUT else (1.0 - math.exp(CUT), 0.0)
    if kind == "js_divergence":
        t = math.exp(rho)
        return math.log(2.0 * t / (1.0 + t)), 1.0 / (1.0 + t)
    if kind == "alpha_divergence" and alpha != 1.0:
        power = (alpha - 1.0) * rho
        if power > CUT:
            return (math.exp(CUT) - 1.0) / (alpha - 1.0), 0.0
        return (math.exp(rho) ** (alpha - 1.0) - 1.0) / (alpha - 1.0), math.exp(rho) ** (alpha - 1.0)
    return rho, 1.0


def wpo_weight(policy: Sequence[float], log_sums: Sequence[float]) -> float:
    """exp of the mean over tokens of log( pi(y_t) / sum_v pi(v)^2 ) (arXiv 2406.11827, Eq. 2)."""
    return math.prod(math.exp(p) / math.exp(q) for p, q in zip(policy, log_sums, strict=True)) ** (1.0 / len(policy))


def scored(
    pair: Pair, log_sums: tuple[list[float], list[float]], modifiers: Modifiers, *, per_token: bool = False
) -> Scored:
    """Scores of a complete pair."""
    sides = ((pair.policy_chosen, pair.ref_chosen), (pair.policy_rejected, pair.ref_rejected))
    lengths = [len(policy) for policy, _ in sides]
    scores, slopes, sums = [], [], []
    for (policy, ref), other in zip(sides, reversed(lengths), strict=True):
        weights = token_weights(len(policy), other, modifiers.ld_alpha)
        log_pi, log_ref = (math.fsum(w * logp for w, logp in zip(weights, side, strict=True)) for side in (policy, ref))
        value, slope = score(log_pi - log_ref, modifiers.f_divergence_type, modifiers.f_alpha_divergence_coef)
        divisor = len(policy) if per_token else 1
        scores.append(value / divisor)
        slopes.append([slope * w / divisor for w in weights])
        sums.append((log_pi, log_ref))
    weight = 1.0
    if modifiers.use_weighting:
        weight = wpo_weight(pair.policy_chosen, log_sums[0]) * wpo_weight(pair.policy_rejected, log_sums[1])
    return Scored(
        *scores,
        *slopes,
        policy_margin=sums[0][0] - sums[1][0],
        ref_margin=sums[0][1] - sums[1][1],
        weight=weight,
    )


def logistic(z: float, epsilon: float = 0.0) -> tuple[float, float]:
    """Cross-entropy of sigma(z) and its derivative, the label being right with probability 1 - epsilon."""
    loss = (1.0 - epsilon) * math.log(1.0 + math.exp(-z)) + epsilon * math.log(1.0 + math.exp(z))
    return loss, sigma(z) - (1.0 - epsilon)


def of_margin(function: Callable[..., tuple[float, float]]) -> Callable[..., list[Outcome]]:
    """A loss of z = beta (s_w - s_l): ``function`` gives it and its derivative."""

    def outcomes(pairs: Sequence[Scored], beta: float, **options: float) -> list[Outcome]:
        found = [function(beta * (p.chosen - p.rejected), **options) for p in pairs]
        return [Outcome(loss, beta * slope, -beta * slope) for loss, slope in found]

    return outcomes


def of_rewards(function: Callable[[float, float], tuple[float, float, float]]) -> Callable[..., list[Outcome]]:
    """A loss of r_w = beta s_w and r_l = beta s_l: ``function`` gives it and both derivatives."""

    def outcomes(pairs: Sequence[Scored], beta: float) -> list[Outcome]:
        found = [function(beta * p.chosen, beta * p.rejected) for p in pairs]
        return [Outcome(loss, beta * slope_w, beta * slope_l) for loss, slope_w, slope_l in found]

    return outcomes


def dpo(z: float, label_smoothing: float = 0.0) -> tuple[float, float]:
    return logistic(z, label_smoothing)


def hinge(z: float) -> tuple[float, float]:
    return (1.0 - z, -1.0) if z < 1.0 else (0.0, 0.0)


def exo_pair(z: float, label_smoothing: float) -> tuple[float, float]:
    """KL(q || p) of two outcomes; d/dz sum q log(q/p) = q (1 - q) (log(q/p) - log((1 - q)/(1 - p)))."""
    q, p = sigma(z), 1.0 - label_smoothing
    agreeing, opposing = math.log(q / p), math.log((1.0 - q) / (1.0 - p))
    return q * agreeing + (1.0 - q) * opposing, q * (1.0 - q) * (agreeing - opposing)


def robust(z: float, label_smoothing: float) -> tuple[float, float]:
    """An unbiased estimate: ((1 - e) l(z) - e l(-z)) / (1 - 2 e), l the loss of DPO."""
    (right, right_slope), (wrong, wrong_slope) = logistic(z), logistic(-z)
    scale, e = 1.0 - 2.0 * label_smoothing, label_smoothing
    return ((1.0 - e) * right - e * wrong) / scale, ((1.0 - e) * right_slope + e * wrong_slope) / scale


def discopop(z: float, discopop_tau: float) -> tuple[float, float]:
    """Logistic and exponential loss, mixed by m = sigma(z / tau)."""
    m, (smooth, smooth_slope) = sigma(z / discopop_tau), logistic(z)
    steep, steep_slope = (math.exp(-z), -math.exp(-z)) if -z <= CUT else (math.exp(CUT), 0.0)
    turning = m * (1.0 - m) / discopop_tau * (steep - smooth)
    return (1.0 - m) * smooth + m * steep, (1.0 - m) * smooth_slope + m * steep_slope + turning


def nca_pair(r_w: float, r_l: float) -> tuple[float, float, float]:
    loss = math.log(1.0 + math.exp(-r_w)) + 0.5 * math.log(1.0 + math.exp(r_w)) + 0.5 * math.log(1.0 + math.exp(r_l))
    return loss, -sigma(-r_w) + 0.5 * sigma(r_w), 0.5 * sigma(r_l)


def bco_pair(r_w: float, r_l: float) -> tuple[float, float, float]:
    """Cross-entropies of two labelled examples."""
    (chosen, slope_w), (rejected, slope_l) = logistic(r_w), logistic(-r_l)
    return chosen + rejected, slope_w, -slope_l


def apo_zero(r_w: float, r_l: float) -> tuple[float, float, float]:
    return 1.0 - sigma(r_w) + sigma(r_l), -sigma(r_w) * sigma(-r_w), sigma(r_l) * sigma(-r_l)


def apo_down(r_w: float, r_l: float) -> tuple[float, float, float]:
    bell = sigma(r_w - r_l) * sigma(r_l - r_w)
    return 1.0 + sigma(r_w) - sigma(r_w - r_l), sigma(r_w) * sigma(-r_w) - bell, bell


def ipo(pairs: Sequence[Scored], beta: float) -> list[Outcome]:
    """(h - 1 / (2 tau))^2 of scores a token."""
    gaps = [p.chosen - p.rejected - 1.0 / (2.0 * beta) for p in pairs]
    return [Outcome(gap * gap, 2.0 * gap, -2.0 * gap) for gap in gaps]


def sppo_hard(pairs: Sequence[Scored], beta: float) -> list[Outcome]:
    """Each log-ratio is drawn to eta (P - 1/2), eta = 1 / beta."""
    gaps = [(p.chosen - (1.0 - 0.5) / beta, p.rejected - (0.0 - 0.5) / beta) for p in pairs]
    return [Outcome(w * w + r * r, 2.0 * w, 2.0 * r) for w, r in gaps]


def ranks(values: Sequence[float]) -> list[int]:
    """How many of the others are smaller."""
    return [sum(other < value for other in values) for value in values]


def aot(pairs: Sequence[Scored], beta: float, label_smoothing: float = 0.0) -> list[Outcome]:
    """The policy's margin of each pair against the reference's margin of the same rank."""
    below = sorted(p.ref_margin for p in pairs)
    policy = [p.policy_margin for p in pairs]
    found = [logistic(beta * (u - below[rank]), label_smoothing) for u, rank in zip(policy, ranks(policy), strict=True)]
    return [Outcome(loss, beta * slope, -beta * slope) for loss, slope in found]


def aot_unpaired(pairs: Sequence[Scored], beta: float, label_smoothing: float = 0.0) -> list[Outcome]:
    """The log-ratio of each chosen response against that of the rejected one of the same rank."""
    chosen, rejected = ranks([p.chosen for p in pairs]), ranks([p.rejected for p in pairs])
    partner = [rejected.index(rank) for rank in chosen]
    found = [
        logistic(beta * (p.chosen - pairs[j].rejected), label_smoothing) for p, j in zip(pairs, partner, strict=True)
    ]
    of_rejected = {j: -beta * slope for (_, slope), j in zip(found, partner, strict=True)}
    return [Outcome(loss, beta * slope, of_rejected[i]) for i, (loss, slope) in enumerate(found)]


LOSSES: Mapping[str, Callable[..., list[Outcome]]] = {
    "dpo": of_margin(dpo),
    "sigmoid_norm": of_margin(dpo),
    "hinge": of_margin(hinge),
    "exo_pair": of_margin(exo_pair),
    "robust": of_margin(robust),
    "discopop": of_margin(discopop),
    "ipo": ipo,
    "sppo_hard": sppo_hard,
    "nca_pair": of_rewards(nca_pair),
    "bco_pair": of_rewards(bco_pair),
    "apo_zero": of_rewards(apo_zero),
    "apo_down": of_rewards(apo_down),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
}
PER_TOKEN = {"ipo", "sigmoid_norm"}
"""Losses of scores that are divided by the number of tokens."""


def metrics(
    pairs: Sequence[Pair], found: Sequence[Scored], outcomes: Sequence[Outcome], beta: float, *, per_token: bool
) -> dict[str, float]:
    """What a loss of the family may log of complete pairs; ``effective_weight`` is the slope in z = beta (s - s')."""
    rows = []
    for pair, own, outcome in zip(pairs, found, outcomes, strict=True):
        logp_w, logp_l = math.fsum(pair.policy_chosen), math.fsum(pair.policy_rejected)
        n_w, n_l = len(pair.policy_chosen), len(pair.policy_rejected)
        rows.append(
            {
                "rewards/chosen": beta * own.chosen,
                "rewards/rejected": beta * own.rejected,
                "rewards/margins": beta * (own.chosen - own.rejected),
                "rewards/accuracies": float(own.chosen > own.rejected),
                "logps/chosen": logp_w,
                "logps/rejected": logp_l,
                "logratio/chosen": logp_w - math.fsum(pair.ref_chosen),
                "logratio/rejected": logp_l - math.fsum(pair.ref_rejected),
                "effective_weight": abs(outcome.chosen) / beta,
                "grad_ratio_log": logp_w - logp_l + (math.log(n_w / n_l) if per_token else 0.0),
                "grad_ratio_log_per_token": logp_w / n_w - logp_l / n_l,
            }
        )
    means = {key: math.fsum(row[key] for row in rows) / len(rows) for key in rows[0]}
    for role, sides in {
        "chosen": [p.policy_chosen for p in pairs],
        "rejected": [p.policy_rejected for p in pairs],
    }.items():
        tokens = [token for side in sides for token in side]
        means[f"mean_logps/{role}"] = math.fsum(tokens) / len(tokens)
    return means
