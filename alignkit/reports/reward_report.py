"""What rewards say of sample completions: how far they spread, where they are silent, and which of them agree.

Policy optimisation in groups learns from differences between the completions of one prompt and from nothing else. So
silence is counted by prompt, and agreement is Kendall's tau-b over pairs of completions of the same prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.reports.table import render_table

SAME = 1e-8
"""Rewards closer than this are equal."""
MOST_OF_A_GROUP, MOST_PAIRS = 64, 200_000
"""Completions of one prompt, and pairs of completions in all, that agreement is computed from."""
ALIKE, AGAINST, WITH_LENGTH, SILENT = 0.95, -0.5, 0.8, 0.5
"""Where advice begins: agreement of two rewards, that with the length, and share of prompts without a difference."""
SUM = "weighted sum"


@dataclass(frozen=True)
class Scored:
    """What one reward has given.

    Attributes:
        name: What it is called.
        weight: Its weight in the sum.
        values: One a completion, None where it did not judge.
        seconds: Of each call, a call a prompt.
    """

    name: str
    weight: float
    values: Sequence[float | None]
    seconds: Sequence[float] = ()


@dataclass(frozen=True)
class Spread:
    """How far the values of a reward are apart.

    Attributes:
        judged: Completions that have a value.
        mean, std: Over these; ``std`` with n - 1, 0 for one value.
        quantiles: Least, first quartile, median, third quartile and greatest.
        silent: Share of the prompts with at least two values on which all are equal; None without such a prompt.
        with_length: Agreement with the length of the completion, as between two rewards.
    """

    judged: int
    mean: float
    std: float
    quantiles: tuple[float, float, float, float, float]
    silent: float | None
    with_length: float | None


@dataclass(frozen=True)
class RewardReport:
    """Everything that is shown.

    Attributes:
        completions, prompts: How many there were.
        weights: Of the rewards, by name.
        spreads: Of the rewards, and of their sum under ``SUM``; None where a reward judged nothing.
        agreement: Kendall's tau-b of two rewards; None where one of them never differs.
        seconds: All calls of a reward together.
        slowest: Reward, prompt and seconds of the slowest calls.
        advice: Sentences on what will not work.
    """

    completions: int
    prompts: int
    weights: dict[str, float]
    spreads: dict[str, Spread | None]
    agreement: dict[tuple[str, str], float | None]
    seconds: dict[str, float]
    slowest: list[tuple[str, str, float]]
    advice: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same as JSON holds it."""

        def entry(name: str, found: Spread | None) -> dict[str, Any]:
            if found is None:
                return {"judged": 0}
            names = ("min", "q25", "median", "q75", "max")
            return {
                "judged": found.judged,
                "mean": found.mean,
                "std": found.std,
                **dict(zip(names, found.quantiles, strict=True)),
                "share_of_silent_prompts": found.silent,
                "agreement_with_length": found.with_length,
            }

        return {
            "completions": self.completions,
            "prompts": self.prompts,
            "rewards": {
                name: {"weight": weight, "seconds": self.seconds[name], **entry(name, self.spreads[name])}
                for name, weight in self.weights.items()
            },
            "weighted_sum": entry(SUM, self.spreads[SUM]),
            "agreement": [{"first": a, "second": b, "kendall_tau": tau} for (a, b), tau in self.agreement.items()],
            "slowest": [{"reward": name, "prompt": prompt, "seconds": time} for name, prompt, time in self.slowest],
            "advice": self.advice,
        }

    def __str__(self) -> str:
        rows = [_row(name, self.weights.get(name), found) for name, found in self.spreads.items()]
        header = ["reward", "weight", "mean", "std", "min", "25%", "median", "75%", "max", "silent", "with length"]
        lines = [
            f"{self.completions} completions of {self.prompts} prompts",
            "",
            render_table(header, rows),
            "",
            "silent: prompts whose completions all have the same reward, which teach nothing",
            "with length: agreement with the length of the completion, from -1 to 1",
        ]
        if self.agreement:
            pairs = [[f"{a} and {b}", _number(tau)] for (a, b), tau in self.agreement.items()]
            lines += ["", render_table(["within a prompt", "agreement"], pairs)]
        called = [
            [name, f"{1000 * seconds / self.completions:.3f}", f"{seconds:.2f}"]
            for name, seconds in self.seconds.items()
        ]
        lines += ["", render_table(["time", "ms a completion", "s in all"], called)]
        lines += [
            f"slowest call: {name}, {1000 * time:.1f} ms, prompt {prompt!r}" for name, prompt, time in self.slowest
        ]
        return "\n".join([*lines, *(["", *(f"- {sentence}" for sentence in self.advice)] if self.advice else [])])


