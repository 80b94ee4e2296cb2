"""What can go wrong in a preference run, read off its logs: one function a trouble, each a pure function of the series.

A verdict needs an effect of a size that matters and, where it claims a direction, a trend that noise does not produce
(:mod:`alignkit.callbacks.trend`). The thresholds are ours; each says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from alignkit.callbacks.trend import MIN_POINTS, Trend, trend

WINDOW = 30
"""Logged points a trend is taken over, the latest."""
RECENT = 5
"""Logged points that must agree for a verdict about a level."""
FALL = 1.0
"""Nats a response: e times less likely."""
DISPERSION = 0.02
"""Nats a token of the fixed probe set, 2 nats on a response of 100 tokens."""
PINNED_STEPS = 50
"""Optimiser steps after which a policy that moves at all has left its reference, slow warm-up included."""
ZERO_REWARD = 1e-7
SOLVED_WEIGHT = 0.01
"""Share of the gradient that is left when a pair counts as solved: sigma(-z) with z = 4.6."""
DOMINATION = 3.0
"""Nats a token: the rejected gradient is e^3 = 20 times the chosen one."""
FAR = 0.5
"""Share of the loss: five times the most that a displacement should add to it."""
UNMOVED = 0.5
"""Share of the weights. In float32 it is next to 0 at any usual learning rate, in bfloat16 mostly above 0.9."""


@dataclass(frozen=True)
class Verdict:
    """One thing that is wrong.

    Attributes:
        name: Short name, unique in a run.
        step: Optimiser step of the log that settled it.
        title: What happens, in one line.
        evidence: The numbers.
        meaning: Why it matters.
        fixes: Lines of YAML to try, with a comment each.
    """

    name: str
    step: int
    title: str
    evidence: str
    meaning: str
    fixes: tuple[str, ...]

    def __str__(self) -> str:
        fixes = "\n             ".join(self.fixes)
        return (
            f"[health] step {self.step}: {self.title} ({self.name})\n"
            f"  evidence   {self.evidence}\n  meaning    {self.meaning}\n  to try     {fixes}"
        )


@dataclass
class LoggedSeries:
    """Every training metric logged so far.

    Attributes:
        settings: Config values the fixes start from, such as ``learning_rate`` and ``beta_neg``; may be empty.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    _points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    step: int = 0

    def add(self, step: int, logs: Mapping[str, float]) -> None:
        """Append the finite values of one training log."""
        self.step = step
        for key, value in logs.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._points.setdefault(key, []).append((step, value))

    def window(self, key: str) -> list[float]:
        """The latest values of a metric, at most ``WINDOW``."""
        return [value for _, value in self._points.get(key, [])[-WINDOW:]]

    def all(self, key: str) -> list[float]:
        """All values of a metric."""
        return [value for _, value in self._points.get(key, [])]

    def trend(self, key: str) -> Trend:
        """Trend over the window."""
        return trend(self.window(key))

    def ends(self, key: str) -> tuple[float, float]:
        """Medians of the first and of the last ``RECENT`` values of the window."""
        values = self.window(key)
        return median(values[:RECENT]), median(values[-RECENT:])

    def span(self, key: str) -> str:
        """``steps 10 to 300``: the window of a metric."""
        points = self._points[key][-WINDOW:]
        return f"steps {points[0][0]} to {points[-1][0]}"

    def moved(self, key: str) -> str:
        """``rewards/margins rose from 0.1 to 2.3``, over the window."""
        first, last = self.ends(key)
        return f"{key} {'rose' if last > first else 'fell'} from {first:.4g} to {last:.4g}"


Check = Callable[[LoggedSeries], Verdict | None]


def likelihood_key(series: LoggedSeries, role: str) -> str:
    """The log-ratio to the reference where it is logged: unlike logps it does not vary with the rows of a batch."""
    return f"logratio/{role}" if series.all(f"logratio/{role}") else f"logps/{role}"


def falls(series: LoggedSeries, role: str) -> bool:
    """Whether the responses of a role become less likely, beyond noise and by at least ``FALL``."""
    key = likelihood_key(series, role)
    found = series.trend(key)
    if not found.falls or found.change > -FALL:
        return False
    return key == f"logps/{role}" or series.ends(key)[1] <= -FALL


