"""What evaluations are compared by, and which way is better."""

from __future__ import annotations

import difflib
import re
from typing import Any

from alignkit.config.settings import Settings
from alignkit.parts.method import load_method

_LESS = re.compile(r"(.*_)?loss(/.*)?|.*perplexity")
_MORE = re.compile(
    r"(.*/)?(accuracies|accuracy|margins)|reward|rewards/.*|pass@\d+|mean_token_accuracy|(mean_)?logps/chosen"
)


def metric_name(given: str) -> str:
    """A metric of evaluations as it is logged, whether ``eval_`` was left out or not."""
    return given if given.startswith("eval_") else f"eval_{given}"


def more_is_better(metric: str, said: bool | None) -> bool | None:
    """Whether more of a metric is better; None where neither its name nor the user says so.

    Args:
        metric: With or without ``eval_``.
        said: The key ``greater_is_better``.
    """
    bare = metric.removeprefix("eval_")
    if said is not None:
        return said
    if _LESS.fullmatch(bare):
        return False
    return True if _MORE.fullmatch(bare) else None


def check_best(settings: Settings) -> None:
    """Report a metric of which nothing says whether more of it is better."""
    values: dict[str, Any] = settings.values
    metric = values.get("metric_for_best_model")
    is_used = values.get("load_best_model_at_end") or values.get("early_stopping_patience") is not None
    if is_used and metric is not None and more_is_better(metric, values.get("greater_is_better")) is None:
        why = "names a metric of which its name does not say whether more of it is better"
        settings.report(
            "metric_for_best_model", why, f"{_nearest(settings, metric)}rite greater_is_better: true or false as well"
        )


def _nearest(settings: Settings, metric: str) -> str:
    """The metric that may be meant, as the beginning of advice."""
    known = ["loss", *(load_method(settings.method).metrics if settings.method else ())]
    near = difflib.get_close_matches(metric.removeprefix("eval_"), known, n=1, cutoff=0.8)
    return f"Did you mean {near[0]}? If not, w" if near else "W"
