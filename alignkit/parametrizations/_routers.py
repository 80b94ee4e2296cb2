"""The routers of a mixture of experts, trained as an adapter of full rank (:mod:`alignkit.models.full_rank`)."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models._routers import last_routers
from alignkit.models.full_rank import continue_full_rank, full_rank_config


def check(config: Any) -> None:
    """Nothing: all its options are declared, and so checked before."""


def prepare(config: Any, model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of the adapter a run starts.

    Raises:
        ModelError: The model has no routers, or none that can be trained.
    """
    routers = last_routers(model, config.router_layers)
    if len(sizes := sorted({router.num_experts for router in routers})) > 1:
        raise ModelError(
            f"the routers of {type(model).__name__} choose among {' or '.join(map(str, sizes))} experts, and one "
            "adapter holds those of equal size. Write a router_layers that takes layers of one kind."
        )
    return full_rank_config({f"{router.name}.{router.parameter}": router.num_experts for router in routers})


def go_on(config: Any, model: PeftModel) -> None:
    """Make the loaded adapter one whose training goes on.

    Raises:
        ModelError: It was not made by this parametrisation.
    """
    continue_full_rank(model)
