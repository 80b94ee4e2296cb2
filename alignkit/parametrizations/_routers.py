"""The routers of a mixture of experts, trained as an adapter of full rank (:mod:`alignkit.models.full_rank`)."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models._routers import find_routers, last_routers
from alignkit.models.dense_mixer import DenseMixer
from alignkit.models.full_rank import POLICY, continue_full_rank, full_rank_config


def check(config: Any) -> None:
    """Nothing: all its options are declared, and so checked before."""


def prepare(config: Any, model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of the adapter a run starts.

    Raises:
        ModelError: The model has no routers, or none that can be trained as asked.
    """
    routers = last_routers(model, config.router_layers)
    if len(sizes := sorted({router.num_experts for router in routers})) > 1:
        raise ModelError(
            f"the routers of {type(model).__name__} choose among {' or '.join(map(str, sizes))} experts, and one "
            "adapter holds those of equal size. Write a router_layers that takes layers of one kind."
        )
    if config.dense_mixer:
        DenseMixer(model, routers)
    return full_rank_config({f"{router.name}.{router.parameter}": router.num_experts for router in routers})


def go_on(config: Any, model: PeftModel) -> None:
    """Make the loaded adapter one whose training goes on.

    Raises:
        ModelError: It was not made by this parametrisation, or its routers cannot be trained as asked.
    """
    continue_full_rank(model)
    if config.dense_mixer:
        trained = model.peft_config[POLICY].target_parameters
        DenseMixer(model, [r for r in find_routers(model) if f"{r.name}.{r.parameter}" in trained])


def attach(config: Any, trainer: Any) -> None:
    """Nothing: it trains as the trainer does."""
