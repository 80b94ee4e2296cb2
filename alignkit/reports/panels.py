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
