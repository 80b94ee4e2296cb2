"""The model's pass over prompts: the routing vector of each, and the mean of its hidden states.

Axis letters: B rows, S padded length, P tokens of a prompt, T chosen tokens of it (1 or 3), L layers, E experts,
D = L * E, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from alignkit.models._forward import base_model
from alignkit.models._routers import Router, RouterCapture, ScoreKind, routing_scores
from alignkit.models.modes import evaluating
from alignkit.sampling.generation import forward_options


@dataclass(frozen=True)
class Routed:
    """What one pass says of B prompts.

    Attributes:
        routing: [B, D] float32; each block of E numbers sums to 1.
        pooled: [B, H] float32, mean of the last hidden states over the prompt.
    """

    routing: Tensor
    pooled: Tensor


def token_positions(starts: Tensor, lengths: Tensor, token_set: str) -> tuple[Tensor, Tensor]:
    """Where the tokens of a set stand in padded rows.

    Args:
        starts: [B] int64, the first column of each prompt.
        lengths: [B] int64, its tokens.
        token_set: ``last1``, ``middle1`` or ``first1``, or three tokens side by side; of a shorter prompt all.

    Returns:
        Columns [B, T] and which of them count [B, T] bool.
    """
    place, count = token_set[:-1], int(token_set[-1])
    room = (lengths - count).clamp_min(0)
    offsets = {"first": torch.zeros_like(room), "middle": room // 2, "last": room}[place]
    steps = torch.arange(count, device=starts.device)
    counts = steps < lengths[:, None]
    return (starts + offsets)[:, None] + steps * counts, counts


def routing_vectors(
    logits: Sequence[Tensor], routers: Sequence[Router], positions: tuple[Tensor, Tensor], score: ScoreKind
) -> Tensor:
    """The routing vector of each row, with the graph of the logits: scores at the chosen tokens, averaged over these.

    Args:
        logits: Of a :class:`~alignkit.models._routers.RouterCapture`: [B * S, E] a router.
        routers: Those.
        positions: Of :func:`token_positions`.
        score: What of the logits is compared, see :func:`~alignkit.models._routers.routing_scores`.

    Returns:
        [B, D] float32.
    """
    columns, counts = positions
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    weights = (counts / counts.sum(1, keepdim=True))[..., None]
    blocks = []
    for layer, router in zip(logits, routers, strict=True):
        chosen = layer.view(len(columns), -1, layer.shape[-1])[rows, columns]
        blocks.append((routing_scores(chosen, score, router) * weights).sum(1))
    return torch.cat(blocks, dim=1)


class RoutingPass:
    """Runs a model over prompts without answers, in evaluation mode and without gradient.

    Args:
        model: As it is called: plain, PEFT, or wrapped to be launched or sharded.
        routers: Of the layers that are compared.
        pad_token_id: Fills batches.
        token_set: Which tokens of a prompt count, see :func:`token_positions`.
        score: What of the logits is compared.
        device: Where inputs go.
    """

    def __init__(
        self,
        model: nn.Module,
        routers: Sequence[Router],
        *,
        pad_token_id: int,
        token_set: str,
        score: ScoreKind,
        device: torch.device | str,
    ) -> None:
        self.model, self.routers, self.pad_token_id = model, routers, pad_token_id
        self.token_set, self.score, self.device = token_set, score, device
        self.base: Any = base_model(extract_model_from_parallel(model))
        self.options: dict[str, Any] = {**forward_options(self.base), "use_cache": False}
        if "logits_to_keep" in inspect.signature(self.base.forward).parameters:
            self.options["logits_to_keep"] = 1  # words are not asked for: one position in place of all

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Routed:
        """Routing of the prompts of one batch, on the CPU."""
        length = max(map(len, prompts))
        input_ids = torch.full((len(prompts), length), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, ids in enumerate(prompts):
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            attention_mask[row, : len(ids)] = 1
        return self.of_batch(input_ids, attention_mask)

    @torch.no_grad()
    def of_batch(self, input_ids: Tensor, attention_mask: Tensor) -> Routed:
        """Routing of padded prompts, on the CPU.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 1 on the prompt, whichever side the padding is on.
        """
        input_ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        states: list[Tensor] = []
        hook = self.base.base_model.register_forward_hook(lambda *called: states.append(called[-1].last_hidden_state))
        try:
            with evaluating(self.model), RouterCapture(self.routers) as captured:
                self.model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp_min(0),  # a prompt begins at 0 behind padding, too
                    **self.options,
                )
        finally:
            hook.remove()
        positions = token_positions(mask.argmax(1), mask.sum(1), self.token_set)
        routing = routing_vectors(captured.logits, self.routers, positions, self.score)
        weights = (mask / mask.sum(1, keepdim=True))[..., None]
        return Routed(routing.cpu(), (states[0].float() * weights).sum(1).cpu())