def report_rewards(
    rewards: Sequence[Scored], groups: Sequence[Sequence[int]], lengths: Sequence[int], prompts: Sequence[str]
) -> RewardReport:
    """Compare rewards of the same completions.

    Args:
        rewards: What each has given.
        groups: Numbers of the completions of each prompt.
        lengths: Length of each completion.
        prompts: The prompts, as they are shown.
    """
    pairs = list(_pairs(groups))
    total = Scored(SUM, 1.0, weighted_sum(rewards))
    signs = {one.name: _signs(one.values, pairs) for one in (*rewards, total)}
    of_length = _signs(lengths, pairs)
    spreads = {one.name: _spread(one.values, groups, _tau(signs[one.name], of_length)) for one in (*rewards, total)}
    names = [one.name for one in rewards]
    agreement = {(a, b): _tau(signs[a], signs[b]) for i, a in enumerate(names) for b in names[i + 1 :]}
    calls = [(one.name, prompts[i], time) for one in rewards for i, time in enumerate(one.seconds)]
    report = RewardReport(
        completions=len(lengths),
        prompts=len(groups),
        weights={one.name: one.weight for one in rewards},
        spreads=spreads,
        agreement=agreement,
        seconds={one.name: sum(one.seconds) for one in rewards},
        slowest=sorted(calls, key=lambda call: -call[2])[:3],
    )
    report.advice.extend(_advice(report))
    return report


def weighted_sum(rewards: Sequence[Scored]) -> list[float | None]:
    """The sum of weight times reward of each completion, over the rewards that judged it; None where none did."""
    sums: list[float | None] = []
    for row in zip(*(one.values for one in rewards), strict=True):
        judged = [(one.weight, value) for one, value in zip(rewards, row, strict=True) if value is not None]
        sums.append(math.fsum(weight * value for weight, value in judged) if judged else None)
    return sums


def _advice(report: RewardReport) -> Iterator[str]:
    """What will not work, and what to do about it."""
    for name, found in report.spreads.items():
        if found is None:
            yield f"{name} judged no completion: the column with its reference is empty on these rows."
        elif found.quantiles[4] - found.quantiles[0] < SAME and name != SUM:
            yield (
                f"{name} gives {found.mean:g} to every completion and teaches nothing here: look at a completion, "
                "and at the options of the reward."
            )
        elif name != SUM and found.with_length is not None and abs(found.with_length) >= WITH_LENGTH:
            longer = "longer" if found.with_length > 0 else "shorter"
            agreement = f"its agreement with the length is {found.with_length:+.2f}"
            yield f"{name} mostly says which completion is {longer}: {agreement}."
        if name in report.weights and found is not None and found.judged < report.completions:
            yield f"{name} judged {found.judged} of {report.completions} completions."
    for (first, second), tau in report.agreement.items():
        if tau is not None and tau >= ALIKE:
            yield (
                f"{first} and {second} order the completions alike (agreement {tau:.2f}): together they are one reward "
                f"of weight {report.weights[first] + report.weights[second]:g}; leave one out."
            )
        elif tau is not None and tau <= AGAINST:
            yield f"{first} and {second} pull against each other (agreement {tau:.2f}): their weights decide who wins."
    total = report.spreads[SUM]
    if total is not None and total.silent is None:
        yield "every prompt has one completion, and rewards are compared within a prompt: sample several of each."
    elif total is not None and total.silent is not None and total.silent >= SILENT:
        yield (
            f"on {total.silent:.0%} of the prompts all completions have the same sum, and nothing is learnt from them: "
            "take prompts that the model solves sometimes, more completions a prompt, or a finer reward."
        )


def _spread(
    values: Sequence[float | None], groups: Sequence[Sequence[int]], with_length: float | None
) -> Spread | None:
    judged = sorted(value for value in values if value is not None)
    if not judged:
        return None
    mean = math.fsum(judged) / len(judged)
    square = math.fsum((value - mean) ** 2 for value in judged) / max(1, len(judged) - 1)
    found = [[value for i in group if (value := values[i]) is not None] for group in groups]
    several = [group for group in found if len(group) > 1]
    silent = sum(max(group) - min(group) < SAME for group in several) / len(several) if several else None
    least, low, median, high, most = (_quantile(judged, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    return Spread(len(judged), mean, math.sqrt(square), (least, low, median, high, most), silent, with_length)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """By a straight line between the two nearest."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _pairs(groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Pairs of completions of the same prompt."""
    count = 0
    for group in groups:
        kept = group[:MOST_OF_A_GROUP]
        for i, first in enumerate(kept):
            for second in kept[i + 1 :]:
                if count == MOST_PAIRS:
                    return
                count += 1
                yield first, second


def _signs(values: Sequence[float | None], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Of each pair which is the better one: 1 the first, -1 the second, 0 neither, or one of them was not judged."""
    signs = []
    for i, j in pairs:
        first, second = values[i], values[j]
        difference = 0.0 if first is None or second is None else first - second
        signs.append(0 if abs(difference) < SAME else 1 if difference > 0 else -1)
    return signs


def _tau(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Kendall's tau-b of two rewards by their signs; None where one of them is 0 throughout."""
    differs = sum(map(abs, first)) * sum(map(abs, second))
    return sum(a * b for a, b in zip(first, second, strict=True)) / math.sqrt(differs) if differs else None


def _row(name: str, weight: float | None, found: Spread | None) -> list[str]:
    shown = "" if weight is None else f"{weight:g}"
    if found is None:
        return [name, shown, *["-"] * 9]
    figures = [_number(value) for value in (found.mean, found.std, *found.quantiles)]
    silent = "-" if found.silent is None else f"{found.silent:.0%}"
    return [name, shown, *figures, silent, _number(found.with_length)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
