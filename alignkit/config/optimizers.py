"""The optimizers: what each needs installed, what it reads, and what it may be told in ``optim_args``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.config.settings import Settings
from alignkit.config.values import show

MUON = "muon"
_BITSANDBYTES = ("bitsandbytes", "pip install 'alignkit[quantization]'")
_SCHEDULE_FREE = ("schedulefree", "pip install schedulefree")


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        package: What is to be installed and how; None where torch or transformers has it.
        betas, epsilon: Whether it reads ``adam_beta1`` and ``adam_beta2``, and ``adam_epsilon``.
        settings: What ``optim_args`` may hold, with the type of each.
    """

    package: tuple[str, str] | None = None
    betas: bool = True
    epsilon: bool = True
    settings: Mapping[str, type] = field(default_factory=dict)

    @property
    def is_schedule_free(self) -> bool:
        """Whether it averages weights in place of following a schedule."""
        return self.package == _SCHEDULE_FREE


_ADEMAMIX = {"beta3": float, "alpha": float, "t_alpha": int, "t_beta3": int}
_AVERAGE = {"r": float, "weight_lr_power": float}
OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch": Optimizer(),
    "adamw_torch_fused": Optimizer(),
    "adamw_bnb_8bit": Optimizer(_BITSANDBYTES),
    "adamw_8bit": Optimizer(_BITSANDBYTES),
    "paged_adamw_32bit": Optimizer(_BITSANDBYTES),
    "paged_adamw_8bit": Optimizer(_BITSANDBYTES),
    "lion_32bit": Optimizer(_BITSANDBYTES, epsilon=False),
    "lion_8bit": Optimizer(_BITSANDBYTES, epsilon=False),
    "paged_lion_32bit": Optimizer(_BITSANDBYTES, epsilon=False),
    "paged_lion_8bit": Optimizer(_BITSANDBYTES, epsilon=False),
    "ademamix": Optimizer(_BITSANDBYTES, settings=_ADEMAMIX),
    "ademamix_8bit": Optimizer(_BITSANDBYTES, settings=_ADEMAMIX),
    "adafactor": Optimizer(
        betas=False,
        epsilon=False,
        settings={"scale_parameter": bool, "clip_threshold": float, "decay_rate": float, "beta1": float},
    ),
    MUON: Optimizer(settings={"momentum": float, "nesterov": bool, "ns_steps": int}),
    "sgd": Optimizer(
        betas=False,
        epsilon=False,
        settings={"momentum": float, "dampening": float, "nesterov": bool},
    ),
    "adagrad": Optimizer(betas=False, epsilon=False, settings={"lr_decay": float, "eps": float}),
    "rmsprop": Optimizer(
        betas=False,
        epsilon=False,
        settings={"momentum": float, "alpha": float, "eps": float, "centered": bool},
    ),
    "schedule_free_adamw": Optimizer(_SCHEDULE_FREE, settings=_AVERAGE),
    "schedule_free_radam": Optimizer(_SCHEDULE_FREE, settings=_AVERAGE),
    "schedule_free_sgd": Optimizer(_SCHEDULE_FREE, betas=False, epsilon=False, settings=_AVERAGE),
}
"""By the name of ``optim``: transformers' names, and Muon, which torch has."""


def is_schedule_free(name: str) -> bool:
    """Whether the optimizer of this name averages weights in place of following a schedule."""
    return name in OPTIMIZERS and OPTIMIZERS[name].is_schedule_free


def check_optimizer(settings: Settings) -> None:
    """Report settings that the optimizer has not, and values of another type."""
    name, given = settings.values.get("optim", ""), settings.values.get("optim_args")
    if name not in OPTIMIZERS or not given:
        return
    known = OPTIMIZERS[name].settings
    for setting, value in given.items():
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=1)
            listed = f"Its settings are {', '.join(known)}" if known else "It has none beside keys of a run: remove it"
            fix = f"Did you mean {near[0]}?" if near else listed
            settings.report("optim_args", f"has no setting {setting} of optim: {name}", fix)
        elif not _fits(value, known[setting]):
            words = {bool: "true or false", int: "a whole number >= 0", float: "a number >= 0"}[known[setting]]
            settings.report("optim_args", f"cannot have {setting}: {show(value)}", f"Write {words}")


def _fits(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else int) and value >= 0
