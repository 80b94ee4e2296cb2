"""Method ``adpo``: scored candidates, anchored to a reference that may move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from alignkit.parts.method import AnchorSchedule, Method, Paper
from alignkit.parts.options import Conflict, only_with, option
from alignkit.parts.parametrization import load_parametrization

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput

_CODE = "ADPO (arXiv 2510.18913), author's code"
_MOVING = ("ema", "kl_triggered", "periodic")


@dataclass(frozen=True, kw_only=True)
class ADPOOptions:
    """Options of ``adpo``."""

    target: str = option(
        "listwise_zscore",
        choices=("listwise_zscore", "listwise_raw", "kde", "pairwise_hard", "pairwise_soft", "plackett_luce"),
        help="What the softmax over a group is drawn to: a softmax of the z-scored, raw or kernel-ranked scores, "
        "Bradley-Terry pairs with hard or soft labels, or the ranking.",
        source="ADPO (arXiv 2510.18913), Algorithm 1",
    )
    tau: float | None = option(
        None,
        gt=0,
        help="Temperature of the anchored log-ratios, nats; null is 1.0, or 1/beta. A smaller one stays closer to the "
        "anchor in the end, though each step is larger.",
        source=_CODE,
    )
    beta: float | None = option(
        None, gt=0, help="1/tau, the beta of DPO, for who thinks in that; null leaves it to tau."
    )
    beta_reward: float = option(
        0.5,
        gt=0,
        only_with=only_with("target", "listwise_zscore", "listwise_raw", "kde", "pairwise_soft"),
        help="Temperature of the scores in the target, in their unit; smaller is closer to best-of-K.",
        source=_CODE,
    )
    logp_reduction: str = option(
        "sum",
        choices=("sum", "mean"),
        help="Log-probs of a completion: summed over tokens as in DPO, or their mean, which suits long completions.",
    )
    anchor: str = option(
        "fixed",
        choices=("fixed", *_MOVING, "uniform"),
        help="What log-probs are taken relative to: the frozen reference, a reference that follows the policy as a "
        "moving average, by copies when it has drifted, or by copies at intervals, or nothing.",
        source="ADPO (arXiv 2510.18913), which finds fixed better offline",
    )
    anchor_decay: float = option(
        0.99,
        only_with=only_with("anchor", "ema"),
        ge=0,
        lt=1,
        help="Share of the anchor that a step keeps, anchor: ema only.",
        source=_CODE,
    )
    anchor_steps: int = option(
        100,
        only_with=only_with("anchor", "periodic"),
        ge=1,
        help="Optimizer steps between copies, anchor: periodic only.",
    )
    anchor_threshold: float = option(
        0.1,
        only_with=only_with("anchor", "kl_triggered"),
        gt=0,
        help="Mean drift that triggers a copy, nats, anchor: kl_triggered only.",
        source=_CODE,
    )
    anchor_window: int = option(
        10,
        only_with=only_with("anchor", "kl_triggered"),
        ge=1,
        help="Steps the drift is averaged over, anchor: kl_triggered only.",
        source=_CODE,
    )
    anchor_kl_coef: float = option(
        0.0, ge=0, help="Weight of a per-token estimate (k3) of the divergence from the anchor.", source=_CODE
    )
    adaptive_tau: bool = option(
        False,
        help="Raise tau on groups the policy finds surprising or that score low; made for online sampling. The scores "
        "are compared within a micro-batch, so results then depend on its size.",
        source=_CODE,
    )
    adaptive_tau_entropy: float = option(
        0.5,
        only_with=only_with("adaptive_tau"),
        ge=0,
        help="How much surprise raises tau, adaptive_tau only.",
        source=_CODE,
    )
    adaptive_tau_reward: float = option(
        1.0,
        only_with=only_with("adaptive_tau"),
        ge=0,
        help="How much a low score raises tau where surprise is low, adaptive_tau only.",
        source=_CODE,
    )
    tau_min: float = option(0.1, only_with=only_with("adaptive_tau"), gt=0, help="Smallest adaptive tau.", source=_CODE)
    tau_max: float = option(5.0, only_with=only_with("adaptive_tau"), gt=0, help="Largest adaptive tau.", source=_CODE)
    eta: float = option(
        0.0, ge=0, help="Weight of an SFT term on the best candidate, against dispersion; 0 is off, 0.1 a usual value."
    )
    sft_normalization: str = option(
        "token",
        only_with=only_with("eta", example=0.1),
        choices=("token", "sequence_sum"),
        help="What the SFT term is divided by: tokens of the best candidates, or groups.",
    )

    @property
    def base_tau(self) -> float:
        """The temperature, however it was given."""
        if self.beta is not None:
            return 1.0 / self.beta
        return 1.0 if self.tau is None else self.tau


def objective(batch: CandidateBatch, options: ADPOOptions) -> LossOutput:
    """The loss of one batch of groups."""
    from alignkit.losses.adpo import AdaptiveTau, adpo_loss

    rule = AdaptiveTau(
        base=options.base_tau,
        entropy_coef=options.adaptive_tau_entropy,
        error_coef=options.adaptive_tau_reward,
        minimum=options.tau_min,
        maximum=options.tau_max,
    )
    return adpo_loss(
        batch,
        target=options.target,
        tau=rule if options.adaptive_tau else options.base_tau,
        beta_reward=options.beta_reward,
        logp_reduction=options.logp_reduction,
        anchor_kl_coef=options.anchor_kl_coef,
        eta=options.eta,
        sft_normalization=options.sft_normalization,
    )


def needs(options: ADPOOptions) -> frozenset[str]:
    """A reference, unless the anchor is uniform; under adaptive_tau the groups that were drawn together."""
    wanted = {"reference": options.anchor != "uniform", "whole_micro_batch": options.adaptive_tau}
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


def anchor(options: ADPOOptions) -> AnchorSchedule | None:
    """How the reference follows the policy; None for a frozen one and for none at all."""
    if options.anchor not in _MOVING:
        return None
    return AnchorSchedule(
        kind=cast(Literal["ema", "periodic", "kl_triggered"], options.anchor),
        decay=options.anchor_decay,
        steps=options.anchor_steps,
        threshold=options.anchor_threshold,
        window=options.anchor_window,
        drift_metric="adpo/anchor_drift",
    )


METRICS = {
    "rewards/chosen": "u of the best candidate: its log-ratio to the anchor over tau",
    "rewards/rejected": "u of the worst candidate",
    "rewards/margins": "the best minus the worst candidate's u",
    "rewards/accuracies": "share of the pairs of candidates with unequal scores that u orders as the scores do; equal "
    "u, as of two candidates with the same tokens, counts half",
    "logps/chosen": "log-likelihood of the best candidate under the policy, nats a sequence",
    "logps/rejected": "log-likelihood of the worst candidate, nats a sequence",
    "mean_logps/chosen": "log-likelihood of the best candidates, nats a token, every token weighing the same",
    "mean_logps/rejected": "log-likelihood of the worst candidates, nats a token",
    "logratio/chosen": "log pi - log pi_anchor of the best candidate, nats a sequence; left out under anchor: uniform",
    "logratio/rejected": "the same of the worst candidate; left out under anchor: uniform",
    "effective_weight": "what is left of the gradient, half of sum |dL/du| over the candidates: the distance of p from "
    "q for a list, sigma(-z) for a hard pair",
    "adpo/target_entropy": "H(q), the least the loss can be, nats; 0 for hard pairs and for rankings without ties",
    "adpo/target_kl": "KL(q || p), the loss above that least, nats",
    "adpo/anchor_drift": "|l - l_ref|, mean over candidates, nats; the author calls it a KL, which it is not; left out "
    "under anchor: uniform",
    "adpo/tau": "temperature of a group",
}

METHOD = Method(
    name="adpo",
    summary="Draws the policy, relative to an anchor, to a distribution over scored candidates: pairs or lists.",
    options=ADPOOptions,
    objective=objective,
    metrics=METRICS,
    paper=Paper(
        title="ADPO: Anchored Direct Preference Optimization",
        arxiv_id="2510.18913",
        citation="""\
