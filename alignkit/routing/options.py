"""Options of the reference bank, as a shape declares them; torch is not imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.config.sections import Section
from alignkit.parts.options import only_with, option

TOKEN_SETS = ("last1", "middle1", "first1", "last3", "middle3", "first3")
ROUTING_SCORES = ("auto", "softmax", "sigmoid_norm", "topk")
SUCCESSES = ("choices", "generation", "column", "all")
NEIGHBOURS = ("knn", "epsilon", "random")
BASE_EMBEDDER = "base"
FILE_PREFIX = "file:"

ROMA = "RoMA, arXiv 2511.07419"
RELEASED = "the command in the README of RoMA's authors; arXiv 2511.07419v2 has no value"
C3PO = "C3PO's rule is 0.95 on sentence embeddings; RoMA names none"


@dataclass(frozen=True, kw_only=True)
class BankOptions(Section):
    """What a bank is made of; a configuration that needs one has these among its keys."""

    title: ClassVar[str] = "Reference bank"

    bank_token_set: str = option(
        "last1",
        help="Tokens of the prompt whose routing counts, averaged where they are several.",
        source=f"{ROMA}, best of its ablation",
        choices=TOKEN_SETS,
    )
    bank_routing_score: str = option(
        "auto",
        help=(
            "What of a router's logits is compared, summing to 1 a layer: softmax over all experts, sigmoids divided "
            "by their sum, or the mixing weights of the top k; auto is softmax, or sigmoid_norm for sigmoid routers."
        ),
        source="alignkit; the paper does not say, the authors' files hold the softmax",
        choices=ROUTING_SCORES,
    )
    bank_layers: int | None = option(
        5,
        ge=1,
        help="How many of the last mixture-of-experts layers are compared; null is all.",
        source=f"{ROMA}, section 4",
    )
    bank_success: str = option(
        "choices",
        help=(
            "Which rows the base model solves: choices (the likeliest of the column choices is the right one), "
            "generation (a reward of its greedy answer), column (the rows' own column success) or all."
        ),
        source=f"{ROMA}, equation 2",
        choices=SUCCESSES,
    )
    bank_choice_score: str = option(
        "sum",
        help="Which choice is the likeliest: by the log-prob of the whole text (sum) or of its mean token (mean).",
        choices=("sum", "mean"),
        only_with=only_with("bank_success", "choices"),
    )
    bank_success_reward: str | None = option(
        None,
        help="Reward that judges the greedy answers, by its name (alignkit rewards list) or as file.py:function.",
        only_with=only_with("bank_success", "generation"),
    )
    bank_success_threshold: float = option(
        1.0,
        help="An answer of at least this reward is a success.",
        only_with=only_with("bank_success", "generation"),
    )
    bank_success_max_new_tokens: int = option(
        256,
        ge=1,
        help="Longest answer that is generated, in tokens.",
        only_with=only_with("bank_success", "generation"),
    )
    bank_success_filter: bool = option(
        True,
        help="Whether only rows that the base model solves are neighbours; false is a control.",
        source=f"{ROMA}, equation 2",
    )
    bank_embedder: str = option(
        BASE_EMBEDDER,
        help=(
            "What says which rows are alike: base (mean of the base model's last hidden states over the prompt), a "
            "model of sentence-transformers by name or path, or file:PATH with one row of numbers a row of data."
        ),
        source="alignkit, which needs no second model; the authors' code takes all-MiniLM-L6-v2",
        is_path=True,
    )
    bank_neighbours: str = option(
        "knn",
        help="The nearest, all within a ball, or, as a control, random ones.",
        source=f"{ROMA}, equations 3 and 4, Figure 8",
        choices=NEIGHBOURS,
    )
    bank_num_neighbours: int = option(
        3,
        ge=1,
        help="Neighbours of a row, fewer where there are no more.",
        source=f"{ROMA}, Figure 8",
        only_with=only_with("bank_neighbours", "knn", "random"),
    )
    bank_epsilon: float = option(
        0.5,
        gt=0,
        le=1,
        help="Rows whose similarity is at least this are neighbours; 1 is equality.",
        source=f"{ROMA}, best of its ablation",
        only_with=only_with("bank_neighbours", "epsilon"),
    )
    bank_sigma: float = option(
        0.4,
        gt=0,
        help="Width of the Gaussian kernel, in the distance of unit vectors, which is between 0 and 2.",
        source=RELEASED,
    )
    bank_max_similarity: float | None = option(
        None,
        gt=0,
        le=1,
        help="Rows whose cosine is above this are too alike to be neighbours; null leaves out equal ones alone.",
        source=C3PO,
    )
    bank_seed: int = option(
        0,
        ge=0,
        help="Seed of random neighbours.",
        only_with=only_with("bank_neighbours", "random"),
    )
