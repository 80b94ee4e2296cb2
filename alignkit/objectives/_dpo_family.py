"""What the methods of the DPO family share: options that modify any of them, and what they log. No upstream names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alignkit.objectives._pair_metrics import PAIR_METRICS
from alignkit.parts.options import Conflict, only_with, option

BETA = "Strength of the leash to the reference, per nat of log-ratio; larger stays closer."

_GRADIENT_RATIO = ("grad_ratio_log", "grad_ratio_log_per_token")
_WEIGHT = ("effective_weight",)
LOGISTIC_METRICS: Mapping[str, str] = {
    **PAIR_METRICS,
    "rewards/chosen": (
        "implicit reward of the chosen response: beta times its log-ratio, or times what ld_alpha and "
        "f_divergence_type make of it (mean over pairs)"
    ),
    "grad_ratio_log": (
        "log of the rejected over the chosen gradient in probability space, L_w - L_l; left out under ld_alpha or "
        "another f_divergence_type, where it has further parts"
    ),
    "grad_ratio_log_per_token": "the same with each log-likelihood divided by its length; left out where that is",
}
"""Of a loss that is a function of z alone and whose gradient fades as z grows."""
MARGIN_METRICS: Mapping[str, str] = {key: what for key, what in LOGISTIC_METRICS.items() if key not in _WEIGHT}
"""Of another function of z alone."""
SEPARATE_METRICS: Mapping[str, str] = {key: what for key, what in MARGIN_METRICS.items() if key not in _GRADIENT_RATIO}
"""Of a loss that sees the rewards of the two responses by themselves."""
PER_TOKEN: Mapping[str, str] = {
    "rewards/chosen": (
        "implicit reward of the chosen response: beta times its log-ratio, or times what ld_alpha and "
        "f_divergence_type make of it, over its number of tokens (mean over pairs)"
    ),
    "grad_ratio_log": (
        "log of the rejected over the chosen gradient in probability space, L_w - L_l + log(n_w/n_l); left out under "
        "ld_alpha or another f_divergence_type, where it has further parts"
    ),
    "grad_ratio_log_per_token": (
        "the same with each log-likelihood divided by its length, and without the lengths; left out where that is"
    ),
}
"""What is another in a loss that divides log-ratios by their numbers of tokens."""


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Options of every method of the family; the default of ``beta`` is that of its paper."""

    beta: float = option(0.1, gt=0, help=BETA, source="TRL's default")
    ld_alpha: float | None = option(
        None,
        ge=0,
        le=1,
        help="Weight of the tokens of a response beyond the length of the shorter one of its pair (LD-DPO); null and 1 "
        "weigh all tokens alike.",
        source="LD-DPO (arXiv 2409.06411); TRL's default, off",
    )


@dataclass(frozen=True, kw_only=True)
class WeightedOptions(PairOptions):
    """Options of the methods whose loss has one value for each pair."""

    use_weighting: bool = option(
        False,
        help="Weigh each pair by how likely the policy is to write both of its responses (WPO).",
        source="WPO (arXiv 2406.11827); TRL's default, off",
    )

    def needs(self) -> frozenset[str]:
        """A reference, and for the weights what the policy gives all tokens."""
        return frozenset({"reference", *(("policy_log_sum_sq_probs",) if self.use_weighting else ())})


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(WeightedOptions):
    """Options of the methods whose loss is a function of the difference of two scores, in which constants cancel."""

    f_divergence_type: str = option(
        "reverse_kl",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
        help="Divergence that ties the policy to the reference (f-DPO).",
        source="f-DPO (arXiv 2309.16240); reverse_kl is DPO",
    )
    f_alpha_divergence_coef: float = option(
        0.5,
        only_with=only_with("f_divergence_type", "alpha_divergence"),
        help="alpha, f_divergence_type: alpha_divergence only; 1 is the reverse KL, 0 the forward KL. The paper's is 1 "
        "minus it.",
        source="TRL's default",
    )


def label_smoothing(default: float, help: str, source: str) -> float:
    """The option of that name, whose default and meaning are those of each method."""
    smoothing: float = option(default, ge=0, lt=0.5, help=help, source=source)
    return smoothing


def across_pairs(name: str) -> Conflict:
    """What a method is refused with that compares the pairs of a micro-batch with each other."""
    return Conflict(
        f"tokens_per_batch with {name}",
        ("tokens_per_batch",),
        lambda c: c.tokens_per_batch is not None,
        f"method: {name} compares the pairs of a micro-batch with each other, and which are together would go by their "
        "tokens",
        "Remove tokens_per_batch, and set per_device_train_batch_size",
    )