@misc{wang2025adpo,
  title         = {{ADPO}: Anchored Direct Preference Optimization},
  author        = {Zixian Wang},
  year          = {2025},
  eprint        = {2510.18913},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2510.18913}
}""",
    ),
    fidelity=(
        "author's text and code for the objective, the listwise and Plackett-Luce targets, the anchors and the "
        "adaptive temperature; the pairwise targets on more than two candidates are ours, kde is our reading of a name"
    ),
    needs=needs,
    num_candidates=None,
    anchor=anchor,
    conflicts=(
        Conflict(
            "tau with beta",
            ("tau", "beta"),
            lambda c: c.tau is not None and c.beta is not None,
            "beta is 1/tau, so one of the two says it all",
            "Keep one of the two",
        ),
        Conflict(
            "empty range of the temperature",
            ("tau_min", "tau_max", "adaptive_tau"),
            lambda c: c.adaptive_tau and c.tau_min > c.tau_max,
            "the smallest temperature is above the largest",
            "Write tau_min below tau_max",
        ),
        Conflict(
            "tokens_per_batch with adaptive_tau",
            ("tokens_per_batch", "adaptive_tau"),
            lambda c: c.adaptive_tau and c.tokens_per_batch is not None,
            "the scores of a micro-batch are compared with each other, and which are together would go by their tokens",
            "Remove one of the two",
        ),
        Conflict(
            "divergence from no anchor",
            ("anchor_kl_coef", "anchor"),
            lambda c: c.anchor == "uniform" and c.anchor_kl_coef > 0,
            "the uniform anchor is no model that one could diverge from",
            "Remove anchor_kl_coef, or write anchor: fixed",
        ),
        Conflict(
            "moving anchor with a reference that stays",
            ("anchor", "reference", "parametrization"),
            lambda c: (
                c.anchor in _MOVING
                and (
                    c.reference in ("precomputed", "adapter_disabled")
                    or (c.reference == "copy" and load_parametrization(c.parametrization).has_adapter)
                )
            ),
            "the anchor has to be a copy of what is trained, or it could not follow it",
            "Remove reference, or write anchor: fixed",
        ),
        Conflict(
            "moving anchor with another reference model",
            ("anchor", "reference_model"),
            lambda c: c.anchor in _MOVING and c.reference_model is not None,
            "the anchor starts where the policy starts and follows it; another model cannot",
            "Remove reference_model, or write anchor: fixed",
        ),
        Conflict(
            "uniform anchor with a reference",
            ("anchor", "reference", "reference_model"),
            lambda c: c.anchor == "uniform" and (c.reference != "auto" or c.reference_model is not None),
            "nothing is compared with a reference",
            "Remove reference and reference_model, or write anchor: fixed",
        ),
    ),
    when=(
        "Candidates with scores, in pairs or longer lists; labels that are noisy, through soft targets; a "
        "reference that shall follow the policy."
    ),
)
