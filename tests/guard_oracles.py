"""GRPO-Guard-style clipping in plain Python, as ``tests/policy_oracles.py`` has GRPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.policy_oracles import Completion, Outcome, Settings, by_tokens, total


@dataclass(frozen=True)
class Rules:
    """Options of the guard, under their own names."""

    step_axis: str = "position_quantile"
    num_steps: int = 3
    scale: str = "pooled"
    center: str = "logmeanexp"
    mode: str = "gate"
    reweight: str = "none"
    min_count: int = 2
    kappa_min: float = 0.25
    kappa_max: float = 4.0
    fixed_std: float = 0.1
    alpha: float = 1.0
    wmax: float = 4.0
    ema: float = 0.0


@dataclass
class Row:
    """A token, or a completion at level sequence, and what is found out about it."""

    log_ratio: float
    axis: float
    counts: bool
    length: int
    sum_sq_probs: float
    kl: float
    pull: float
    step: int = -1
    kappa: float = 1.0
    offset: float = 0.0
    weight: float = 1.0
    guarded: bool = False

    @property
    def normalized(self) -> float:
        return math.exp(self.kappa * self.log_ratio + self.offset)


@dataclass
class Past:
    """Earlier rows as (step, weight, log-ratio), and what was summed for the centre of each step."""

    rows: list[tuple[int, float, float]] = field(default_factory=list)
    sums: dict[int, float] = field(default_factory=dict)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def squared_gradient(old: float, sum_sq: float | None) -> float:
    """q: of log pi(y) in the logits, by the vector 1[k = y] - p_k; or the square of its own entry."""
    p = math.exp(old)
    return (1 - p) ** 2 if sum_sq is None else (1 - p) ** 2 + max(sum_sq - p * p, 0.0)


def rows_of(completions: list[Completion], level: str, rules: Rules, exact: bool, off_policy: bool) -> list[list[Row]]:
    """Rows by completion."""

    def axis(c: Completion, t: int) -> float:
        return {
            "position": t,
            "position_quantile": t,
            "entropy": c[t].old_entropy if off_policy else c[t].entropy,
            "length": len(c),
        }[rules.step_axis]

    found = []
    for c in completions:
        pulls = [t.advantage**2 * squared_gradient(t.old, t.sum_sq_probs if exact else None) for t in c]
        counts, n = [t.kept and t.correction != 0 for t in c], len(c)
        if level == "token":
            found.append(
                [
                    Row(t.log_ratio, axis(c, i), counts[i], n, t.sum_sq_probs, t.policy_kl, pulls[i])
                    for i, t in enumerate(c)
                ]
            )
        elif not c:
            found.append([])
        else:
            x, kl = mean([t.log_ratio for t in c]), mean([t.policy_kl for t in c])
            found.append([Row(x, n, any(counts), n, 0.0, kl, math.fsum(pulls) / n**2)])
    return found


def assign_steps(rows: list[Row], rules: Rules, longest: int, seen: list[Row]) -> None:
    """Equal parts of the positions, or equal numbers of the rows seen."""
    ordered = sorted(row.axis for row in seen)
    for row in rows:
        if rules.step_axis == "position":
            row.step = int(row.axis) * rules.num_steps // longest
        else:
            bounds = [ordered[k * len(ordered) // rules.num_steps] for k in range(1, rules.num_steps)] if seen else []
            row.step = sum(bound <= row.axis for bound in bounds)


def kappas(
    rules: Rules, variances: dict[int, float], counts: dict[int, float], seen: list[Row]
) -> Callable[[Row], float]:
    """kappa of a row in a measured step."""
    e = 1e-8
    if rules.scale == "none":
        return lambda row: 1.0
    if rules.scale == "fisher":
        inverse = mean([1 / math.sqrt(1 - row.sum_sq_probs + 1e-4) for row in seen]) if seen else 1.0
        raw = lambda row: 1 / math.sqrt(1 - row.sum_sq_probs + 1e-4) / inverse  # noqa: E731
    elif rules.scale == "sqrt_length":
        average = mean([row.length for row in seen]) if seen else 1.0
        raw = lambda row: math.sqrt(row.length / average)  # noqa: E731
    elif rules.scale == "fixed":
        raw = lambda row: rules.fixed_std / math.sqrt(variances[row.step] + e)  # noqa: E731
    else:
        pooled = math.fsum(counts[b] * variances[b] for b in counts) / math.fsum(counts.values())
        raw = lambda row: math.sqrt((pooled + e) / (variances[row.step] + e))  # noqa: E731
    return lambda row: min(max(raw(row), rules.kappa_min), rules.kappa_max)


def normalize(rows: list[Row], seen: list[Row], rules: Rules, past: Past) -> Past:
    """Sets kappa, offset and what is guarded of all rows, from the rows seen; the past of the next batch."""
    weighted = [(row.step, 1.0, row.log_ratio) for row in seen]
    weighted += [(step, rules.ema * w, x) for step, w, x in past.rows if rules.ema]
    by_step = {b: [(w, x) for step, w, x in weighted if step == b] for b in range(rules.num_steps)}
    counts = {b: math.fsum(w for w, _ in of) for b, of in by_step.items()}
    counts = {b: n for b, n in counts.items() if n >= rules.min_count}
    means = {b: math.fsum(w * x for w, x in by_step[b]) / counts[b] for b in counts}
    spread = {b: math.fsum(w * (x - means[b]) ** 2 for w, x in by_step[b]) / counts[b] for b in counts}
    kappa = kappas(rules, spread, counts, [row for row in seen if row.step in counts]) if counts else None
    for row in rows:
        row.guarded = row.step in counts
        row.kappa = kappa(row) if row.guarded else 1.0
    sums: dict[int, float] = {}
    for b in range(rules.num_steps):
        here = [row for row in seen if row.step == b]
        if rules.center == "k3":
            values = [math.exp(row.log_ratio) - 1 - row.log_ratio for row in here]
        else:
            values = [math.exp(row.kappa * (row.log_ratio - means[b])) if b in means else 1.0 for row in here]
            if b not in means:
                values = [math.exp(row.log_ratio) for row in here]
        sums[b] = math.fsum(values) + rules.ema * past.sums.get(b, 0.0)
    for row in rows:
        if not row.guarded:
            continue
        b = row.step
        row.offset = {
            "none": 0.0,
            "logmean": -row.kappa * means[b],
            "logmeanexp": -row.kappa * means[b] - math.log(sums[b] / counts[b]),
            "exact_kl": row.kappa * row.kl,
            "k3": row.kappa * sums[b] / counts[b],
        }[rules.center]
    return Past(weighted, sums)


def reweight(rows: list[Row], seen: list[Row], rules: Rules) -> None:
    """Sets the weights of all rows, whose mean over the measured rows seen is 1."""
    measured = [row for row in seen if row.guarded]
    if rules.reweight == "none" or not measured:
        return
    raw: Callable[[Row], float]
    if rules.reweight == "inverse_kappa":
        raw = lambda row: 1 / row.kappa  # noqa: E731
    else:

        def squared(row: Row) -> float:
            factor = math.exp(row.log_ratio) if rules.mode == "gate" else row.normalized * row.kappa
            return row.pull * factor**2

        steps = {row.step: [squared(r) for r in measured if r.step == row.step] for row in measured}
        pooled = math.sqrt(mean([squared(row) for row in measured]))
        table = {
            b: min(max(((pooled + 1e-8) / (math.sqrt(mean(of)) + 1e-8)) ** rules.alpha, 1 / rules.wmax), rules.wmax)
            for b, of in steps.items()
        }
        raw = lambda row: table.get(row.step, 1.0)  # noqa: E731
    average = mean([raw(row) for row in measured])
    for row in rows:
        row.weight = raw(row) / average if row.guarded else 1.0


def surrogate(row: Row, advantage: float, s: Settings, rules: Rules) -> tuple[float, float]:
    """A row's surrogate and its slope in the log-ratio."""
    r, r_hat = math.exp(row.log_ratio), row.normalized
    too_high, too_low = advantage > 0 and r_hat > 1 + s.high, advantage < 0 and r_hat < 1 - s.low
    if too_high or too_low:
        return -advantage * (1 + s.high if too_high else 1 - s.low) * row.weight, 0.0
    weight, slope = (r, r) if rules.mode == "gate" else (r_hat, r_hat * row.kappa)
    if weight > s.delta:
        return -advantage * s.delta * row.weight, 0.0
    return -advantage * weight * row.weight, -advantage * slope * row.weight


