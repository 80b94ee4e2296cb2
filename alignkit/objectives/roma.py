"""Method ``roma``: router alignment of a mixture of experts, supervised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import Conflict, only_with, option

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, RoutedBatch

REGULARIZERS = ("manifold", "hellinger", "l1", "l2", "entropy")


@dataclass(frozen=True, kw_only=True)
class RomaOptions:
    """Options of ``roma``; which rows are neighbours is said with the reference bank."""

    manifold_coef: float = option(
        1.0,
        ge=0,
        help="Weight of the regulariser beside the cross-entropy; 0 is cross-entropy alone.",
        source="alignkit; the paper names none, the command of the authors' README has 0.8 for a term without gradient",
    )
    manifold_warmup_steps: int = option(
        0,
        ge=0,
        only_with=only_with("manifold_coef", example=1.0),
        help="Optimizer steps in which the weight rises linearly from 0; 0 has all of it from the first step.",
        source="alignkit; the paper names none, the 2000 of the authors' README outlast the run they stand with",
    )
    regularizer: str = option(
        "manifold",
        choices=REGULARIZERS,
        only_with=only_with("manifold_coef", example=1.0),
        help="What is minimised beside the cross-entropy: the squared distance of the routing from that of solved "
        "neighbours (manifold) or that of the square roots from their mean (hellinger, ours); or, for comparison, the "
        "distance from the row's own routing under the base model (l1, l2) or the entropy of the routing (entropy).",
        source="RoMA (arXiv 2511.07419), equation 7",
    )


def objective(batch: RoutedBatch, options: RomaOptions) -> LossOutput:
    """The loss of one batch of rows."""
    from alignkit.losses.roma import roma_loss

    return roma_loss(
        batch,
        manifold_coef=options.manifold_coef,
        regularizer=options.regularizer,
        manifold_warmup_steps=options.manifold_warmup_steps,
    )


METHOD = Method(
    name="roma",
    summary="Trains the routers of a mixture of experts so that a prompt is routed as similar prompts the base model "
    "solves.",
    options=RomaOptions,
    objective=objective,
    metrics={
        "roma/distance": "squared distance of the routing from the mean routing of the neighbours, of rows that have "
        "some; what training moves",
        "roma/variance": "mean squared distance of the neighbours themselves from that mean; the manifold term is the "
        "sum of both and does not fall below this one",
        "roma/with_target": "share of the rows that have neighbours",
        "roma/drift": "squared distance of the routing from that of the same prompt under the base model",
        "roma/routing_entropy": "entropy of the routing of a layer, mean over layers, nats; even shares of E experts "
        "have log E, one expert has 0",
        "roma/weight": "weight of the regulariser in force, after its warm-up so far",
    },
    paper=Paper(
        title="Routing Manifold Alignment Improves Generalization of Mixture-of-Experts LLMs",
        arxiv_id="2511.07419",
        citation="""\
@inproceedings{li2026routing,
  title     = {Routing Manifold Alignment Improves Generalization of Mixture-of-Experts {LLM}s},
  author    = {Zhongyang Li and Ziyue Li and Tianyi Zhou},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  url       = {https://arxiv.org/abs/2511.07419}
}""",
    ),
    fidelity=(
        "paper text: equations 2 to 9, with a row left out of its own neighbours. That the bank does not move is our "
        "reading; weight, width of the kernel, learning rate and embedder, which it leaves open, are ours; the "
        "released code, whose regulariser has no gradient, was not ported; l1, l2 and entropy are reconstructions of "
        "comparisons it only names, hellinger is ours"
    ),
    program="router",
    needs=always(),
    num_candidates=None,
    conflicts=(
        Conflict(
            "reference bank of streamed rows",
            ("method", "streaming"),
            lambda c: c.streaming,
            "every row has a place in the reference bank, which is made of all rows before training",
            "Remove streaming",
        ),
        Conflict(
            "routing of a compiled model",
            ("method", "torch_compile", "kernels"),
            lambda c: c.torch_compile or c.kernels == "compile",
            "a compiled model leaves out what listens to its routers, so that there would be no routing to align",
            "Remove torch_compile or kernels",
        ),
        Conflict(
            "success by generation without a reward",
            ("bank_success", "bank_success_reward"),
            lambda c: c.bank_success == "generation" and c.bank_success_reward is None,
            "nothing would say which of the generated answers are right",
            "Name a reward that judges them (alignkit rewards list shows those there are), or write "
            "bank_success: choices, column or all",
        ),
    ),
    when="A mixture of experts and rows whose answers can be checked, where only the routers shall move.",
)
