"""What is logged of a gradient rule, from its evaluations of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.gradients._family import EPSILON, Evaluation, dot, norm, products
from alignkit.losses.types import Metric
from alignkit.parts.rule import GradientRule

LOST = (
    "warning: of a gradient rule's displacement, {whole:.3g} long, rounding leaves {held:.3g} "
    "(gradient/displacement_norm), so the second gradient is nearly the first. Weights that were stored in bfloat16 "
    "are on its grid until they have been trained a while. Write bf16: false, a larger rho, or parametrization: lora."
)


class HeldDisplacement:
    """How much of a displacement is left, along itself, in the precision that the model computes in.

    Args:
        autocast_dtype: What autocast rounds matrices to, or None.
    """

    def __init__(self, autocast_dtype: torch.dtype | None) -> None:
        self._dtype = autocast_dtype
        self._products: list[tuple[Tensor, Tensor]] = []

    def add(self, before: Tensor, after: Tensor, displacement: Tensor) -> None:
        """Add one tensor: its weights, those plus the displacement, and that."""
        if self._dtype is not None and before.dim() > 1:
            before, after = (weight.to(self._dtype).to(weight.dtype) for weight in (before, after))
        self._products.append((dot(after - before, displacement), dot(displacement, displacement)))

    def length(self) -> Tensor:
        """The length that is left; that of the displacement where nothing is rounded away."""
        held, whole = self._sums()
        return held / (whole.sqrt() + EPSILON)

    def problem(self) -> str | None:
        """A warning where less than half is left."""
        held, whole = float(self.length()), float(self._sums()[1].sqrt())
        return LOST.format(held=held, whole=whole) if held < 0.5 * whole else None

    def _sums(self) -> tuple[Tensor, Tensor]:
        held, whole = (torch.stack(column).sum() for column in zip(*self._products, strict=True))
        return held, whole


def measure(rule: GradientRule, options: Any, evaluations: Sequence[Evaluation]) -> dict[str, Metric]:
    """Metrics of one micro-batch.

    Args:
        rule: The rule in use.
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
