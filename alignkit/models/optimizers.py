"""What a run makes of the optimizer that transformers has made: settings of its own, Muon, groups of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from alignkit.models.attachment import ParameterGroup
from alignkit.models.muon import by_muon

MUON = "muon"
"""The setting that makes AdamW Muon, of which transformers does not know."""
SCHEDULE_FREE = "schedule_free"
"""Beginning of the names of optimizers that train other weights than the ones they result in."""


def as_told(optimizer: Optimizer, base: nn.Module, told: str | None) -> Optimizer:
    """The optimizer with those of its settings that transformers does not hand on.

    Args:
        base: The transformers model inside the one that trains.
        told: transformers' ``optim_args``, ``name=value,...``.
    """
    settings = _parsed(told)
    if settings.pop(MUON, False):
        return by_muon(optimizer, base, **settings)
    if isinstance(optimizer, Adafactor):
        for group in optimizer.param_groups:
            group.update(settings)
    return optimizer


def _parsed(told: str | None) -> dict[str, Any]:
    if not told:
        return {}
    values = dict(setting.split("=") for setting in told.split(","))
    return {name: _value(text) for name, text in values.items()}


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else float(text)


def move_to_own_group(optimizer: Optimizer, own: ParameterGroup) -> None:
    """Give parameters a learning rate of their own; all else stays what it is in the group they come from."""
    ids = {id(parameter) for parameter in own.parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in ids]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        if own.decays and moved:
            optimizer.add_param_group({**group, "params": moved, "lr": own.learning_rate})
    if not own.decays:
        group = {"params": list(own.parameters), "lr": own.learning_rate, "weight_decay": 0.0}
        optimizer.add_param_group(group)


def average(optimizer: Any, name: str) -> None:
    """Give the model the weights that its optimizer results in, where these are not the ones that train.

    The next training step takes back those that train.

    Args:
        optimizer: As a trainer holds it; None before training.
        name: transformers' name of it.
    """
    if optimizer is not None and name.startswith(SCHEDULE_FREE):
        optimizer.eval()
