"""The load-balancing loss of a mixture of experts: how much it counts, and whether it is what the model computes.

TRL takes Mixtral's for every family. Some name their experts otherwise or put out other router logits; there it breaks.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- transformers' text configs: ``router_aux_loss_coef``, ``output_router_logits``; the output's ``aux_loss``
- trl ``add_fused_lm_head`` and ``FusedCausalLMOutput.aux_loss``
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import add_fused_lm_head

from alignkit.data.prefix import IGNORE_INDEX
from alignkit.environment import launched_with_fsdp
from alignkit.errors import ModelError
from alignkit.models._forward import base_model
from alignkit.models.modes import evaluating

TOLERANCE = 1e-2
"""Largest relative difference; rounding in bfloat16 may send a token to another expert."""


def aux_loss_coefficient(model: nn.Module, requested: float | None) -> float:
    """The weight of the load-balancing loss in force; 0 where there is none.

    Args:
        model: The policy, plain or PEFT.
        requested: ``router_aux_loss_coef``; None takes the model's own.

    Raises:
        ModelError: One is asked for, and the model puts out no router logits.
    """
    base: Any = base_model(model)
    settings = base.config.get_text_config().to_dict()
    if "output_router_logits" in settings:
        return float(settings.get("router_aux_loss_coef") or 0.0) if requested is None else requested
    if requested:
        raise ModelError(
            f"router_aux_loss_coef: {requested} cannot be used: {type(base).__name__} is no mixture of experts that "
            "puts out its router logits, so there is no load-balancing loss to weigh. Remove router_aux_loss_coef."
        )
    return 0.0


def checked_aux_loss(model: nn.Module, requested: float | None) -> float:
    """The weight in force, after a comparison where every process has the weights; sharded ones are compared later.

    Args:
        model: The policy, plain or PEFT, before a trainer has it.
        requested: ``router_aux_loss_coef``; None takes the model's own.

    Raises:
        ModelError: One is asked for in vain, or what would be trained is not the model's own.
    """
    coefficient = aux_loss_coefficient(model, requested)
    if coefficient != 0.0 and not is_deepspeed_zero3_enabled() and not launched_with_fsdp():
        add_fused_lm_head(base_model(model))
        check_aux_loss(model, coefficient)
    return coefficient


@torch.no_grad()
def check_aux_loss(model: nn.Module, coefficient: float) -> None:
    """Compare the load-balancing loss that would be trained with the model's own, on a few tokens.

    Args:
        model: The policy with its completion head; a collective where it is sharded.
        coefficient: What :func:`aux_loss_coefficient` returned, not 0.

    Raises:
        ModelError: They differ, or one of them cannot be computed.
    """
    base: Any = base_model(extract_model_from_parallel(model))
    device = next(base.parameters()).device
    ids = torch.arange(1, 17, device=device).view(2, 8) % base.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_router_logits": True}
    name = type(base).__name__
    try:
        with evaluating(model):
            own = model(**inputs).aux_loss
            trained = model(**inputs, labels=ids.masked_fill(mask == 0, IGNORE_INDEX), fused_lm_head=True).aux_loss
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        problem = f"it cannot be computed for {name} ({type(error).__name__}: {error})"
    else:
        if own is None:
            problem = f"{name} computes none itself, so there is nothing that TRL's could be compared with"
        elif abs(float(own) - float(trained)) <= TOLERANCE * abs(float(own)):
            return
        else:
            problem = f"for {name} TRL computes {float(trained):.4g}, the model itself {float(own):.4g}"
    raise ModelError(
        f"the load-balancing loss (router_aux_loss_coef: {coefficient:g}) cannot be trained: {problem}. Write "
        "router_aux_loss_coef: 0 to train without it."
    )
