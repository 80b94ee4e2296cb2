"""What can go wrong in a run, read off its logs: one function a trouble, each a pure function of the series.

A verdict needs an effect of a size that matters. Where it claims a direction of training metrics, whose rows differ
from log to log, it needs a trend that noise does not produce (:mod:`alignkit.reports.series`). Evaluations see the
same rows each time, so there a level is enough. The thresholds are ours; each says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean, median
from typing import Any

from alignkit.reports.policy_verdicts import NO_SPREAD, is_online
from alignkit.reports.series import MIN_POINTS, RECENT, LoggedSeries, Verdict

FEW = 3
"""Logged points that a comparison with an evaluation needs."""
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
MOVED = 0.2
"""Nats a response: a fifth likelier or less likely. With beta 0.1 the loss of such a pair stays above 0.67."""
MOVED_LOSS = 0.01
"""Nats: half of what MOVED makes of a preference loss; of supervised rows a token, 1 nat on an answer of 100."""
COLLAPSE = 1.0
"""Nats a token: every token e times less likely, which no preference data asks for and no warm-up does."""
OVERFIT_LOSS = 0.1
"""Share by which the held-out loss lies above its lowest value; it wavers by less between two evaluations."""
OVERFIT_ACCURACY = 0.2
"""Distance of the held-out from the training accuracy, beyond what the number of held-out rows explains (two standard
errors): half of the way from guessing to certainty is 0.25."""
UNMOVED = 0.5
"""Share of the weights. In float32 it is next to 0 at any usual learning rate, in bfloat16 mostly above 0.9."""


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
    """The chosen responses lose likelihood while the margin grows: held-out ones by level, trained ones by trend."""
    if series.settings.get("lowers_chosen"):
        return None
    held_out, key = series.all("eval_logratio/chosen"), "eval_logratio/chosen"
    if held_out and held_out[-1] <= -FALL and series.all("eval_rewards/margins")[-1] > 0:
        times = math.exp(min(-held_out[-1], 700))
        return _degraded(
            series,
            f"{key} is {held_out[-1]:.3g} nats a response: held-out chosen responses are about {times:.2g} times less "
            f"likely than under the reference; eval_rewards/margins is {series.all('eval_rewards/margins')[-1]:.3g}",
        )
    values = series.window("logratio/chosen")
    if series.is_over and 2 <= len(values) < MIN_POINTS and max(values[len(values) // 2 :]) <= -FALL:
        return _degraded(
            series,
            f"logratio/chosen is {values[-1]:.3g} nats a response and was {-FALL:g} or less in the second half of the "
            f"{len(values)} logs",
        )
    if not falls(series, "chosen") or series.trend("rewards/margins").change <= 0:
        return None
    key = likelihood_key(series, "chosen")
    times = math.exp(min(-series.trend(key).change, 700))
    return _degraded(
        series,
        f"{series.moved(key)} nats a response, about {times:.2g} times less likely, while "
        f"{series.moved('rewards/margins')} ({series.span(key)})",
    )


def _degraded(series: LoggedSeries, evidence: str) -> Verdict:
    return Verdict(
        "degradation",
        series.step,
        "the chosen responses are becoming less likely",
        evidence,
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


def barely_moved(series: LoggedSeries) -> Verdict | None:
    """Half of the run is over and the model is still next to where it started."""
    if not series.is_half_way or pinned(series) is not None:
        return None
    evidence = _still_preferences(series) or _still_tokens(series)
    if evidence is None:
        return None
    return Verdict(
        "barely_moved",
        series.step,
        "the model has barely moved",
        evidence,
        "the run is too short or its steps too small to teach anything: the result is the starting model, nearly",
        (
            _rate(series.settings, 10, "the first thing to try"),
            "num_train_epochs: ...   # more, or more max_steps",
        ),
    )


def _still_preferences(series: LoggedSeries) -> str | None:
    """The evidence where chosen and rejected responses are about as likely as under the reference."""
    chosen, rejected = series.recent("logratio/chosen"), series.recent("logratio/rejected")
    if chosen is None or rejected is None or max(abs(chosen), abs(rejected)) >= MOVED:
        return None
    evidence = f"logratio/chosen is {chosen:.3g} and logratio/rejected {rejected:.3g} nats a response"
    loss, losses = series.recent("loss/preference"), series.all("loss/preference")
    if loss is None:
        return evidence
    # Responses that move both ways leave the means where they were, but not the loss.
    return f"{evidence}, loss/preference {loss:.4f}" if abs(loss - losses[0]) < 2 * MOVED_LOSS else None


def _still_tokens(series: LoggedSeries) -> str | None:
    """The evidence where the held-out loss, of tokens or of a reward model, is what it was before training."""
    losses = series.all("eval_loss")
    if series.all("rewards/margins") or is_online(series) or len(losses) < 2 or not series.is_evaluation:
        return None
    if abs(losses[-1] - losses[0]) >= MOVED_LOSS:
        return None
    unit = "" if series.all("mean_reward") else " nats a token"
    return f"eval_loss is {losses[-1]:.4f}{unit}, in the first evaluation it was {losses[0]:.4f}"


def overfitting(series: LoggedSeries) -> Verdict | None:
    """Trained rows are told apart, or predicted, far better than held-out ones, which get worse."""
    if not series.is_evaluation or is_online(series) or len(series.window("loss")) < FEW:
        return None
    evidence = _rising_loss(series) or _accuracy_gap(series)
    if evidence is None:
        return None
    losses = series.all("eval_loss")
    best = series.steps("eval_loss")[losses.index(min(losses))]
    return Verdict(
        "overfitting",
        series.step,
        "the rows are learnt by heart (overfitting)",
        evidence,
        "what is learnt holds for the rows trained on and not for others; with more steps the gap grows",
        (
            f"max_steps: {best if best else '...':<8} # where the held-out loss is lowest; or fewer num_train_epochs",
            _rate(series.settings, 1 / 3, "learns less by heart"),
            "data: ...           # more rows, without repeats",
        ),
    )


def _rising_loss(series: LoggedSeries) -> str | None:
    losses, trained = series.all("eval_loss"), series.recent("loss")
    if len(losses) < 2 or trained is None:
        return None
    best, last = min(losses), losses[-1]
    if last - best < max(OVERFIT_LOSS * best, MOVED_LOSS) or trained > (best + last) / 2:
        return None
    return f"eval_loss rose from {best:.4g} to {last:.4g}, while loss is {trained:.4g}"


def _accuracy_gap(series: LoggedSeries) -> str | None:
    for key in ("rewards/accuracies", "mean_token_accuracy"):
        held_out, trained = series.all(f"eval_{key}"), series.recent(key)
        if held_out and trained is not None:
            noise = math.sqrt(0.25 / max(series.settings.get("eval_rows", 1), 1))
            if trained - held_out[-1] >= OVERFIT_ACCURACY + 2 * noise:
                return f"{key} is {trained:.3g} on trained rows and {held_out[-1]:.3g} on held-out ones"
            return None
    return None


def collapse(series: LoggedSeries) -> Verdict | None:
    """Text that should become likelier, or stay as likely, has become improbable."""
    found = next(filter(None, (_fallen_chosen(series, prefix) for prefix in ("eval_", ""))), None)
    evidence = found or _risen_tokens(series)
    if evidence is None:
        return None
    return Verdict(
        "collapse",
        series.step,
        "the model has collapsed",
        evidence,
        "it no longer speaks the language it did: answers will be repetition or noise, whatever margins say",
        (
            _rate(series.settings, 1 / 10, "far lower"),
            "warmup_steps: 0.1",
            "overwrite: true        # start again; the weights cannot be saved by training on",
        ),
    )


def _fallen_chosen(series: LoggedSeries, prefix: str) -> str | None:
    """The evidence where the chosen responses lost ``COLLAPSE`` nats a token, against the reference or the start."""
    names = [f"{prefix}{name}/chosen" for name in ("logratio", "logps", "mean_logps")]
    # An evaluation counts by itself; of training logs one among several may be an outlier.
    ratio, logps, mean = (series.last(name) if prefix else series.recent(name) for name in names)
    if ratio is not None and logps and mean is not None:
        a_token = ratio * mean / logps
        if a_token <= -COLLAPSE:
            return f"{names[0]} is {ratio:.4g} nats a response, {a_token:.3g} a token"
    elif prefix and mean is not None and mean - series.all(names[2])[0] <= -COLLAPSE:
        return f"{names[2]} is {mean:.4g} nats a token; the first evaluation gave {series.all(names[2])[0]:.4g}"
    return None


def _risen_tokens(series: LoggedSeries) -> str | None:
    """The evidence where supervised rows are predicted worse than before training, by ``COLLAPSE`` nats a token."""
    if series.all("rewards/margins") or is_online(series):
        return None
    for key, least in (("eval_loss", 2), ("loss", 2 * RECENT)):
        losses = series.all(key)
        now = losses[-1] if key == "eval_loss" and losses else series.recent(key)
        if now is not None and len(losses) >= least and now - losses[0] >= COLLAPSE:
            return f"{key} is {now:.4g} nats a token; at first it was {losses[0]:.4g}"
    return None


def no_gradient(series: LoggedSeries) -> Verdict | None:
    """The gradient is exactly zero."""
    norms = series.window("grad_norm")[-RECENT:]
    if len(norms) < RECENT or any(norms):
        return None
    if is_online(series) and median(series.window("frac_reward_zero_std")[-RECENT:]) >= NO_SPREAD:
        return None  # no_spread says why
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
    *(collapse, degradation, dispersion, overfitting, pinned, barely_moved, rounded_away, no_gradient, solved),
    *(rejected_dominates, displaced_too_far),
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
