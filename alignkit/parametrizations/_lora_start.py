"""Where the factors of a LoRA adapter start: at main directions of the weights (PiSSA, OLoRA) or of the rows (EVA).

PiSSA and OLoRA take the factors from the weights, W = W' + s B0 A0, freeze W' and train the rest from B0 A0. Kept like
that, W' would be a base of its own: an adapter saved beside it fits no other, and switching the adapter off would leave
W' where the reference of a method is W. So W stays, and the adapter gets twice the rank,

    s [B, -B0] [A; A0],

of which the second half is frozen. The model is the same function of A and B, so that training makes the same steps
(but for Adafactor, which looks at the size of whole factors); what is saved is a plain LoRA adapter on the original
base, and without it the model is the one the run started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from alignkit.errors import ModelError
from alignkit.parametrizations.lora import starts_on_weights

ADAPTER = "default"
MOST_ROWS = 256
"""Rows that EVA looks at, again and again until the directions are settled."""


def starting_config(config: Any, plain: LoraConfig) -> LoraConfig:
    """PEFT's configuration of an adapter that has room for its start.

    Args:
        config: The run's.
        plain: The one of an adapter that starts at zero; changed.
    """
    if starts_on_weights(config.init_lora_weights):
        plain.r, plain.lora_alpha = 2 * plain.r, 2 * plain.lora_alpha
    elif config.init_lora_weights == "gaussian":
        plain.init_lora_weights = "gaussian"
    return plain


@torch.no_grad()
def start(model: PeftModel, kind: str, rows: Any) -> None:
    """Put the factors where they start, before anything trains.

    Args:
        model: With a new adapter of :func:`starting_config`.
        kind: The key ``init_lora_weights``.
        rows: Training rows, for EVA.

    Raises:
        ModelError: A layer, or the rows, have no such start.
    """
    if kind == "eva":
        _start_on_rows(model, rows)
    elif starts_on_weights(kind):
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                _start_on_weight(name, layer, kind)


def _start_on_weight(name: str, layer: LoraLayer, kind: str) -> None:
    if ADAPTER not in layer.lora_A:
        raise ModelError(
            f"`init_lora_weights: {kind}` starts at main directions of a matrix, and {name} is none. Leave it out of "
            "lora_target_modules, or write init_lora_weights: true."
        )
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    rank = layer.r[ADAPTER] // 2
    weight = layer.get_base_layer().weight.detach().float()
    weight = weight.T if layer.fan_in_fan_out else weight
    if rank > min(weight.shape):
        raise ModelError(
            f"`lora_r: {rank}` is more than {name} has directions, {min(weight.shape)}, at which init_lora_weights: "
            f"{kind} could start. Write a smaller lora_r."
        )
    left, right = main_directions(weight, rank, kind, layer.scaling[ADAPTER])
    a.copy_(torch.cat([right, right]))
    b.copy_(torch.cat([left, -left], 1))
    hold_second_half(a, 0)
    hold_second_half(b, 1)


def main_directions(weight: Tensor, rank: int, kind: str, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors B0 [out, r] and A0 [r, in] of a weight [out, in].

    PiSSA (Meng et al. 2024, arXiv 2404.02948): of W = U S V^T, B0 = U_r sqrt(S_r / s) and A0 = sqrt(S_r / s) V_r^T.
    OLoRA (Buyukakyuz 2024, arXiv 2406.01775): of W = Q R, the first r columns of Q and rows of R.

    Args:
        weight: In float32.
        rank: r.
        kind: ``pissa``, ``pissa_niter_N`` (an approximation, of N iterations) or ``olora``.
        scaling: s, what the product is multiplied by.
    """
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]
    if kind == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(kind.rpartition("_")[2]))
        vh = v.T
    root = (s / scaling).sqrt()
    return u * root, root[:, None] * vh


def hold_second_half(factor: nn.Parameter, dim: int) -> None:
    """Train only the first half of a factor: the gradient of the other is zero, in every step.

    Args:
        factor: A or B of twice the rank.
        dim: The dimension that is the rank.
    """

    def masked(gradient: Tensor) -> Tensor:
        kept, held = gradient.chunk(2, dim)
        return torch.cat([kept, torch.zeros_like(held)], dim)

    factor.register_hook(masked)


def _start_on_rows(model: PeftModel, rows: Any) -> None:
    """Main directions of what each layer is given (EVA, Paischer et al. 2024, arXiv 2410.07170); ranks stay equal.

    B is zero, so the base and what the model says stay what they are.
    """
    rank = model.peft_config[ADAPTER].r
    lists = [_token_ids(rows[i]) for i in range(min(len(rows), MOST_ROWS))]
    device = next(model.parameters()).device
    batches = [{"input_ids": torch.tensor([ids], device=device)} for ids in lists if len(ids) >= rank]
    if not batches:
        raise ModelError(
            f"`init_lora_weights: eva` needs rows of at least lora_r: {rank} tokens, and among the first {len(lists)} "
            "there is none. Write a smaller lora_r, or init_lora_weights: true."
        )
    config = LoraConfig(r=rank, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    found = get_eva_state_dict(
        model,
        batches,
        peft_config=config,
        forward_fn=lambda model, inputs: model(**inputs, use_cache=False),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=_flat,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    layers = dict(model.named_modules())
    for name, directions in found.items():
        layers[name].lora_A[ADAPTER].weight.copy_(directions)


def _flat(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    given: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return given.flatten(0, -2)


def _token_ids(row: Any) -> Sequence[int]:
    """A supervised row, or a prompt with the first of its candidates."""
    if "input_ids" in row:
        ids: Sequence[int] = row["input_ids"]
        return ids
    return [*row["prompt_ids"], *row["completion_ids"][0]]
