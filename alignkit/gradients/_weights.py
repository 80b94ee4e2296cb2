"""How a model is evaluated at other weights without writing them, and how a finished gradient enters its backward pass.

An attribute of a module's own dictionary is found before its registered parameters. Standing in for a parameter there,
for as long as an evaluation lasts, changes neither the parameter nor what optimizers, DDP and DeepSpeed know of it, so
there is nothing to restore, in whatever precision. Whoever reads the weight meets the stand-in: the module itself, a
recomputed checkpoint, DoRA, and the fused LM head that reads ``lm_head.weight`` from outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.gradients._family import LowRankPair

LORA_PREFIX = "lora_"
"""What the names of PEFT's LoRA factors (and DoRA's magnitudes) begin with, at some level."""


@dataclass(frozen=True)
class Trainable:
    """One tensor that trains, or may, and every place that reads it; a tied weight has several.

    Attributes:
        name: Full name of its first place.
        parameter: The tensor, which ZeRO-3 may hold in parts.
        places: (module, attribute) pairs.
    """

    name: str
    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def trains(self) -> bool:
        """Whether it requires a gradient at this moment."""
        return self.parameter.requires_grad

    @cached_property
    def is_lora(self) -> bool:
        """Whether it is part of a LoRA adapter; modules saved beside one are not."""
        return any(part.startswith(LORA_PREFIX) for part in self.name.split("."))

    @property
    def computed_in(self) -> torch.dtype:
        """Precision that the forward pass evaluates the tensor in."""
        dtype = self.parameter.dtype
        return torch.float32 if self.is_lora and dtype in (torch.float16, torch.bfloat16) else dtype


def all_tensors(model: nn.Module) -> list[Trainable]:
    """All tensors of ``model``, frozen ones too, in the order of its modules."""
    names: dict[nn.Parameter, str] = {}
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
            places.setdefault(parameter, []).append((module, name))
    return [Trainable(name, parameter, tuple(places[parameter])) for parameter, name in names.items()]


def trainable_tensors(model: nn.Module) -> list[Trainable]:
    """All tensors of ``model`` that require a gradient at this moment."""
    return [tensor for tensor in all_tensors(model) if tensor.trains]


def whole_weights(tensors: Sequence[Trainable]) -> list[Tensor]:
    """The weights of this moment, detached; copies where ZeRO-3 keeps only parts of them, otherwise mostly views.

    LoRA factors in half precision, as DeepSpeed makes them, come as float32, or rounding would swallow most of a
    displacement. PEFT computes in the precision of the factors, whatever the rest of the model is in.

    A collective under ZeRO-3.
    """
    parameters = [tensor.parameter for tensor in tensors]
    if not is_deepspeed_zero3_enabled():
        return [tensor.parameter.detach().to(tensor.computed_in) for tensor in tensors]
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return [tensor.parameter.detach().to(tensor.computed_in, copy=True) for tensor in tensors]


def low_rank_pairs(model: nn.Module, tensors: Sequence[Trainable]) -> list[LowRankPair]:
    """The LoRA updates of linear layers whose factors both train, by their positions in ``tensors``."""
    positions = {place: i for i, tensor in enumerate(tensors) for place in tensor.places}
    pairs = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for adapter, factor in layer.lora_A.items():
                a, b = positions.get((factor, "weight")), positions.get((layer.lora_B[adapter], "weight"))
                if a is not None and b is not None and factor.weight.dim() == 2:
                    pairs.append(LowRankPair(a, b, layer.scaling[adapter]))
    return pairs


def starting_weights(model: nn.Module, tensors: Sequence[Trainable]) -> dict[str, Tensor]:
    """Copies of the weights by name; LoRA factors, whose update starts at 0, are left out."""
    factors = {i for pair in low_rank_pairs(model, tensors) for i in (pair.a, pair.b)}
    others = [tensor for i, tensor in enumerate(tensors) if i not in factors]
    weights = whole_weights(others) if others else []
    return {tensor.name: weight.clone() for tensor, weight in zip(others, weights, strict=True)}


@contextlib.contextmanager
def shadowed(replacements: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Let attributes of modules be other values; parameters of these names stay registered and untouched."""
    before = [(vars(module), name, vars(module).get(name), name in vars(module)) for module, name, _ in replacements]
    try:
        for module, name, value in replacements:
            vars(module)[name] = value
        yield
    finally:
        for own, name, value, existed in reversed(before):
            if existed:
                own[name] = value
            else:
                own.pop(name, None)


@contextlib.contextmanager
def evaluated_at(tensors: Sequence[Trainable], weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Stand leaves with the values of ``weights`` in for the tensors, to read gradients from their ``grad``."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    pairs = zip(tensors, leaves, strict=True)
    with shadowed([(module, name, leaf) for tensor, leaf in pairs for module, name in tensor.places]):
        yield leaves


class _GradientSource(torch.autograd.Function):
    """A scalar 0 whose gradient with respect to ``parameter`` is ``gradient``."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, parameter.dtype
        return parameter.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        # Used once, given away and changed in place: another copy may be as large as the model.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_output).to(ctx.dtype), None


def zero_with_gradients(
    model: nn.Module, inner: nn.Module, gradients: Mapping[Trainable, Tensor], anchor: Tensor
) -> Tensor:
    """A scalar 0 whose gradient with respect to each tensor is the one given.

    It is computed by the wrapper's forward, calling each owning module in turn, so that whatever DDP or DeepSpeed
    hang on them happens as in an ordinary step: a reducer is armed, partitioned weights are fetched.

    Args:
        model: The wrapped model.
        inner: The model inside.
        gradients: Finished gradients, each of its tensor's shape.
        anchor: Any tensor on the device, handed to the modules in place of an input.
    """
    owned: dict[nn.Module, list[tuple[str, Tensor]]] = {}
    for tensor, gradient in gradients.items():
        module, name = tensor.places[0]
        owned.setdefault(module, []).append((name, gradient))

    # PEFT keeps the parameters of some adapters in containers, which are never called and so carry no hooks.
    uncalled = {inner, *(m for m in owned if isinstance(m, (nn.ParameterDict, nn.ParameterList)))}

    def own_forward(module: nn.Module, *_: Any, **__: Any) -> Tensor:
        return sum((_GradientSource.apply(getattr(module, n), e) for n, e in owned[module]), start=anchor.new_zeros(()))

    def inner_forward(*_: Any, **__: Any) -> Tensor:
        parts = [own_forward(module) if module in uncalled else module(anchor) for module in owned]
        return torch.stack(parts).sum()

    replacements: list[tuple[nn.Module, str, Any]] = [(m, "forward", _bound(own_forward, m)) for m in owned]
    replacements.append((inner, "forward", inner_forward))
    with shadowed(replacements):
        result: Tensor = model(anchor)
    return result


def _bound(function: Any, module: nn.Module) -> Any:
    return lambda *args, **kwargs: function(module, *args, **kwargs)


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer that really steps, which accelerate and DeepSpeed wrap."""
    while "optimizer" in vars(optimizer):
        optimizer = optimizer.optimizer
    return optimizer
