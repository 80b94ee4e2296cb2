"""Tiny mixtures of experts of many families, built in this process: three or four layers, the same random weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 64

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
NAMED = {"num_experts": 8, "num_experts_per_tok": 2}
WIDTH = {"moe_intermediate_size": 16}
LATENT = {
    "head_dim": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
DENSE_FIRST = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


@dataclass(frozen=True)
class Family:
    """A family, and what its tiny model has.

    Attributes:
        build: Makes the model.
        path: Name of the router of the layer with this number.
        layers: Numbers of the layers with experts.
        score: What the family makes of the logits, in the words of the card of its paper or its code.
        weight: Name of the weight in the router.
    """

    build: Callable[[], nn.Module]
    path: str
    layers: tuple[int, ...]
    score: str
    weight: str = "weight"


def _family(
    prefix: str,
    path: str = "model.layers.{}.mlp.gate",
    layers: tuple[int, ...] = (0, 1, 2),
    score: str = "softmax",
    weight: str = "weight",
    config: str = "Config",
    **own: Any,
) -> Family:
    def build() -> nn.Module:
        settings = getattr(hf, prefix + config)(**{**SHARED, **own})
        return getattr(hf, prefix + "ForCausalLM")(settings)

    return Family(build, path, layers, score, weight)


def _dbrx() -> nn.Module:
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32}
    config = hf.DbrxConfig(
        d_model=32, n_heads=2, n_layers=3, max_seq_len=64, vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=0,
        eos_token_id=1, bos_token_id=1, attn_config=attention, ffn_config=experts,
    )  # fmt: skip
    return hf.DbrxForCausalLM(config)


AFTER_DENSE = (1, 2, 3)
FAMILIES: dict[str, Family] = {
    "olmoe": _family("Olmoe", **NAMED),
    "mixtral": _family("Mixtral", **LOCAL),
    "qwen2_moe": _family("Qwen2Moe", shared_expert_intermediate_size=16, **WIDTH, **NAMED),
    "qwen3_moe": _family("Qwen3Moe", layers=(0, 2), mlp_only_layers=[1], norm_topk_prob=True, **WIDTH, **NAMED),
    "qwen3_5_moe": _family(
        "Qwen3_5Moe", config="TextConfig", shared_expert_intermediate_size=16, **LINEAR, **WIDTH, **NAMED,
    ),
    "deepseek_v2": _family("DeepseekV2", layers=AFTER_DENSE, **DENSE_FIRST, **LATENT, **WIDTH, **GROUPS),
    "deepseek_v3": _family(
        "DeepseekV3", layers=AFTER_DENSE, score="sigmoid", **DENSE_FIRST, **LATENT, **WIDTH, **GROUPS
    ),
    "glm4_moe": _family("Glm4Moe", layers=AFTER_DENSE, score="sigmoid", **DENSE_FIRST, **WIDTH, **GROUPS),
    "gpt_oss": _family("GptOss", "model.layers.{}.mlp.router", **LOCAL),
    "granitemoe": _family("GraniteMoe", "model.layers.{}.block_sparse_moe.router", **LOCAL),
    "minimax_m2": _family("MiniMaxM2", score="sigmoid", **LOCAL),
    "ernie4_5_moe": _family(
        "Ernie4_5_Moe", layers=(1, 2), moe_num_experts=8, moe_k=2, moe_layer_start_index=1, moe_num_shared_experts=1,
        moe_layer_interval=1, moe_layer_end_index=-1, **WIDTH,
    ),
    "hunyuan_v1_moe": _family("HunYuanMoEV1", weight="wg.weight", num_experts=8, moe_topk=[2, 2, 2]),
    "jamba": _family(
        "Jamba", "model.layers.{}.feed_forward.router", layers=(1, 3), num_hidden_layers=4, expert_layer_period=2,
        expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False, **NAMED,
    ),
    "llama4": _family(
        "Llama4", "model.layers.{}.feed_forward.router", layers=(1, 3), score="sigmoid", config="TextConfig",
        num_hidden_layers=4, interleave_moe_layer_step=2, intermediate_size_mlp=24, attention_chunk_size=64,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "dbrx": Family(_dbrx, "transformer.blocks.{}.ffn.router", (0, 1, 2), "softmax", "layer.weight"),
    "phimoe": _family("Phimoe", "model.layers.{}.mlp.router", **LOCAL),
    "dots1": _family("Dots1", layers=AFTER_DENSE, score="sigmoid", **DENSE_FIRST, **WIDTH, **GROUPS),
    "lfm2_moe": _family(
        "Lfm2Moe", "model.layers.{}.feed_forward.gate", layers=(1, 2), score="sigmoid", num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"], **WIDTH, **NAMED,
    ),
}  # fmt: skip
RELATIVES: dict[str, Family] = {
    "exaone_moe": _family("ExaoneMoe", layers=(1, 2), score="sigmoid", is_moe_layer=[False, True, True],
                          layer_types=["full_attention"] * 3, **WIDTH, **NAMED),
    "flex_olmo": _family("FlexOlmo", **NAMED),
    "glm4_moe_lite": _family("Glm4MoeLite", layers=AFTER_DENSE, score="sigmoid", **DENSE_FIRST, **LATENT, **WIDTH,
                             **GROUPS),
    "granitemoeshared": _family("GraniteMoeShared", "model.layers.{}.block_sparse_moe.router", **LOCAL),
    "minimax": _family("MiniMax", **LOCAL),
    "nemotron_h": _family("NemotronH", "model.layers.{}.mixer.gate", layers=(1,), score="sigmoid", **GROUPS, **WIDTH),
    "qwen3_next": _family("Qwen3Next", shared_expert_intermediate_size=16, **LINEAR, **WIDTH, **NAMED),
    "solar_open": _family("SolarOpen", score="sigmoid", **GROUPS, **WIDTH),
}  # fmt: skip
"""Families that come along because their routers are those of another one."""


def tiny_moe(family: str) -> Any:
    """A new tiny model in evaluation mode, float32, with the same random weights every time.

    Args:
        family: A key of ``FAMILIES`` or ``RELATIVES``.
    """
    return copy.deepcopy(_built(family))


@functools.cache
def _built(family: str) -> nn.Module:
    known = {**FAMILIES, **RELATIVES}[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = known.build()
        # Some families start their routers at 0, which choose nothing, and GPT-OSS its bias.
        for layer in known.layers:
            router = model.get_submodule(known.path.format(layer))
            nn.init.normal_(router.get_parameter(known.weight), std=0.3)
            if family == "gpt_oss":
                nn.init.normal_(router.bias, std=0.3)
    return model.eval()
