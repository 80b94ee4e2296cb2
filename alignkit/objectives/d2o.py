"""Method ``d2o``: away from negatives, with the model's own samples in place of positives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.parts.method import Method, Paper, Preparation
from alignkit.parts.options import Conflict, option

if TYPE_CHECKING:
    from alignkit.data.columns import RowFamily
    from alignkit.losses.types import CandidateBatch, LossOutput

_PAPER = "D2O (arXiv 2403.03419), as reported by notes on it"


@dataclass(frozen=True, kw_only=True)
class D2OOptions:
    """Options of ``d2o``."""

    alpha: float = option(
        0.1, gt=0, help="Coefficient of the negative's log-ratio, per nat: the push away from it.", source=_PAPER
    )
    beta: float = option(
        0.1,
        ge=0,
        help="Coefficient of the samples' mean log-ratio, per nat: the pull back to the model's own answers. 0 is NPO, "
        "which collapses when trained long.",
        source=_PAPER,
    )
    helpful_reference_model: str | None = option(
        None,
        help="Directory or Hub id of the reference under the negatives, pi_r+; null is that of the samples.",
        source="D2O (arXiv 2403.03419), whose experiments use one model for both",
        is_path=True,
    )
    num_samples_per_prompt: int = option(
        8,
        ge=1,
        help="Answers K sampled for each prompt that brings none, before training.",
        source="alignkit (paper: 11)",
    )
    sampling_temperature: float = option(
        1.0, gt=0, help="Temperature of the samples; at 1, with sampling_top_p 1, the mean over them is unbiased."
    )
    sampling_top_p: float = option(1.0, gt=0, le=1, help="Nucleus the samples are drawn from.")
    sampling_max_new_tokens: int = option(128, ge=1, help="Longest sample, tokens.")
    sampling_instruction: str | None = option(
        None,
        help="Text put before each prompt while sampling, such as a rule of conduct. Log-probs, here and in the loss, "
        "are those under the plain prompt.",
    )
    sample_refresh_steps: int = option(
        0,
        ge=0,
        help="Every so many optimizer steps the samples of all training rows are drawn anew from the policy of that "
        "moment; 0 keeps those of the starting model. Samples of the current policy hold nothing: keep 0, or refresh "
        "rarely.",
        source="alignkit: frozen, as the anchor needs (when the paper samples anew is not known to us)",
    )


def objective(batch: CandidateBatch, options: D2OOptions) -> LossOutput:
    """The loss of one batch of samples with their negative."""
    from alignkit.losses.d2o import d2o_loss

    return d2o_loss(batch, alpha=options.alpha, beta=options.beta)


def _row_family() -> RowFamily:
    from alignkit.data.negative_schema import negative_rows

    return negative_rows()


def _preparation(config: Any) -> Preparation:
    from alignkit.objectives._d2o import SelfSampled

    return SelfSampled(config)


def _reference_of(chosen: Any) -> str | None:
    """The model under the samples, where it is one that can be named."""
    is_the_model = chosen.reference_model is None and chosen.adapter is None and chosen.model_revision is None
    name: str | None = chosen.model if is_the_model else chosen.reference_model
    return name


METRICS = {
    "rewards/chosen": "beta times the mean log-ratio of the row's samples",
    "rewards/rejected": "alpha times the log-ratio of the negative",
    "rewards/margins": "z, the samples' minus the negative's reward",
    "rewards/accuracies": "fraction of rows with a positive margin",
    "logps/chosen": "log-likelihood of a sample under the policy, nats a sequence, mean over all samples",
    "logps/rejected": "log-likelihood of the negative, nats a sequence",
    "mean_logps/chosen": "log-likelihood of the samples, nats a token, every token weighing the same",
    "mean_logps/rejected": "log-likelihood of the negatives, nats a token",
    "logratio/chosen": "mean log-ratio of the row's samples; near 0 the policy still speaks as it did, a fall is drift",
    "logratio/rejected": "log-ratio of the negative to its reference; this is what training lowers",
    "effective_weight": "sigma(-z), the share of the gradient that is left; near 0 the row has stopped training",
    "d2o/num_samples": "samples of a row, K",
}

METHOD = Method(
    name="d2o",
    summary="Learns from rejected answers alone, held in place by the mean log-ratio of the model's own samples.",
    options=D2OOptions,
    objective=objective,
    metrics=METRICS,
    paper=Paper(
        title="Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference Optimization",
        arxiv_id="2403.03419",
        citation="""\
@inproceedings{duan2024negating,
  title     = {Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference Optimization},
  author    = {Shitong Duan and Xiaoyuan Yi and Peng Zhang and Yan Liu and Zheng Liu and Tun Lu and Xing Xie and
               Ning Gu},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2024},
  year      = {2024},
  url       = {https://arxiv.org/abs/2403.03419}
}""",
    ),
    fidelity=(
        "secondary source: notes on the paper's second version and a third-party implementation agree on the loss; the "
        "number of samples and how they are drawn are ours"
    ),
    num_candidates=None,
    row_family=_row_family,
    preparation=_preparation,
    negative_reference="helpful_reference_model",
    conflicts=(
        Conflict(
            "helpful reference equal to the reference",
            ("helpful_reference_model", "reference_model", "model", "model_revision", "adapter"),
            lambda c: c.helpful_reference_model is not None and c.helpful_reference_model == _reference_of(c),
            "the reference is under the negatives anyway; naming it again only loads it twice",
            "Remove helpful_reference_model",
        ),
        Conflict(
            "refreshed samples with a precomputed reference",
            ("sample_refresh_steps", "reference"),
            lambda c: c.sample_refresh_steps > 0 and c.reference == "precomputed",
            "new samples need reference log-probs that were not computed before training",
            "Write reference: auto, or sample_refresh_steps: 0",
        ),
        Conflict(
            "refreshed samples of streamed rows",
            ("sample_refresh_steps", "streaming"),
            lambda c: c.sample_refresh_steps > 0 and c.streaming,
            "rows of a stream are seen once and cannot be given new samples",
            "Write streaming: false, or sample_refresh_steps: 0",
        ),
    ),
    when="Rejected answers alone, such as safety rows without a good answer to each prompt.",
)
