"""Tiny models of the architecture classes that a run is killed with, saved as a base is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
DENSE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
HEADS: Mapping[str, Any] = {**DENSE, "head_dim": 8}
LATENT: Mapping[str, Any] = {
    **DENSE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "topk_group": 1,
}  # fmt: skip
GPT2: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

MIXTURES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {**DENSE, **LOCAL, "sliding_window": None},
    "qwen2_moe": {**DENSE, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**HEADS, **EXPERTS},
    "gpt_oss": {**HEADS, **LOCAL, "sliding_window": 256},
    "deepseek_v3": {**LATENT, "n_group": 2},
}
"""Mixtures of experts, which live with the weights of all experts in one tensor."""

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    **MIXTURES,
    "llama": DENSE,
    "qwen3": {**HEADS, "tie_word_embeddings": True},
    "gemma2": {**HEADS, "sliding_window": 256, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt_neox": {key: value for key, value in DENSE.items() if key != "num_key_value_heads"},
    "olmoe": {**DENSE, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, "n_group": 1},
    "granitemoe": {**DENSE, **LOCAL, "router_aux_loss_coef": 0.0},
    "phimoe": {**DENSE, **LOCAL, "sliding_window": 256, "router_aux_loss_coef": 0.0},
    "mamba2": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8,
        "head_dim": 8, "n_groups": 1, "chunk_size": 16, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 1,
    },
}  # fmt: skip


def build(kind: str) -> PreTrainedModel:
    """A model of an architecture with fresh weights, always the same; what starts at 0 or 1 gets some noise."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind])).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_base(kind: str, folder: Path) -> Path:
    """The model saved, as it is found on the Hub."""
    build(kind).save_pretrained(folder)
    return folder
