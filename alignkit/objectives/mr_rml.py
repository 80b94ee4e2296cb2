"""Method ``mr_rml``: a reward model of several dimensions, held to directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._reward_model import reward_conflicts
from alignkit.parts.method import Method, Paper, RewardDimensions, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, RewardBatch

MOST_DIMENSIONS = 64


@dataclass(frozen=True, kw_only=True)
class MrRmlOptions:
    """Options of ``mr_rml``."""

    dimensions: list[str] = option(
        default_factory=list,
        help="What answers are judged along, keys of the column preferences: 1 where the chosen answer is better, -1 "
        "where it is worse, 0 or null where nobody has said. [] is one dimension, along which chosen is better.",
    )
    projection_dim: int = option(
        256, ge=1, le=2**16, help="Numbers that the head gives, at most as many as the hidden size of the model."
    )
    lam_axis: float = option(
        0.1, ge=0, help="Weight of the direction of the step from the worse to the better answer; 0 is off."
    )
    lam_perp: float = option(
        0.05, ge=0, help="Weight of what of a better answer is not along its axes; 0 leaves only ranking and direction."
    )
    margin: float = option(0.0, ge=0, help="By how much the coordinates of a pair shall differ.")
    perp: str = option(
        "auto",
        choices=("auto", "span", "axis"),
        help="What a better answer is to lie near: the axis of its dimension, or the span of all; auto is the span in "
        "rows with labels along more than one dimension.",
    )

    def __post_init__(self) -> None:
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError("a dimension is named twice")
        if len(self.dimensions) > min(MOST_DIMENSIONS, self.projection_dim):
            most = min(MOST_DIMENSIONS, self.projection_dim)
            raise ValueError(f"there are {len(self.dimensions)} dimensions, and room for {most}")


def objective(batch: RewardBatch, options: MrRmlOptions) -> LossOutput:
    """The loss of one batch of pairs with labels."""
    from alignkit.losses.mr_rml import mr_rml_loss

    return mr_rml_loss(
        batch,
        lam_axis=options.lam_axis,
        lam_perp=options.lam_perp,
        margin=options.margin,
        perp=options.perp,
    )


METHOD = Method(
    name="mr_rml",
    summary="Trains a reward model along several dimensions at once, each held to a direction (GPRC-inspired).",
    options=MrRmlOptions,
    objective=objective,
    metrics={
        "accuracy": "share of the labels whose better answer lies further along the axis",
        "margin": "difference of the two coordinates along the axis, better minus worse",
        "mean_reward": "mean over answers of the mean coordinate, the centre",
        "mr_rml/axis_cosine": "cosine between the step from worse to better answer and the axis",
        "mr_rml/deviation": "share of the squared length of the better answer's displacement off its axes",
    },
    paper=Paper(
        title="Multidimensional Rubric-oriented Reward Model Learning via Geometric Projection Reference Constraints",
        arxiv_id="2511.16139",
        citation="""\
@article{jin2025multidimensional,
  title   = {Multidimensional Rubric-oriented Reward Model Learning via Geometric Projection Reference Constraints},
  author  = {Yongnan Jin and Xurui Li and Feng Cao and Liucun Gao and Juanjuan Yao},
  journal = {arXiv preprint arXiv:2511.16139},
  year    = {2025},
  url     = {https://arxiv.org/abs/2511.16139}
}""",
    ),
    fidelity="reconstruction, GPRC-inspired: from the paper's abstract and a summary by others, without its text; "
    "every equation, every coefficient and the choice of axes are ours",
    program="reward",
    needs=always(),
    dimensions=lambda options: RewardDimensions(tuple(options.dimensions), options.projection_dim),
    conflicts=reward_conflicts("mr_rml"),
    when="Pairs judged along several dimensions, for a model whose every direction means one; with one dimension "
    "bradley_terry has fewer assumptions.",
)
