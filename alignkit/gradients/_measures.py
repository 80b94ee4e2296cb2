"""What is logged of a gradient rule, from its evaluations of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.gradients._family import Evaluation, norm, products
from alignkit.gradients.rule import GradientRule
from alignkit.losses.types import Metric


def measure(rule: GradientRule, options: Any, evaluations: Sequence[Evaluation]) -> dict[str, Metric]:
    """Metrics of one micro-batch.

    Args:
        rule: The rule in use.
        options: Its options.
        evaluations: At the weights, and where the rule displaces them once more there.
    """
    if len(evaluations) == 2:
        return two_gradient_metrics(*evaluations)
    return {} if rule.measure is None else {k: _single(v) for k, v in rule.measure(evaluations[0], options).items()}


def two_gradient_metrics(first: Evaluation, second: Evaluation) -> dict[str, Metric]:
    """The keys of ``TWO_GRADIENT_METRICS``; a cosine with a gradient of 0 is left out of the mean."""
    each = products(first.gradient, second.gradient)
    cosine = each.total().cosine
    is_defined = cosine.isfinite().to(cosine.dtype)
    in_conflict = (each.gs < 0).to(each.gs.dtype)
    assert second.displacement_norm is not None
    return {
        "gradient/cosine": Metric(cosine.nan_to_num(0.0, 0.0, 0.0), is_defined),
        "gradient/conflict_rate": Metric(in_conflict),
        "gradient/displacement_norm": _single(second.displacement_norm),
        "gradient/weight_norm": _single(norm(first.weights)),
        "gradient/sharpness_gap": _single((second.loss - first.loss) / first.share),
    }


def _single(value: Tensor) -> Metric:
    return Metric(value.reshape(1))
