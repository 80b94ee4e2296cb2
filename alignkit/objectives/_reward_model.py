"""What the methods that train reward models share. No upstream names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from alignkit.parts.options import Conflict

ORDER_METRICS: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "share of the pairs of one prompt whose better answer has the higher reward",
        "margin": "reward of the better minus that of the worse answer, mean over these pairs",
        "mean_reward": "mean reward of all answers, the centre; a drift of it changes no order",
        "rewards/chosen": "mean reward of the best answer of each row",
        "rewards/rejected": "mean reward of the worst answer of each row",
    }
)

TRAINABLE = ("full", "lora")


def reward_conflicts(method: str) -> tuple[Conflict, ...]:
    """What no method that trains a reward model can be combined with.

    Args:
        method: Its name.
    """
    return (
        Conflict(
            f"{method} under another parametrization than full or lora",
            ("parametrization",),
            lambda c: c.parametrization not in TRAINABLE,
            "the head of a reward model is new and trains in full beside the adapter, which is made and tested for "
            "these two alone",
            "Write parametrization: lora or parametrization: full",
        ),
    )