def degradation(series: LoggedSeries) -> Verdict | None:
    """The chosen responses lose likelihood while the margin grows."""
    if not falls(series, "chosen") or series.trend("rewards/margins").change <= 0:
        return None
    key = likelihood_key(series, "chosen")
    times = math.exp(min(-series.trend(key).change, 700))
    return Verdict(
        "degradation",
        series.step,
        "the chosen responses are becoming less likely",
        f"{series.moved(key)} nats a response, about {times:.2g} times less likely, while "
        f"{series.moved('rewards/margins')} ({series.span(key)})",
        "the loss sees only the margin between chosen and rejected; it is as content when both fall, the rejected one "
        "faster. Some fall is usual; left to go on it costs quality",
        _gentler(series.settings),
    )


def dispersion(series: LoggedSeries) -> Verdict | None:
    """Chosen and rejected both fall, and likelihood flows elsewhere."""
    if not (falls(series, "chosen") and falls(series, "rejected")):
        return None
    probe = series.trend("dispersion")
    if abs(probe.change) < DISPERSION or not (probe.rises or probe.falls):
        return None
    where = (
        "to responses in neither list, here the held-out ones (property 3 of arXiv 2406.07327)"
        if probe.rises
        else "to text that is in no list: held-out responses lose likelihood too, a common forerunner of repetition"
    )
    return Verdict(
        "dispersion",
        series.step,
        "likelihood leaves chosen and rejected responses alike",
        f"{series.moved(likelihood_key(series, 'chosen'))}, {series.moved(likelihood_key(series, 'rejected'))}, "
        f"{series.moved('dispersion')} nats a token ({series.span('dispersion')})",
        f"it goes {where}",
        _gentler(series.settings),
    )


def pinned(series: LoggedSeries) -> Verdict | None:
    """The policy never leaves its reference."""
    rewards = [*series.all("rewards/chosen"), *series.all("rewards/rejected")]
    if len(rewards) < 2 * RECENT or series.step < PINNED_STEPS or max(map(abs, rewards)) > ZERO_REWARD:
        return None
    loss = "loss/preference" if series.all("loss/preference") else "loss"
    return Verdict(
        "pinned",
        series.step,
        "the policy does not move away from its reference",
        f"rewards/chosen and rewards/rejected are 0 in every log so far, {loss} is {series.window(loss)[-1]:.4f} "
        f"(log 2 = {math.log(2):.4f})",
        "nothing that trains reaches the model's output, the reference is the policy itself, or the steps are smaller "
        "than the precision of the weights",
        (
            "lora_target_modules: all-linear   # under parametrization: lora",
            "reference: auto                   # the starting model, never the trained adapter",
            "dtype: float32                    # bfloat16 weights swallow small steps",
            _rate(series.settings, 10, "if it is far below 1e-6"),
        ),
    )


def rounded_away(series: LoggedSeries) -> Verdict | None:
    """Steps are smaller than the precision of the weights they are added to."""
    shares = series.window("unmoved_weights")[-RECENT:]
    if not shares or median(shares) < UNMOVED:
        return None
    return Verdict(
        "rounded_away",
        series.step,
        "most steps are lost to rounding",
        f"unmoved_weights is {median(shares):.3f} (median of {len(shares)} logs): that share of the weights, though it "
        "has a gradient, is bit for bit what it was before the step",
        "the update of a weight is smaller than half the distance to the next value its precision knows, so it is "
        "rounded to nothing, every time. What is logged is the little that the smallest weights do",
        (
            "dtype: float32         # with bf16: true it still computes in bfloat16",
            _rate(series.settings, 10, "if it is far below 1e-6"),
        ),
    )


def no_gradient(series: LoggedSeries) -> Verdict | None:
    """The gradient is exactly zero."""
    norms = series.window("grad_norm")[-RECENT:]
    if len(norms) < RECENT or any(norms):
        return None
    return Verdict(
        "no_gradient",
        series.step,
        "the gradient is zero",
        f"grad_norm is exactly 0 in the last {RECENT} logs",
        "no weight that trains influences the loss: all completions are masked or cut away, the adapter is frozen, or "
        "every pair is solved to the last bit",
        (
            "max_length: ...   # larger than the longest prompt, see the data report",
            "lora_target_modules: all-linear",
        ),
    )


