"""The equations of ADPO and D2O in plain Python, as ``tests/oracles.py`` has those on pairs.

A row is a list of candidates. One that is not ``present``, or has no tokens, is padding and is not there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tests.oracles import sigma


@dataclass(frozen=True)
class Candidate:
    """Token log-probs of one completion under policy and reference, its score, and its token rewards; nats."""

    policy: list[float]
    ref: list[float]
    score: float = 0.0
    rewards: tuple[float, ...] = ()
    present: bool = True

    @property
    def exists(self) -> bool:
        return self.present and len(self.policy) > 0

    @property
    def logratio(self) -> float:
        return math.fsum(self.policy) - math.fsum(self.ref)


Row = list[Candidate]
Choice = dict[int, float]
"""Members of a set of candidates, by index, with the target probability of each."""


# --- ADPO ------------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    """0 for nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def softmax(values: list[float]) -> list[float]:
    """Probabilities proportional to exp(value)."""
    largest = max(values)
    weights = [math.exp(v - largest) for v in values]
    return [w / math.fsum(weights) for w in weights]


def length(candidate: Candidate, reduction: str) -> int:
    """What a candidate's log-prob is divided by."""
    return len(candidate.policy) if reduction == "mean" else 1


def anchored(row: Row, tau: float, reduction: str, uniform: bool) -> list[float]:
    """u_i = (l_i - l_ref_i) / tau; l_ref_i = 0 under the uniform anchor."""
    gaps = [math.fsum(c.policy) if uniform else c.logratio for c in row]
    return [gap / length(c, reduction) / tau for c, gap in zip(row, gaps, strict=True)]


def normal_cdf(x: float) -> float:
    """Phi."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def silverman(scores: list[float]) -> float:
    """0.9 * min(std, IQR / 1.34) * P^(-1/5), linearly interpolated quartiles."""
    lower, _, upper = statistics.quantiles(scores, n=4, method="inclusive")
    return 0.9 * min(statistics.stdev(scores), (upper - lower) / 1.34) * len(scores) ** (-1 / 5)


def kde_logits(scores: list[float], bandwidth: float) -> list[float]:
    """logit of the smoothed distribution function, or of the empirical one with ties counted half if h = 0."""
    logits = []
    for a in scores:
        total = 0.0
        for b in scores:
            if bandwidth > 0:
                total += normal_cdf((a - b) / bandwidth)
            else:
                total += 0.5 if a == b else float(a > b)
        share = min(max(total / len(scores), 1e-3), 1.0 - 1e-3)
        logits.append(math.log(share / (1.0 - share)))
    return logits


def zscores(scores: list[float]) -> list[float]:
    """(R - mean) / (std + 1e-8), the std with P - 1, of rewards divided by their range."""
    span = max(scores) - min(scores)
    ranged = [r / span if span else 0.0 for r in scores]
    return [(r - statistics.mean(ranged)) / (statistics.stdev(ranged) + 1e-8) for r in ranged]


def adpo_choices(scores: list[float], target: str, beta_reward: float) -> list[Choice]:
    """The distributions that a target is made of."""
    everyone = range(len(scores))
    if len(scores) < 2:
        return []
    if target == "pairwise_hard":
        return [{i: 1.0, j: 0.0} for i in everyone for j in everyone if scores[i] > scores[j]]
    if target == "pairwise_soft":
        pairs = [(i, j) for i in everyone for j in everyone if i < j]
        wins = {(i, j): sigma((scores[i] - scores[j]) / beta_reward) for i, j in pairs}
        return [{i: wins[i, j], j: 1.0 - wins[i, j]} for i, j in pairs]
    if target == "plackett_luce":
        rivals = {k: [j for j in everyone if j != k and scores[j] <= scores[k]] for k in everyone}
        return [{k: 1.0, **dict.fromkeys(rivals[k], 0.0)} for k in everyone if rivals[k]]
    shaped: Callable[[], list[float]] = {
        "listwise_raw": lambda: scores,
        "listwise_zscore": lambda: zscores(scores),
        "kde": lambda: kde_logits(scores, silverman(scores)),
    }[target]
    return [dict(enumerate(softmax([r / beta_reward for r in shaped()])))]


@dataclass(frozen=True)
class ADPOOutcome:
    """Of one row: loss, its gradient in u and the entropy of the target."""

    loss: float
    gradient: list[float]
    entropy: float


def adpo(u: list[float], choices: list[Choice]) -> ADPOOutcome:
    """Mean over the choices of - sum q log p, p the softmax of u over the members; gradient p - q."""
    losses, entropies, gradient = [], [], [0.0] * len(u)
    for choice in choices:
        members = list(choice)
        p = dict(zip(members, softmax([u[i] for i in members]), strict=True))
        top = max(u[i] for i in members)
        normaliser = top + math.log(math.fsum(math.exp(u[i] - top) for i in members))
        losses.append(math.fsum(choice[i] * (normaliser - u[i]) for i in members))
        entropies.append(-math.fsum(q * math.log(q) for q in choice.values() if q > 0))
        for i in members:
            gradient[i] += (p[i] - choice[i]) / len(choices)
    return ADPOOutcome(mean(losses), gradient, mean(entropies))


def adaptive_taus(rows: list[Row], rule: tuple[float, float, float, float, float], vocabulary: int) -> list[float]:
    """clamp(base * (1 + a * H + b * (1 - H) * (1 - R)), least, most) by row; rule is (base, a, b, least, most)."""
    base, a, b, least, most = rule
    rewards = [mean([c.score for c in row]) for row in rows]
    trained = [reward for reward, row in zip(rewards, rows, strict=True) if len(row) > 1]
    taus = []
    for row, reward in zip(rows, rewards, strict=True):
        tokens = [t for c in row for t in c.policy]
        surprise = min(-mean(tokens) / math.log(vocabulary), 1.0)
        spread = max(trained) - min(trained)
        scaled = (reward - min(trained)) / spread if spread > 0 else 0.5
        taus.append(min(max(base * (1 + a * surprise + b * (1 - surprise) * (1 - scaled)), least), most))
    return taus


def k3(row: Row) -> float:
    """Sum over tokens of exp(d) - d - 1, d = log pi_ref - log pi, cut at 20."""
    gaps = [min(r - p, 20.0) for c in row for p, r in zip(c.policy, c.ref, strict=True)]
    return math.fsum(math.exp(d) - d - 1.0 for d in gaps)


def k3_slope(policy: float, ref: float) -> float:
    """Its derivative in log pi: 1 - exp(d); 0 beyond the cut."""
    return 1.0 - math.exp(ref - policy) if ref - policy < 20.0 else 0.0


# --- D2O -------------------------------------------------------------------------------------------------------------


def d2o_roles(row: Row) -> tuple[Row, Candidate | None]:
    """The samples and the negative, which is the last present candidate; None if there is nothing to learn."""
    present = [c for c in row if c.present]
    samples = [c for c in present[:-1] if c.policy]
    if not samples or not present[-1].policy:
        return [], None
    return samples, present[-1]


def d2o_rewards(row: Row, alpha: float, beta: float) -> tuple[float, float]:
    """(beta/K) sum_i d_i and alpha n."""
    samples, negative = d2o_roles(row)
    total = 0.0
    for sample in samples:
        total += beta / len(samples) * sample.logratio
    return total, alpha * negative.logratio


def d2o(row: Row, alpha: float, beta: float) -> float:
    """log(1 + e^-z), z the difference of the two."""
    pull, push = d2o_rewards(row, alpha, beta)
    return math.log(1.0 + math.exp(push - pull))
