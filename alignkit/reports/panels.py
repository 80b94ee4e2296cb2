"""Panels of the figure that a run draws: which metrics each shows. Nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass

BLUE, ORANGE, GREEN, GREY, PURPLE, RED = "#0072B2", "#D55E00", "#009E73", "#666666", "#8E44AD", "#C0392B"


@dataclass(frozen=True)
class Curve:
    """One line of a panel: a metric key, what it is called, its colour."""

    key: str
    label: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """One set of axes; ``lines`` are horizontal guides."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    lines: tuple[float, ...] = ()
    limits: tuple[float, float] | None = None


PER_TOKEN = "log-ratio a token"
ANCHOR_DRIFT = "adpo/anchor_drift"
LOSS_PANEL = Panel("Loss and gradient norm", "loss", (Curve("loss", "loss", BLUE),))
RULE_PANELS = (
    Panel(
        "Gradient and displaced gradient", "cosine", (Curve("gradient/cosine", "cosine", PURPLE),), limits=(-1.03, 1.03)
    ),
    Panel(
        "Loss at the displaced weights, above the loss", "loss", (Curve("gradient/sharpness_gap", "gap", BLUE),), (0.0,)
    ),
)
ROUTER_PANELS = (
    Panel(
        "How evenly routers use their experts",
        "multiples of an equal share",
        (
            Curve("routing/imbalance", "the busiest expert, in equal shares", ORANGE),
            Curve("routing/load_variation", "variation of the loads", GREY),
        ),
    ),
    Panel("Entropy of the routers", "nats a token", (Curve("routing/entropy", "entropy", PURPLE),)),
    Panel(
        "Choices of experts",
        "fraction",
        (
            Curve("routing/churn", "choices other than before training", BLUE),
            Curve("routing/busiest_expert", "tokens that share one expert", ORANGE),
            Curve("routing/dead_experts", "experts without a token", GREY),
        ),
        limits=(-0.03, 1.03),
    ),
)
"""Of runs that train the routers of a mixture of experts."""

PRUNING_PANELS = (
    Panel(
        "How settled it is what is removed",
        "fraction",
        (
            Curve("pat/soft_distance", "distance of the mask to a hard one", PURPLE),
            Curve("pat/mask_churn", "channels that changed sides", ORANGE),
            Curve("atp/churn", "decisions that changed", ORANGE),
            Curve("sparse/ffn_zero", "feed-forward groups at zero", BLUE),
            Curve("sparse/kv_groups_zero", "KV groups at zero", GREEN),
        ),
        limits=(-0.03, 1.03),
    ),
    Panel(
        "Channels kept",
        "channels",
        (
            Curve("pat/open_channels", "hidden", BLUE),
            Curve("atp/ffn_kept", "feed-forward, mean over layers", BLUE),
            Curve("atp/ffn_kept_least", "least of a layer", GREY),
            Curve("atp/ffn_kept_most", "most of a layer", GREY),
        ),
    ),
    Panel("KV groups kept", "groups", (Curve("atp/kv_groups_kept", "mean over layers", BLUE),)),
    Panel(
        "Terms that form the mask",
        "loss",
        (
            Curve("loss/active", "number of open channels", BLUE),
            Curve("loss/bimodality", "two-sidedness", ORANGE),
            Curve("loss/identity", "orthonormal factors", GREY),
            Curve("atp/ratio_loss", "share removed", BLUE),
            Curve("atp/calibration_loss", "loss on calibration rows", ORANGE),
        ),
    ),
    Panel(
        "Norms of groups",
        "parts of the start",
        (
            Curve("sparse/ffn_kept_norm", "feed-forward, kept", BLUE),
            Curve("sparse/ffn_other_norm", "feed-forward, to go", GREY),
            Curve("sparse/kv_groups_kept_norm", "KV groups, kept", GREEN),
            Curve("sparse/kv_groups_other_norm", "KV groups, to go", ORANGE),
        ),
    ),
)
PARAMETRIZATION_PANELS = (*ROUTER_PANELS, *PRUNING_PANELS)
"""What parametrisations log, of any batch shape."""