@dataclass(frozen=True)
class Guarded:
    """The outcome, its rows by completion, and what the next batch remembers."""

    outcome: Outcome
    rows: list[list[Row]]
    past: Past


def grpo_guard(
    completions: list[Completion],
    s: Settings,
    rules: Rules,
    *,
    past: Past | None = None,
    exact: bool = True,
    off_policy: bool = True,
) -> Guarded:
    """The loss of one batch.

    Args:
        completions: The batch.
        s: Settings of GRPO.
        rules: Settings of the guard.
        past: Earlier batches.
        exact: Whether the old policy's squared probabilities are known.
        off_policy: Whether the old policy was another one, with entropies of its own.
    """
    by_completion = rows_of(completions, s.level, rules, exact, off_policy)
    rows = [row for of in by_completion for row in of]
    seen = [row for row in rows if row.counts]
    assign_steps(rows, rules, s.longest, seen)
    following = normalize(rows, seen, rules, past or Past())
    reweight(rows, seen, rules)
    policy, slopes = [], []
    for completion, of in zip(completions, by_completion, strict=True):
        spread = of if s.level == "token" else of * len(completion)
        pairs = [surrogate(row, t.advantage, s, rules) for row, t in zip(spread, completion, strict=True)]
        scale = [t.kept * t.correction for t in completion]
        policy.append([w * value for w, (value, _) in zip(scale, pairs, strict=True)])
        slopes.append(by_tokens(completion, [w * slope for w, (_, slope) in zip(scale, pairs, strict=True)], s.level))
    return Guarded(total(completions, policy, slopes, s), by_completion, following)
