"""Tiny models of every family that can be pruned, plans for them, and norms without the rounding of stock code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignkit.pruning.families import writers
from alignkit.pruning.fold import Fold
from alignkit.pruning.masks import masked
from alignkit.pruning.plan import PruningPlan

WORDS, WIDTH, FFN, HEADS, GROUPS, HEAD_DIM, LAYERS = 50, 32, 40, 4, 2, 8, 3

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 4, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}
"""Every family, with the biases and windows that it can have."""

AXES = {
    "hidden": PruningPlan(hidden=tuple(channel for channel in range(WIDTH) if channel % 4 != 1)),
    "ffn": PruningPlan(ffn=(tuple(range(20)), tuple(range(20, 40)), tuple(range(1, 40, 2)))),
    "kv_groups": PruningPlan(kv_groups=((0,), (1,), (0,))),
    "layers": PruningPlan(layers=(0, 2)),
}
"""A plan on each axis; what is kept differs between layers where it can."""

ALL = AXES["hidden"].merged_with(AXES["ffn"]).merged_with(AXES["kv_groups"]).merged_with(AXES["layers"])
"""All four at once."""

WHOLE = PruningPlan(
    hidden=tuple(range(WIDTH)),
    ffn=(tuple(range(FFN)),) * LAYERS,
    kv_groups=(tuple(range(GROUPS)),) * LAYERS,
    layers=tuple(range(LAYERS)),
)
"""Everything kept, said at length."""


def config(case: str, **changes: Any) -> PreTrainedConfig:
    """Config of a case; epsilon is large, so that nothing may be lost of it.

    Args:
        case: One of :data:`CASES`.
        **changes: Other values of it.
    """
    model_type, settings = CASES[case]
    values: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model_type != "qwen2":  # The one that says it by hidden size and heads alone.
        values["head_dim"] = HEAD_DIM
    return AutoConfig.for_model(model_type, **(values | settings | changes))


def model(case: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model whose weights, norms and biases among them, are all far from 0 and 1.

    Args:
        case: One of :data:`CASES`.
        dtype: Of the weights.
        **changes: Other values of its config.
    """
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(case, **changes), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.3, 0.4).add_(0 if case.startswith("gemma") else 1)
            else:
                parameter.normal_(std=0.2)
    return made


def folds_of(dense: PreTrainedModel, *, without: str | None = None) -> dict[str, Fold]:
    """A map behind every writer of the residual stream, none of them near the identity.

    Args:
        dense: The model.
        without: A writer that has none.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2

    return {
        name: Fold(normal(3, WIDTH), normal(WIDTH, 3), 1 + 2 * normal(WIDTH))
        for name in writers(dense)
        if name != without
    }


def token_ids(rows: int = 2, length: int = 12) -> Tensor:
    """Random tokens [rows, length], longer than the windows."""
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(made: PreTrainedModel) -> Tensor:
    """What a model says of :func:`token_ids`."""
    found: Tensor = made(token_ids()).logits
    return found


def masked_logits(dense: PreTrainedModel, plan: PruningPlan, folds: dict[str, Fold] | None = None) -> Tensor:
    """What the masked model says."""
    with masked(dense, plan, folds=folds):
        return logits(dense)


def difference(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference; the two must have one shape."""
    assert first.shape == second.shape
    return float((first - second).abs().max())


@contextmanager
def exact_norms(*models: PreTrainedModel) -> Iterator[None]:
    """Norms in the precision of their input, not in float32, as written in the papers.

    Args:
        *models: Every RMS norm in them is replaced until the end of the ``with``.
    """
    norms = [m for made in models for m in made.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = _exact(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _exact(norm: nn.Module) -> Any:
    adds_one = type(norm).__name__.startswith("Gemma")
    epsilon = norm.eps if adds_one else norm.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        normal = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return normal * (1 + norm.weight) if adds_one else normal * norm.weight

    return forward
