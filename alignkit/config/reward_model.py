"""The keys of reward-model training that differ from those of every program."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.config.sections import TRL, DataSection
from alignkit.config.training import HardwareSection, OptimizerSection
from alignkit.parts.options import DerivedDefault, option
from alignkit.parts.parametrization import parametrizations

ADAPTER_RATE, FULL_RATE = 1e-4, 1e-5


def _rate() -> DerivedDefault:
    """TRL's default under an adapter, where it fits, and a tenth of it for all weights."""
    has_adapter = {record.name: record.has_adapter for record in parametrizations()}
    return DerivedDefault(
        "parametrization",
        {name: ADAPTER_RATE if is_adapter else FULL_RATE for name, is_adapter in has_adapter.items()},
        {name: TRL if is_adapter else "a tenth of lora's" for name, is_adapter in has_adapter.items()},
    )


@dataclass(frozen=True, kw_only=True)
class RewardDataSection(DataSection):
    """Which rows are trained on and held out."""

    pad_to_multiple_of: int | None = option(
        None,
        ge=1,
        le=4096,
        help="Round row lengths up to a multiple of this.",
        source="alignkit (TRL 1.16: auto)",
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class RewardOptimizationSection(OptimizerSection):
    """Length of training, batch size and optimizer, of reward models."""

    learning_rate: float | None = option(
        None,
        gt=0,
        help="Peak learning rate; null is 1e-4 under lora, 1e-5 under full. Small models and short runs want more.",
        derived=_rate(),
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class RewardHardwareSection(HardwareSection):
    """Precision, memory and processes, of reward models."""

    kernels: str = option(
        "none",
        choices=("none",),
        help="What computes the layers: the model's own code. Other kernels are compared by log-probs, which a reward "
        "model does not have.",
    )
