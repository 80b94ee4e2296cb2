"""Parametrisation ``sparse``: every weight trains, and groups of them are driven to zero, which can then be removed."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.options import Conflict, Ignored, option
from alignkit.parts.parametrization import Parametrization

REGULARISERS = ("mask_sparsity", "group_lasso", "wgsef")


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """Options of ``sparse``."""

    sparse_regulariser: str = option(
        "mask_sparsity",
        choices=REGULARISERS,
        help="What drives groups to zero: mask_sparsity pulls at the weakest of the start alone, group_lasso at all by "
        "the same, wgsef at the weaker the more.",
    )
    sparse_coef: float = option(
        1.0,
        ge=0,
        help="How far it pulls until sparse_until, the task aside: 1 takes from the norm of a group what those of its "
        "layer have on average when training begins. Of a trained model, group_lasso and wgsef leave little at 1.",
    )
    sparse_ffn: float = option(0.25, ge=0, lt=1, help="Part of the feed-forward channels of every layer that shall go.")
    sparse_kv_groups: float = option(
        0.0, ge=0, lt=1, help="Part of the KV groups of every layer (a key-value head with its queries) that shall go."
    )
    sparse_until: float = option(
        0.7,
        gt=0,
        le=1,
        help="Part of the run after which the strongest groups of each layer are chosen for good and all others set to "
        "zero; in a layer where these are zero before, then. From the choice on nothing pulls, and what is left trains "
        "on.",
    )
    sparse_anneal_fraction: float = option(
        0.3, ge=0, le=1, help="Part of the run over which the number of groups that wgsef leaves alone comes down."
    )


PARAMETRIZATION = Parametrization(
    name="sparse",
    summary="Every weight of the model trains, and a part of its feed-forward channels or KV groups is driven to zero.",
    label="group-sparse tuning",
    options=SparseOptions,
    has_adapter=False,
    ends_on_schedule=True,
    metrics={
        f"sparse/{axis}_{key}": f"{groups}: {what}"
        for axis, groups in (("ffn", "feed-forward groups"), ("kv_groups", "KV groups"))
        for key, what in (
            ("zero", "share that is zero"),
            ("kept_norm", "sum of the norms of those that stay, in parts of that at the start"),
            ("other_norm", "the same of those that shall go"),
        )
    },
    conflicts=(
        Conflict(
            "sparse with nothing to remove",
            ("sparse_ffn", "sparse_kv_groups", "parametrization"),
            lambda c: c.parametrization == "sparse" and c.sparse_ffn == c.sparse_kv_groups == 0,
            "there would be nothing to drive to zero",
            "Write sparse_ffn: 0.25, or parametrization: full",
        ),
        Conflict(
            "sparse with a count that comes down too late",
            ("sparse_anneal_fraction", "sparse_until", "sparse_regulariser"),
            lambda c: c.sparse_regulariser == "wgsef" and c.sparse_anneal_fraction > c.sparse_until,
            "the groups would be chosen before the number that wgsef leaves alone has come down",
            "Write a sparse_anneal_fraction of at most sparse_until",
        ),
        Conflict(
            "sparse with keep_best",
            ("keep_best", "parametrization"),
            lambda c: c.keep_best and c.parametrization == "sparse",
            "the best checkpoint may be one from before the groups were chosen, whose others are not zero",
            "Write keep_best: false",
        ),
    ),
    ignored=(
        Ignored(
            "sparse_anneal_fraction without wgsef",
            ("sparse_anneal_fraction",),
            lambda c: c.parametrization == "sparse" and c.sparse_regulariser != "wgsef",
            "wgsef alone has a number of groups that it leaves alone",
            "write sparse_regulariser: wgsef",
            under=("sparse_regulariser", "parametrization"),
        ),
    ),
    when="A smaller model from tuning in full: groups of weights go to zero together and are cut off.",
)
