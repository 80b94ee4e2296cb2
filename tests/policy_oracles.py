"""The equations of the online losses in plain Python, as ``tests/oracles.py`` has those on pairs.

A completion is a list of tokens; one without tokens is a completion all the same, which trains nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.oracles import sigma


@dataclass(frozen=True)
class Token:
    """What is known of one token: log-probs under three models, and what it was worth."""

    policy: float
    old: float
    ref: float = 0.0
    advantage: float = 0.0
    entropy: float = 0.0
    kept: bool = True
    correction: float = 1.0
    old_entropy: float = 0.0
    sum_sq_probs: float = 0.0
    policy_kl: float = 0.0

    @property
    def log_ratio(self) -> float:
        return self.policy - self.old


Completion = list[Token]


@dataclass(frozen=True)
class Settings:
    """Options of a loss, under the names of its equation."""

    aggregation: str = "dapo"
    level: str = "token"
    low: float = 0.2
    high: float = 0.2
    delta: float = math.inf
    temperatures: tuple[float, float] = (1.0, 1.05)
    longest: int = 10
    beta: float = 0.0
    corrects_kl: bool = True
    entropy_coef: float = 0.0


def ratios(completion: Completion, level: str) -> list[float]:
    """r of every token: its own, or the geometric mean of all."""
    if level == "token":
        return [math.exp(token.policy) / math.exp(token.old) for token in completion]
    mean = math.fsum(t.log_ratio for t in completion) / max(len(completion), 1)
    return [math.exp(mean)] * len(completion)


def is_clipped(r: float, advantage: float, low: float, high: float) -> tuple[bool, bool]:
    """From below, from above."""
    return r < 1 - low and advantage < 0, r > 1 + high and advantage > 0


def clipped(r: float, advantage: float, s: Settings) -> tuple[float, float]:
    """PPO's surrogate by the sign of the advantage, and its slope in r."""
    if advantage > 0:
        return -advantage * min(r, 1 + s.high), -advantage if r < 1 + s.high else 0.0
    value = max(1 - s.low, min(r, s.delta))
    return -advantage * value, -advantage if 1 - s.low < r < s.delta else 0.0


def surrogate(token: Token, r: float, s: Settings) -> tuple[float, float, float]:
    """A token's surrogate, its slope in log r and its slope in the token's own log-prob besides."""
    a = token.advantage
    if s.aggregation == "cispo":
        weight = -min(r, s.high) * a
        return weight * token.policy, 0.0, weight
    if s.aggregation == "sapo":
        tau = s.temperatures[0] if a > 0 else s.temperatures[1]
        gate = sigma(tau * (r - 1))
        return -a * 4 / tau * gate, -a * 4 * gate * (1 - gate) * r, 0.0
    value, slope = clipped(r, a, s)
    return value, slope * r, 0.0


def token_weights(completions: list[Completion], s: Settings) -> list[float]:
    """What a token of each completion counts in the loss of this batch."""
    b, n = len(completions), max(sum(map(len, completions)), 1)
    by_name = {
        "grpo": lambda c: 1 / (b * max(len(c), 1)),
        "dr_grpo": lambda c: 1 / (b * s.longest),
        "luspo": lambda c: 1 / b,
        "dapo": lambda c: 1 / n,
    }
    name = {"sapo": "grpo", "cispo": "dapo", "bnpo": "dapo"}.get(s.aggregation, s.aggregation)
    return [by_name[name](completion) for completion in completions]


def by_tokens(completion: Completion, slopes: list[float], level: str) -> list[float]:
    """Slopes in log r, as slopes in the log-probs of the tokens."""
    return slopes if level == "token" else [math.fsum(slopes) / len(completion) for _ in completion]


def divergences(completion: Completion, s: Settings) -> tuple[list[float], list[float]]:
    """The estimate of KL(pi || pi_ref) at every token, and the slopes of their sum in the log-probs."""
    values, own, in_ratio = [], [], []
    for token, r in zip(completion, ratios(completion, s.level), strict=True):
        weight, odds = r if s.corrects_kl else 1.0, math.exp(token.ref) / math.exp(token.policy)
        k = odds - (token.ref - token.policy) - 1
        values.append(k * weight)
        own.append((1 - odds) * weight)
        in_ratio.append(k * weight if s.corrects_kl else 0.0)
    passed = by_tokens(completion, in_ratio, s.level)
    return values, [a + b for a, b in zip(own, passed, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """What a loss is: its parts by completion, the loss of the batch, and its slopes in the log-probs."""

    policy_sums: list[float]
    kl_sums: list[float]
    loss: float
    gradient: list[list[float]]


def total(completions: list[Completion], policy: list[list[float]], slopes: list[list[float]], s: Settings) -> Outcome:
    """The outcome of surrogates, per token, and their slopes in the tokens' log-probs."""
    weights = token_weights(completions, s)
    kl = [divergences(completion, s) for completion in completions]
    loss = math.fsum(w * (math.fsum(p) + s.beta * math.fsum(k[0])) for w, p, k in zip(weights, policy, kl, strict=True))
    acting = [token.entropy for completion in completions for token in completion if token.kept]
    loss -= s.entropy_coef * math.fsum(acting) / max(len(acting), 1)
    gradient = [
        [w * (a + s.beta * b) for a, b in zip(own, k[1], strict=True)]
        for w, own, k in zip(weights, slopes, kl, strict=True)
    ]
    return Outcome([math.fsum(p) for p in policy], [math.fsum(k[0]) for k in kl], loss, gradient)


def grpo(completions: list[Completion], s: Settings) -> Outcome:
    """The loss of one batch."""
    policy, slopes = [], []
    for completion in completions:
        of = [surrogate(t, r, s) for t, r in zip(completion, ratios(completion, s.level), strict=True)]
        weights = [token.kept * token.correction for token in completion]
        policy.append([w * value for w, (value, _, _) in zip(weights, of, strict=True)])
        passed = by_tokens(completion, [w * slope for w, (_, slope, _) in zip(weights, of, strict=True)], s.level)
        own = [w * direct for w, (_, _, direct) in zip(weights, of, strict=True)]
        slopes.append([a + b for a, b in zip(passed, own, strict=True)])
    return total(completions, policy, slopes, s)


def metrics(completions: list[Completion], s: Settings, by_row: bool) -> dict[str, float]:
    """Means over tokens, or over completions with any where a value is one of a completion.

    Args:
        completions: With one advantage each where ``by_row``, which may differ by token otherwise.
        s: Settings.
        by_row: As above.
    """
    tokens = [[(r, t) for r, t in zip(ratios(c, s.level), c, strict=True)] for c in completions if c]
    firsts, every = [row[0] for row in tokens], [pair for row in tokens for pair in row]
    seen = firsts if s.level == "sequence" else every
    clippable = firsts if s.level == "sequence" and by_row else every

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    found = {"ratio/mean": mean([r for r, _ in seen]), "ratio/mean_square": mean([r * r for r, _ in seen])}
    found["entropy"] = mean([t.entropy for _, t in every])
    if s.beta:
        found["kl"] = mean([k for c in completions for k in divergences(c, s)[0]])
    if s.aggregation == "cispo":
        found["cispo_clip_ratio"] = mean([r > s.high and t.advantage > 0 for r, t in clippable])
    elif s.aggregation != "sapo":
        sides = [is_clipped(r, t.advantage, s.low, s.high) for r, t in clippable]
        found["clip_ratio/low_mean"] = mean([low for low, _ in sides])
        found["clip_ratio/high_mean"] = mean([high for _, high in sides])
        found["clip_ratio/region_mean"] = mean([low or high for low, high in sides])
    return found
