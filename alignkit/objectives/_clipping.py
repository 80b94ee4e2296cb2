"""What methods with importance ratios and a clip have in common: their options, under the names of TRL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.grpo import Regularizers

TRL = "TRL 1.16"
LEVELS = ("token", "sequence")
WITHIN_MICRO_BATCH = ("every_row", "whole_micro_batch")
"""What a loss needs that has a mean or a statistic within a micro-batch: all of its rows, and no others."""

METRICS: Mapping[str, str] = {
    "ratio/mean": "mean importance ratio, over tokens or, at level sequence, over completions",
    "ratio/mean_square": "mean square of it; less the squared mean, its variance",
    "entropy": "entropy of the next-token distribution over completion tokens, nats",
}
"""What every such method returns."""
CLIP_METRICS: Mapping[str, str] = {
    "clip_ratio/low_mean": "share of the tokens, or completions, whose ratio is clipped from below",
    "clip_ratio/high_mean": "share clipped from above",
    "clip_ratio/region_mean": "share clipped at all",
}


@dataclass(frozen=True, kw_only=True)
class RegularizerOptions:
    """What is added to the policy's loss."""

    beta: float = option(
        0.0, ge=0, help="Weight of the divergence from the reference; 0 is off, and no reference is kept.", source=TRL
    )
    use_bias_correction_kl: bool = option(
        True,
        help="Weigh that divergence by the importance ratio, which makes its gradient unbiased (DeepSeek-V3.2).",
        source=TRL,
    )
    entropy_coef: float = option(0.0, help="Weight of an entropy bonus; 0 is off.", source=TRL)

    def regularizers(self) -> Regularizers:
        """The same, for the loss."""
        from alignkit.losses.grpo import Regularizers

        return Regularizers(self.beta, self.use_bias_correction_kl, self.entropy_coef)

    def needs(self, *more: str) -> frozenset[str]:
        """What a run must provide: the reference where the divergence from it counts, and the rows that count then."""
        of_divergence = ("reference", "every_row") if self.beta else ()
        return frozenset([*more, *of_divergence, *(WITHIN_MICRO_BATCH if self.entropy_coef else ())])


@dataclass(frozen=True, kw_only=True)
class ClipOptions(RegularizerOptions):
    """Where ratios are clipped."""

    epsilon: float = option(0.2, ge=0, lt=1, help="Distance of the lower clip from 1.", source=TRL)
    epsilon_high: float | None = option(
        None,
        ge=0,
        help="Distance of the upper clip from 1; null takes epsilon. DAPO recommends 0.28. Under loss_type: cispo the "
        "largest weight itself, where 5.0 is recommended.",
        source=TRL,
    )
    delta: float | None = option(
        None, gt=0, help="Largest ratio that counts where the advantage is negative; null is none.", source=TRL
    )
    importance_sampling_level: str = option(
        "token", choices=LEVELS, help="A ratio for each token, or one for each completion (GSPO).", source=TRL
    )

    @property
    def upper(self) -> float:
        """``epsilon_high``, or what null stands for."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def delta_is_within_clip(c: Any) -> bool:
    """Whether ``delta`` would cut ratios that the clip lets pass."""
    return c.delta is not None and c.delta <= 1 + (c.epsilon if c.epsilon_high is None else c.epsilon_high)
