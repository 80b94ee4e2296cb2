"""What the routers of a mixture of experts do while they train, read off the forward passes that training makes anyway.

Upstream names relied on (asserted by tests/models/test_router_watch.py, in every family of routers):
- peft's ``ParamWrapper`` registers what it adds to a weight as a parametrisation, for as long as the layer runs
- of transformers' backbones: ``attention_mask``, by name, says which tokens are padding
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from alignkit.models._routers import Router, find_routers, routing_scores
from alignkit.models.full_rank import full_rank_layers
from alignkit.models.wrapping import base_model

IMBALANCE, VARIATION, BUSIEST = "routing/imbalance", "routing/load_variation", "routing/busiest_expert"
ENTROPY, CHURN, DEAD = "routing/entropy", "routing/churn", "routing/dead_experts"
METRICS: Mapping[str, str] = {
    IMBALANCE: "tokens of a layer's busiest expert, in multiples of an equal share; mean over the layers that train",
    VARIATION: "standard deviation of the tokens an expert gets, beside their mean; mean over the layers",
    BUSIEST: "share of the tokens that go to one and the same expert, in the layer where it is largest",
    ENTROPY: "of what a router makes of a token, over all experts, nats; mean over tokens and layers",
    DEAD: "share of the experts that no token went to",
    CHURN: "share of the choices that the router before training would not have made on the same hidden states",
}
"""What is logged of the routers. The last only where they train as an adapter, which keeps the weights before."""
OF_EACH_LAYER = (IMBALANCE, ENTROPY, CHURN)
"""Logged besides for each layer, as ``<name>/layer_<number>``."""


class RouterWatch:
    """Counts, over one micro-batch now and then, where routers send its tokens.

    Choices are the k largest logits. Padding does not count, nor does a pass without gradients: a reference's, or one
    that reentrant gradient checkpointing makes.

    Args:
        model: What the routers are in, plain or PEFT.
        routers: Those to look at.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router]) -> None:
        self.routers = tuple(routers)
        self._backbone = cast(nn.Module, base_model(model).base_model)
        self._trained = _trained_layers(model, self.routers)
        self._sums: Tensor | None = None
        self._is_token: Tensor | None = None
        self._moved: dict[str, Tensor] = {}

    @property
    def metrics(self) -> list[str]:
        """The names that :meth:`read` gives."""
        names = [name for name in METRICS if name != CHURN or self._trained]
        each = [name for name in OF_EACH_LAYER if name in names]
        return names + [f"{name}/layer_{_number(router)}" for name in each for router in self.routers]

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Count the tokens of the forward passes inside, unless that was done already since :meth:`read`."""
        if self._sums is not None:
            yield
            return
        device = next(self._backbone.parameters()).device
        # What the experts of a layer got, the entropy, the choices that changed, and the tokens.
        sizes = [router.num_experts + 3 for router in self.routers]
        self._sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        handles = [self._backbone.register_forward_pre_hook(self._see_tokens, with_kwargs=True, prepend=True)]
        for name, (layer, parameter) in self._trained.items():
            # First of all: after a layer, ZeRO-3 takes its weights away again.
            handles.append(layer.register_forward_hook(self._see_change(name, parameter), prepend=True))
        for router, sums in zip(self.routers, torch.split(self._sums, sizes), strict=True):
            handles.append(router.module.register_forward_hook(self._see_logits(router, sums)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._is_token = None
            self._moved.clear()

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The metrics over all processes, and by number of the layer the share of the tokens that each expert got.

        Both are empty where nothing was counted since the last call. A collective where something was looked at.
        """
        if self._sums is None:
            return {}, {}
        sizes = [router.num_experts + 3 for router in self.routers]
        total = accelerator.reduce(self._sums, reduction="sum").cpu()
        self._sums = None
        return self._measures(torch.split(total, sizes)) if total[-1] else ({}, {})

    def _measures(self, layers: Sequence[Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
        found: dict[str, list[float]] = {name: [] for name in METRICS}
        loads: dict[str, list[float]] = {}
        dead = experts = 0
        for router, sums in zip(self.routers, layers, strict=True):
            counts, (entropy, changed, tokens) = sums[:-3], sums[-3:].tolist()
            found[IMBALANCE].append(float(counts.max() / counts.mean()))
            found[VARIATION].append(float(counts.std(correction=0) / counts.mean()))
            found[BUSIEST].append(float(counts.max()) / tokens)
            found[ENTROPY].append(entropy / tokens)
            found[CHURN].append(changed / (tokens * router.top_k))
            dead, experts = dead + int((counts == 0).sum()), experts + len(counts)
            loads[_number(router)] = (counts / tokens).tolist()
        metrics = {name: sum(values) / len(layers) for name, values in found.items() if values}
        metrics |= {BUSIEST: max(found[BUSIEST]), DEAD: dead / experts}
        for name in OF_EACH_LAYER:
            layered = zip(self.routers, found[name], strict=True)
            metrics |= {f"{name}/layer_{_number(router)}": value for router, value in layered}
        return {name: metrics[name] for name in self.metrics}, loads

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _see_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note which tokens of the pass are none; a packed row has no such."""
        mask = kwargs.get("attention_mask")
        self._is_token = None if mask is None else mask.reshape(-1).bool()

    def _see_change(self, name: str, parameter: str) -> Any:
        @torch.no_grad()
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            # Switched off, as for a reference, the adapter adds nothing.
            if is_parametrized(layer, parameter):
                change = getattr(layer, parameter) - layer.parametrizations[parameter].original
                hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
                self._moved[name] = nn.functional.linear(hidden.float(), change.float())

        return hook

    def _see_logits(self, router: Router, sums: Tensor) -> Any:
        def hook(_: nn.Module, inputs: object, output: Any) -> None:
            moved = self._moved.pop(router.name, None)
            if not torch.is_grad_enabled():
                return
            with torch.no_grad():
                logits = output if router.logits_index is None else output[router.logits_index]
                logits = logits.detach().reshape(-1, router.num_experts).float()
                token = torch.ones_like(logits[:, :1], dtype=torch.bool)
                token = token if self._is_token is None else self._is_token[:, None]
                scores = routing_scores(logits, "auto", router)
                entropy = -torch.xlogy(scores, scores).sum(-1, keepdim=True)
                chosen = _chosen(logits, router.top_k) & token
                changed = chosen & ~_chosen(logits if moved is None else logits - moved, router.top_k)
                few = [(entropy * token).sum(), changed.sum(), token.sum()]
                sums.add_(torch.cat([chosen.sum(0).double(), torch.stack([value.double() for value in few])]))

        return hook


def watch_adapter(model: nn.Module) -> RouterWatch | None:
    """What looks at the routers that train as an adapter of full rank; None where none do.

    Args:
        model: Plain or PEFT, not yet sharded.
    """
    layers = set(full_rank_layers(model))
    if not layers:
        return None
    trained = [router for router in find_routers(model) if layers & set(router.module.modules())]
    return RouterWatch(model, trained) if trained else None


def _trained_layers(model: nn.Module, routers: Sequence[Router]) -> dict[str, tuple[nn.Module, str]]:
    """By name of the router, the layer in it that holds the weight that trains, and how it calls that."""
    layers = full_rank_layers(model)
    return {
        router.name: (layer, router.parameter.rpartition(".")[2])
        for router in routers
        for layer in router.module.modules()
        if layer in layers
    }


def _chosen(logits: Tensor, top_k: int) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, -1).indices, True)


def _number(router: Router) -> str:
    """The number of its layer, which every family puts first among the numbers of a name."""
    return str(re.findall(r"\d+", router.name)[0])
