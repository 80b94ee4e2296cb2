"""Muon on hidden matrices, with AdamW on everything else, as one optimizer.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix, which means nothing for embeddings, output heads,
norms and biases: these follow AdamW. Its update is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982,
section 2.2; ``match_rms_adamw`` of torch), so that one learning rate and one weight decay do for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

MUON_EPSILON = 1e-7
"""torch's, below the norm that a momentum is divided by."""


class MuonWithAdamW(Optimizer):
    """Steps the groups marked ``muon`` with torch's Muon and the others with its AdamW.

    Both read groups and states of this optimizer, so that schedules and checkpoints see one.

    Args:
        groups: Parameter groups; each may say ``muon``.
        lr: Learning rate of groups that have none of their own.
        betas, eps: Of AdamW.
        momentum, nesterov, ns_steps: Of Muon.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        self._of_muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step.

        Args:
            closure: Computes the loss once more; None where gradients are there.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Made anew, for schedules replace no group but checkpoints replace all; they cost nothing beside a step.
        for part in self._parts():
            part.state = self.state
            part.step()
        return loss

    def _parts(self) -> list[Optimizer]:
        parts: list[Optimizer] = []
        if muon := [group for group in self.param_groups if group["muon"]]:
            for group in muon:
                group.update(eps=MUON_EPSILON, **self._of_muon)
            parts.append(Muon(muon, adjust_lr_fn="match_rms_adamw"))
        if others := [group for group in self.param_groups if not group["muon"]]:
            parts.append(AdamW(others))
        return parts


def by_muon(optimizer: Optimizer, model: nn.Module, **settings: Any) -> MuonWithAdamW:
    """The same groups, with the hidden matrices of a model in groups of Muon.

    Args:
        optimizer: AdamW over all that trains; it is not used any more.
        model: The transformers model inside, which knows its embeddings and head.
        **settings: Of :class:`MuonWithAdamW`.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    apart = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    groups = []
    for group in optimizer.param_groups:
        is_muon = [weight.ndim == 2 and id(weight) not in apart for weight in group["params"]]
        for muon in (True, False):
            weights = [weight for weight, takes in zip(group["params"], is_muon, strict=True) if takes is muon]
            if weights:
                groups.append({"params": weights, "weight_decay": group["weight_decay"], "muon": muon})
    defaults = optimizer.defaults
    return MuonWithAdamW(groups, lr=defaults["lr"], betas=defaults["betas"], eps=defaults["eps"], **settings)
