"""What is kept of a model: the four axes along which a dense model shrinks and stays one that stock code loads.

    hidden      channels of the residual stream: one set for the whole model
    ffn         channels inside an MLP: a set for each layer, of one size
    kv_groups   a key/value head with the query heads that read it: a set for each layer, of one size
    layers      whole decoder layers

Nothing here needs torch. Indices are those of the dense model and ascend, so a plan has one form and one digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from alignkit.errors import ModelError
from alignkit.json_text import parse_json
from alignkit.storage.durability import write_whole

SIZED = ("hidden", "ffn", "kv_groups")
"""Axes of which a part of a layer goes."""
PLAN_FILE = "pruning_plan.json"
"""Name of the file of a plan beside the model or adapter that it belongs to."""

_NO_AXES = {
    "head_dim": (
        "the width of a head cannot be pruned: stock code computes the rotary frequencies and the scale of attention "
        "from it, so the logits would be wrong. Prune kv_groups, which takes whole heads out"
    ),
    "heads": (
        "query heads cannot be pruned apart from their group, as stock code gives each key/value head the same number "
        "of them. Prune kv_groups: a key/value head with its query heads"
    ),
    "vocab": "the vocabulary is no axis. Write hidden, ffn, kv_groups or layers",
}


@dataclass(frozen=True)
class PruningPlan:
    """What is kept, by axis; None keeps the whole axis.

    Attributes:
        hidden: Channels of the residual stream.
        ffn: Channels of the MLP for each layer of the dense model; those of dropped layers are ignored.
        kv_groups: Key/value heads for each layer of the dense model, likewise.
        layers: Decoder layers.
    """

    hidden: tuple[int, ...] | None = None
    ffn: tuple[tuple[int, ...], ...] | None = None
    kv_groups: tuple[tuple[int, ...], ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse indices that are empty, negative, twice there or out of order."""
        for axis in ("hidden", "layers"):
            if (kept := getattr(self, axis)) is not None:
                _check(axis, kept)
        for axis in ("ffn", "kv_groups"):
            for layer, kept in enumerate(getattr(self, axis) or ()):
                _check(f"{axis} of layer {layer}", kept)

    def kept_layers(self, count: int) -> tuple[int, ...]:
        """The layers kept of a model that has ``count``."""
        return tuple(range(count)) if self.layers is None else self.layers

    def merged_with(self, other: PruningPlan) -> PruningPlan:
        """This plan and one on other axes as one.

        Args:
            other: A plan for the same dense model.

        Raises:
            ModelError: Both prune the same axis.
        """
        added = {field.name: value for field in fields(other) if (value := getattr(other, field.name)) is not None}
        if both := [axis for axis in added if getattr(self, axis) is not None]:
            raise ModelError(f"two plans prune {', '.join(both)}: give each axis in one of them")
        return replace(self, **added)

    def to_json(self) -> dict[str, Any]:
        """The plan as values of JSON."""
        return {
            "hidden": None if self.hidden is None else list(self.hidden),
            "ffn": None if self.ffn is None else [list(kept) for kept in self.ffn],
            "kv_groups": None if self.kv_groups is None else [list(kept) for kept in self.kv_groups],
            "layers": None if self.layers is None else list(self.layers),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PruningPlan:
        """The plan that values of JSON say; an axis that is absent is kept whole.

        Args:
            values: What :meth:`to_json` returns.

        Raises:
            ModelError: An axis is none of the four, or its indices are no ascending whole numbers.
        """
        axes = [field.name for field in fields(cls)]
        for axis in values:
            if axis in _NO_AXES:
                raise ModelError(f"a pruning plan has {axis!r}: {_NO_AXES[axis]}.")
            if axis not in axes:
                raise ModelError(f"a pruning plan has {axis!r}, which is none of its axes: {', '.join(axes)}.")
        return cls(
            hidden=_indices("hidden", values.get("hidden")),
            ffn=_lists("ffn", values.get("ffn")),
            kv_groups=_lists("kv_groups", values.get("kv_groups")),
            layers=_indices("layers", values.get("layers")),
        )

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal for equal plans, on every process of a launch."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write :data:`PLAN_FILE` into a folder.

        Args:
            directory: An existing folder.
        """
        write_whole(directory / PLAN_FILE, json.dumps(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Read a plan.

        Args:
            path: The file, or the folder of a :data:`PLAN_FILE`.

        Raises:
            ModelError: It is not there, or is no plan.
        """
        file = path / PLAN_FILE if path.is_dir() else path
        try:
            values = parse_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"no pruning plan can be read from {file}: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{file} holds no pruning plan: it must be an object with the axes as keys")
        return cls.from_json(values)


def _check(what: str, kept: Sequence[int]) -> None:
    if not kept:
        raise ModelError(f"a pruning plan keeps nothing of {what}: keep at least one")
    if kept[0] < 0 or any(first >= second for first, second in zip(kept, kept[1:], strict=False)):
        raise ModelError(f"the indices that a pruning plan keeps of {what} must be at least 0 and ascend, each once")


def _indices(axis: str, values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list | tuple) or any(type(value) is not int for value in values):
        raise ModelError(f"a pruning plan must list whole numbers for {axis}, the indices that are kept")
    return tuple(values)


def _lists(axis: str, values: Any) -> tuple[tuple[int, ...], ...] | None:
    if values is None:
        return None
    if not isinstance(values, list | tuple):
        raise ModelError(f"a pruning plan must give {axis} as one list for each layer of the dense model")
    return tuple(_indices(f"{axis} of layer {layer}", kept) or () for layer, kept in enumerate(values))