def solved(series: LoggedSeries) -> Verdict | None:
    """Every pair is classified with a margin that leaves no gradient."""
    accuracies, weights = (series.window(key)[-RECENT:] for key in ("rewards/accuracies", "effective_weight"))
    if len(weights) < RECENT or min(accuracies, default=0.0) < 1 or max(weights) > SOLVED_WEIGHT:
        return None
    return Verdict(
        "solved",
        series.step,
        "every pair is solved; training has stalled",
        f"rewards/accuracies is 1 and effective_weight at most {max(weights):.2g} in the last {RECENT} logs",
        "the gradient is scaled by effective_weight, so little is learnt from here on. Early in a run it means that "
        "the pairs are trivially told apart",
        (
            f"max_steps: {series.step}   # or fewer num_train_epochs",
            "data: ...        # pairs that are closer to each other",
            _rate(series.settings, 1 / 3, "if it came within the first steps"),
        ),
    )


def rejected_dominates(series: LoggedSeries) -> Verdict | None:
    """The loss pushes the rejected responses far harder than it pulls the chosen ones."""
    values = series.window("grad_ratio_log_per_token")[-MIN_POINTS:]
    if len(values) < MIN_POINTS or median(values) < DOMINATION:
        return None
    return Verdict(
        "rejected_dominates",
        series.step,
        "the rejected responses take nearly all of the gradient",
        f"grad_ratio_log_per_token is {median(values):.2f} (median of {MIN_POINTS} logs): in probability space the "
        f"push on a rejected token is {math.exp(min(median(values), 700)):.0f} times the pull on a chosen one",
        "the rejected responses are already unlikely; pushing them further moves everything else (properties 1 and 2 "
        "of arXiv 2406.07327)",
        _gentler(series.settings),
    )


def displaced_too_far(series: LoggedSeries) -> Verdict | None:
    """The second gradient of a gradient rule is taken where the model is another one."""
    gaps = series.window("gradient/sharpness_gap")
    if len(gaps) < RECENT:
        return None
    gap, loss = fmean(gaps), fmean(series.window("loss")[-len(gaps) :])
    if gap <= FAR * abs(loss):
        return None
    return Verdict(
        "displaced_too_far",
        series.step,
        "the gradient rule looks too far from the weights",
        f"gradient/sharpness_gap is {gap:.3g}, the loss {loss:.3g} (means of {len(gaps)} logs)",
        "the displaced model is a much worse one, whose gradient says little about this one; 1 to 10 % of the loss is "
        "usual",
        ("rho: ...   # lower: a tenth, then read gradient/sharpness_gap again",),
    )


CHECKS: tuple[Check, ...] = (
    *(degradation, dispersion, pinned, rounded_away, no_gradient, solved, rejected_dominates),
    displaced_too_far,
)


def nonfinite(logs: Mapping[str, float]) -> list[str]:
    """Keys among losses and gradient norm that are NaN or infinite."""
    watched = {key: value for key, value in logs.items() if key in ("loss", "grad_norm") or key.startswith("loss/")}
    return [key for key, value in watched.items() if not math.isfinite(value)]


def _gentler(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What keeps the chosen likelihood up, written from the settings of this run."""
    beta_neg = settings.get("beta_neg", settings.get("beta", 0.1)) / 2
    eta = 2 * settings["eta"] if settings.get("eta") else 0.1
    beta_pos = settings.get("beta", 0.1)
    switch = (
        "method: flex_dpo      # one coefficient for each side",
        f"beta_pos: {beta_pos:<11.3g} # beta as it is now",
    )
    return (
        *(() if "beta_neg" in settings else switch),
        f"eta: {eta:<16.3g} # SFT term on the chosen responses",
        f"beta_neg: {beta_neg:<11.3g} # weaker push on the rejected responses",
        _rate(settings, 1 / 3, "slower drift"),
    )


def _rate(settings: Mapping[str, Any], factor: float, why: str) -> str:
    rate = f"{settings['learning_rate'] * factor:.1g}" if "learning_rate" in settings else "..."
    return f"learning_rate: {rate:<6} # {why}"
