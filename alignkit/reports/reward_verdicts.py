"""What can go wrong with a reward model, read off its logs.

:mod:`alignkit.reports.verdicts` says how verdicts are made. The key ``mean_reward`` is logged by reward models alone.
"""

from __future__ import annotations

import math

from alignkit.reports.series import MIN_POINTS, LoggedSeries, Verdict

CENTRE, MARGIN, ACCURACY = "mean_reward", "margin", "accuracy"
FAR_OFF = 3.0
"""Margins: rewards of good and bad answers then lie on the same side, far from 0, and their order is a small part."""
DRIFTED = 2.0
"""Reward: e^2 in odds. A centre nearer to 0 than that troubles nobody, however small the margin."""
GUESSING = 2.0
"""Standard errors by which the held-out accuracy must be above one half."""


def centre_drift(series: LoggedSeries) -> Verdict | None:
    """All rewards move together, which the loss on pairs does not see."""
    centre, margin = series.recent(CENTRE), series.recent(MARGIN)
    values = series.all(CENTRE)
    if centre is None or margin is None or len(values) < MIN_POINTS:
        return None
    trend = series.trend(CENTRE)
    away = trend.rises if centre > 0 else trend.falls
    if not away or abs(centre) < max(DRIFTED, FAR_OFF * abs(margin)):
        return None
    return Verdict(
        "centre_drift",
        series.step,
        "all rewards drift together",
        f"{series.moved(CENTRE)} while {MARGIN} is {margin:.3g} ({series.span(CENTRE)})",
        "a loss on pairs sees differences alone, so that nothing holds the rewards of a prompt where they are. Their "
        "order is not harmed; whoever adds them to other rewards, or compares them with a threshold, is",
        ("center_rewards_coefficient: 0.01   # holds the mean at 0", _rate(series)),
    )


def guessing(series: LoggedSeries) -> Verdict | None:
    """Half of the run is over, and held-out pairs are told apart no better than by chance."""
    found, rows = series.all(f"eval_{ACCURACY}"), series.settings.get("eval_rows")
    if not series.all(CENTRE) or not (series.is_evaluation and series.is_half_way) or len(found) < 2 or not rows:
        return None
    least = 0.5 + GUESSING * math.sqrt(0.25 / rows)
    if max(found[1:]) >= least or series.recent(ACCURACY) is None:
        return None
    return Verdict(
        "guessing",
        series.step,
        "held-out pairs are told apart no better than by chance",
        f"eval_{ACCURACY} is {found[-1]:.3g}, at best {max(found[1:]):.3g}; of {rows} rows guessing gives up to "
        f"{least:.3g}. On the rows trained on {ACCURACY} is {series.recent(ACCURACY):.3g}",
        "whatever is learnt holds for the rows trained on alone, or nothing is learnt: a reward model like this ranks "
        "samples at random",
        (
            "data: ...           # more rows; or rows whose labels agree with each other",
            "num_train_epochs: ...   # more, if accuracy on the rows trained on is near 0.5 too",
            _rate(series),
        ),
    )


REWARD_CHECKS = (centre_drift, guessing)


def _rate(series: LoggedSeries) -> str:
    rate = series.settings.get("learning_rate")
    return f"learning_rate: {'...' if rate is None else f'{rate / 3:.1g}'}   # slower"
