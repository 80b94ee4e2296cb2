"""From what a user asks to have removed to sizes that stock code loads and that run fast.

An amount below 1 is the share that goes: 0.25 takes a quarter away. A whole number is the size that stays. A share is
rounded to the next larger size that is good to have; a whole number is taken as it is, and judged with the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from transformers import PreTrainedConfig

from alignkit.errors import ModelError
from alignkit.pruning.families import sizes_of
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.validate import next_width

Amount = int | Fraction
"""A size that stays, or a share between 0 and 1 that goes."""

STEPS = (128, 64, 8, 1)
"""Feed-forward sizes are rounded up to a multiple of the first of these that is at most 1/32 of the dense size."""
_NAMES = {"hidden": "hidden channels", "ffn": "feed-forward channels", "kv_groups": "KV groups", "layers": "layers"}


@dataclass(frozen=True)
class Kept:
    """How much of each axis stays; None keeps all of it.

    Attributes:
        hidden: Channels of the residual stream.
        ffn: Feed-forward channels a layer.
        kv_groups: KV groups a layer.
        drop_layers: Layers that go.
    """

    hidden: int | None
    ffn: int | None
    kv_groups: int | None
    drop_layers: int

    def first(self, config: PreTrainedConfig) -> PruningPlan:
        """A plan of these sizes that keeps the first of everything: whether stock code loads it can be asked at once.

        Args:
            config: Of the dense model.
        """
        layers = config.num_hidden_layers
        return PruningPlan(
            hidden=None if self.hidden is None else tuple(range(self.hidden)),
            ffn=None if self.ffn is None else (tuple(range(self.ffn)),) * layers,
            kv_groups=None if self.kv_groups is None else (tuple(range(self.kv_groups)),) * layers,
            layers=tuple(range(layers - self.drop_layers)) if self.drop_layers else None,
        )


def kept_sizes(config: PreTrainedConfig, amounts: Mapping[str, Amount], drop_layers: int) -> tuple[Kept, list[str]]:
    """The sizes that stay, and a line on each that was rounded.

    Args:
        config: Of the dense model.
        amounts: By axis: ``hidden``, ``ffn``, ``kv_groups``.
        drop_layers: Layers that go.

    Raises:
        ModelError: Nothing would be left of an axis, or more is asked for than there is; all such problems.
    """
    dense = sizes_of(config)
    _refuse(amounts, drop_layers, {**vars(dense)})
    sizes: dict[str, int] = {}
    lines = []
    for axis in ("kv_groups", "ffn", "hidden"):  # The width depends on how many heads are left.
        if (amount := amounts.get(axis)) is None:
            continue
        size = getattr(dense, axis)
        if isinstance(amount, int):
            sizes[axis] = amount
            continue
        asked = size * (1 - amount)
        if axis == "hidden":
            sizes[axis] = next_width(config, math.ceil(asked), kv_groups=sizes.get("kv_groups"))
        else:
            step = 1 if axis == "kv_groups" else next(step for step in STEPS if step == 1 or 32 * step <= size)
            sizes[axis] = math.ceil(asked / step) * step
        if sizes[axis] != asked:
            lines.append(
                f"{axis}: {float(amount):.4g} of {size:,} {_NAMES[axis]} would leave {float(asked):,.6g}; "
                f"{sizes[axis]:,} are kept ({1 - sizes[axis] / size:.1%} go), the next size that is good to have"
            )
    smaller = {axis: size for axis, size in sizes.items() if size < getattr(dense, axis)}
    if not smaller and not drop_layers:
        raise ModelError("; ".join(["nothing would be pruned. Ask for more to be removed", *lines]))
    return Kept(smaller.get("hidden"), smaller.get("ffn"), smaller.get("kv_groups"), drop_layers), lines


def _refuse(amounts: Mapping[str, Amount], drop_layers: int, dense: Mapping[str, int]) -> None:
    problems = [
        f"--{axis} {amount}: the model has {dense[axis]:,} {_NAMES[axis]}; write how many stay, from 1 to "
        f"{dense[axis]:,}, or the share that goes, such as 0.25"
        for axis, amount in amounts.items()
        if isinstance(amount, int) and not 1 <= amount <= dense[axis]
    ]
    if drop_layers >= dense["layers"]:
        problems.append(f"--drop_layers {drop_layers}: the model has {dense['layers']} layers; at least one must stay")
    if problems:
        raise ModelError("the sizes cannot be had: " + "; ".join(problems))
