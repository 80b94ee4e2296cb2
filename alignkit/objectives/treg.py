"""Method ``treg``: DPO with a regulariser on the implicit reward of every token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from alignkit.objectives._pair_metrics import PAIR_METRICS
from alignkit.parts.method import Method, Paper, Preparation
from alignkit.parts.options import Conflict, only_with, option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class TREGOptions:
    """Options of ``treg``."""

    form: str = option(
        "dpo",
        choices=("dpo", "simpo"),
        help="The preference loss that is regularised; simpo needs no reference while training and is our reading.",
        source="T-REG (arXiv 2412.02685), which has both",
    )
    beta: float = option(
        0.1,
        gt=0,
        help="Strength of the leash, per nat of log-ratio. Under form: simpo it multiplies the log-likelihood per "
        "token instead, which is far smaller than a sequence's and wants a larger value.",
        source="alignkit, as dpo; the paper took the best settings of SimPO's authors",
    )
    alpha: float = option(
        0.25,
        ge=0,
        help="Weight of the token regulariser; the gradient of a token changes by at most a share of alpha / 2.",
        source="T-REG (arXiv 2412.02685), the middle of its search over 0.1, 0.25, 0.5, as reported by summaries",
    )
    gamma: float = option(
        0.5,
        ge=0,
        only_with=only_with("form", "simpo"),
        help="Margin the chosen reward must have over the rejected one, form: simpo only.",
        source="TRL 1.16",
    )
    detach_weight: bool = option(
        True,
        only_with=only_with("static_weight", False),
        help="Keep the pair's weight sigma(-z) on the regulariser out of the gradient; no source states it.",
    )
    static_weight: bool = option(
        False,
        only_with=only_with("alpha", example=0.25),
        help="Weigh every pair's regulariser alike rather than by sigma(-z).",
        source="T-REG (arXiv 2412.02685), an ablation that did worse",
    )
    include_response: bool = option(
        True,
        help="Put the response into the prompts its token rewards come from; without it one prompt serves all "
        "responses to a request, which is cheaper.",
        source="alignkit; the paper's revision prompts suggest it, no source says it",
    )
    contrast_prompts: str | None = option(
        None,
        help="Path of a YAML file with other prompts for token rewards; null takes alignkit's. Rows that bring token "
        "rewards need none.",
    )


def objective(batch: CandidateBatch, options: TREGOptions) -> LossOutput:
    """The loss of one batch of pairs with token rewards."""
    from alignkit.losses.treg import treg_loss

    made_before = ("include_response", "contrast_prompts")
    return treg_loss(batch, **{name: value for name, value in asdict(options).items() if name not in made_before})


def needs(options: TREGOptions) -> frozenset[str]:
    """Token rewards always, reference log-probs under ``form: dpo``."""
    return frozenset({"token_rewards"} if options.form == "simpo" else {"token_rewards", "reference"})


def _preparation(config: Any) -> Preparation:
    from alignkit.objectives._treg import TokenRewarded

    return TokenRewarded(config)


METRICS = {
    **PAIR_METRICS,
    "rewards/chosen": "implicit reward of the chosen response: beta times its log-ratio; under simpo beta times its "
    "log-likelihood per token",
    "rewards/margins": "the chosen minus the rejected reward; z under dpo, z + gamma under simpo",
    "logratio/chosen": f"{PAIR_METRICS['logratio/chosen']}; left out under simpo",
    "logratio/rejected": f"{PAIR_METRICS['logratio/rejected']}; left out under simpo",
    "grad_ratio_log": "log of the rejected over the chosen gradient of the preference term in probability space, "
    "L_w - L_l; left out under simpo",
    "grad_ratio_log_per_token": "the same with each log-likelihood divided by its length; left out under simpo",
    "treg/token_reward_chosen": "self-generated reward r_hat of a token of the chosen responses, mean over tokens",
    "treg/token_reward_rejected": "the same of the rejected responses; equal means carry no signal",
    "treg/similarity_chosen": "r_hat times the implicit reward of a token of the chosen responses, mean over tokens; "
    "it grows as the policy's token rewards come to agree with r_hat",
    "treg/similarity_rejected": "the same of the rejected responses",
    "treg/regularizer": "L_reg of both responses of a pair, before the weight sigma(-z) and alpha",
}

METHOD = Method(
    name="treg",
    summary="DPO, or SimPO, with the sequence reward distributed over tokens as the model's own token rewards suggest.",
    options=TREGOptions,
    objective=objective,
    metrics=METRICS,
    paper=Paper(
        title="T-REG: Preference Optimization with Token-Level Reward Regularization",
        arxiv_id="2412.02685",
        citation="""\
@inproceedings{zhou2025treg,
  title     = {{T-REG}: Preference Optimization with Token-Level Reward Regularization},
  author    = {Wenxuan Zhou and Shujian Zhang and Lingxiao Zhao and Tao Meng},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics
               (Volume 1: Long Papers)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2412.02685}
}""",
    ),
    fidelity=(
        "secondary source: two summaries of the paper that agree on the loss and the token reward; the simpo form, the "
        "detached weight and the wording of the two prompts are ours"
    ),
    needs=needs,
    preparation=_preparation,
    conflicts=(
        Conflict(
            "gradient through a static weight",
            ("detach_weight", "static_weight"),
            lambda c: c.static_weight and not c.detach_weight,
            "a weight of 1 has no gradient to keep",
            "Remove detach_weight, or write static_weight: false",
        ),
        Conflict(
            "precomputed reference of the simpo form",
            ("reference", "form"),
            lambda c: c.form == "simpo" and c.reference == "precomputed",
            "the simpo form never reads reference log-probs; its reference only makes the token rewards",
            "Remove reference, or write form: dpo",
        ),
    ),
    when=(
        "Pairs whose responses are good in some places and bad in others, where one more pass of the "
        "reference over the rows can be paid for."
    ),
)
