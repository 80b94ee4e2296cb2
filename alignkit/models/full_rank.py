"""A low-rank adapter of full rank: weights of which every number moves, kept apart from the weights they start from.

PEFT adds ``B A`` to a weight ``W`` [out, in]. With as many ranks as rows and ``B`` the identity, that is ``W + A``: all
numbers of ``A`` [out, in] train, from zero, and the gradient of ``A`` is that of the weight itself. What is saved is an
adapter like any other, which PEFT loads, merges and pushes; the weights below never change, so that switching it off
gives the model as it was; and ``A`` is held in float32 whatever ``W`` is stored in, so that no small step is lost.

The identity is a buffer, not a parameter: PEFT lets every parameter of an active adapter train, time and again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from alignkit.errors import ModelError

POLICY = "default"
"""PEFT's name of the adapter that trains."""


@dataclass
class FullRankConfig(LoraConfig):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's configuration of such an adapter, saved as that of any LoRA adapter."""


def full_rank_config(parameters: dict[str, int]) -> FullRankConfig:
    """The configuration of an adapter on these weights.

    Args:
        parameters: Full name of each weight in the base model to its number of rows, which is the same for all.
    """
    (rank,) = set(parameters.values())
    return FullRankConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=[], target_parameters=sorted(parameters)
    )


class Identity(nn.Module):
    """The factor that does not train, in the place of PEFT's linear layer.

    Args:
        size: Rows, and columns.
        like: What it is as precise as, and where.
    """

    bias = None

    def __init__(self, size: int, like: torch.Tensor) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.eye(size, dtype=like.dtype, device=like.device))


def continue_full_rank(model: PeftModel) -> None:
    """Make a loaded adapter one that :func:`settle` knows.

    Args:
        model: The base with the adapter ``default`` on it.

    Raises:
        ModelError: It is another kind of adapter.
    """
    wrappers = _wrappers(model)
    if not wrappers or any(_factor(wrapper, POLICY) != "identity" for wrapper in wrappers):
        raise ModelError(
            "the adapter was not made by training routers: it has modules beside them, or factors of a lower rank. "
            "Write parametrization: lora to go on training it, or remove adapter to start a new one."
        )
    for wrapper in wrappers:
        _fix(wrapper, POLICY)


def settle(model: nn.Module) -> None:
    """Give an adapter of full rank its fixed factors and its start at zero, and so its frozen copies; others are left.

    Called once a trainer has put an adapter on the model, before anything is scored or sharded. A second call changes
    nothing.

    Args:
        model: What trains, with or without an adapter.
    """
    if not isinstance(model, PeftModel):
        return
    wrappers = _wrappers(model)
    is_new = isinstance(model.peft_config.get(POLICY), FullRankConfig)
    if not is_new and not any(_is_fixed(wrapper, POLICY) for wrapper in wrappers):
        return
    for wrapper in wrappers:
        for name in wrapper.lora_A:
            if not _is_fixed(wrapper, name):
                if name == POLICY:
                    nn.init.zeros_(wrapper.lora_A[name].weight)
                _fix(wrapper, name)


def full_rank_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the base whose weights the adapter ``default`` trains in full; none where it does not.

    Args:
        model: What :func:`settle` has seen.
    """
    fixed = [wrapper for wrapper in _wrappers(model) if POLICY in wrapper.lora_B and _is_fixed(wrapper, POLICY)]
    return [wrapper.get_base_layer() for wrapper in fixed]


def _wrappers(model: nn.Module) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def _is_fixed(wrapper: ParamWrapper, name: str) -> bool:
    return isinstance(wrapper.lora_B[name], Identity)


def _factor(wrapper: ParamWrapper, name: str) -> str:
    """What the second factor is: ``identity`` or ``other``; the scale must be 1 as well."""
    weight = wrapper.lora_B[name].weight
    square = weight.shape[0] == weight.shape[1] and wrapper.scaling[name] == 1
    is_identity = square and torch.equal(weight.float().cpu(), torch.eye(len(weight)))
    return "identity" if is_identity else "other"


def _fix(wrapper: ParamWrapper, name: str) -> None:
    weight = wrapper.lora_B[name].weight
    wrapper.lora_B[name] = Identity(len(weight), weight.detach())
