"""What a model's config.json says of its size: layers, heads, experts and which weights there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignkit.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How the decoder layers of an architecture differ from Llama's.

    Attributes:
        qkv_bias: Whether the projections of queries, keys and values have a bias whatever the config says.
        head_norm: Norm of queries and keys: of every head, over all heads, or none.
        norms: Norms of a layer, beside that.
        experts: Whether its layers hold experts.
        shared_expert: Whether one more expert sees all tokens.
        attention: What it computes attention with where transformers' default, sdpa, cannot.
    """

    qkv_bias: bool = False
    head_norm: Literal["head", "all"] | None = None
    norms: int = 2
    experts: bool = False
    shared_expert: bool = False
    attention: str = "sdpa"


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(),
    "granite": Family(),
    "gemma": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norm="head"),
    "olmo2": Family(head_norm="all"),
    "gemma2": Family(norms=4),
    "gemma3_text": Family(norms=4, head_norm="head"),
    "mixtral": Family(experts=True),
    "olmoe": Family(head_norm="all", experts=True),
    "qwen2_moe": Family(qkv_bias=True, experts=True, shared_expert=True),
    "qwen3_moe": Family(head_norm="head", experts=True),
}
"""By ``model_type``: the architectures whose weights are counted exactly."""


_EXPERT_KEYS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size"}
"""What configs of mixtures of experts have: counted as dense, they would seem to fit anywhere."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder.

    Attributes:
        kind: ``model_type``.
        family: What its layers are made of.
        is_known: Whether ``family`` is that of ``FAMILIES``; otherwise Llama's is assumed.
        head: Size of one attention head.
        inner: Width of a dense feed-forward layer.
        expert_layers: Layers that hold experts in place of it.
        experts, chosen: Experts of such a layer, and those a token goes to.
        expert_inner, shared_inner: Width of an expert, and of the one that sees all tokens.
        tied: Whether the head is the embedding.
    """

    kind: str
    family: Family
    is_known: bool
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head: int
    inner: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    expert_layers: frozenset[int] = frozenset()
    experts: int = 0
    chosen: int = 0
    expert_inner: int = 0
    shared_inner: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a model's config.

        Args:
            config: The content of config.json, or ``config.to_dict()``.

        Raises:
            ModelError: It lacks the numbers a decoder is described by.
        """
        text = config.get("text_config", config)
        kind = text.get("model_type", "")
        family = FAMILIES.get(kind, Family())
        if kind not in FAMILIES and (named := sorted(_EXPERT_KEYS & set(text))):
            known = ", ".join(name for name, each in FAMILIES.items() if each.experts)
            raise ModelError(
                f"the memory of a {kind} cannot be estimated: its config has {named[0]}, and the mixtures of experts "
                f"that are known are {known}"
            )
        try:
            return cls._read(text, kind, family)
        except KeyError as error:
            raise ModelError(
                f"the memory of a {kind or 'model without model_type'} cannot be estimated: its config has no "
                f"{error.args[0]}. Known are {', '.join(FAMILIES)}, and what is built like llama."
            ) from error

    @classmethod
    def _read(cls, text: Mapping[str, Any], kind: str, family: Family) -> ModelShape:
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        layers, experts = text["num_hidden_layers"], _experts(text) if family.experts else 0
        return cls(
            kind=kind,
            family=family,
            is_known=kind in FAMILIES,
            layers=layers,
            hidden=hidden,
            heads=heads,
            key_heads=text.get("num_key_value_heads") or heads,
            head=text.get("head_dim") or hidden // heads,
            inner=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            tied=bool(text.get("tie_word_embeddings", kind.startswith("gemma"))),
            attention_bias=family.qkv_bias or bool(text.get("attention_bias")),
            mlp_bias=bool(text.get("mlp_bias")),
            expert_layers=frozenset(i for i in range(layers) if experts and _holds_experts(text, i)),
            experts=experts,
            chosen=text["num_experts_per_tok"] if experts else 0,
            expert_inner=(text.get("moe_intermediate_size") or text["intermediate_size"]) if experts else 0,
            shared_inner=text["shared_expert_intermediate_size"] if family.shared_expert else 0,
        )


def _experts(text: Mapping[str, Any]) -> int:
    for name in ("num_experts", "num_local_experts"):
        if name in text:
            return int(text[name])
    raise KeyError("num_experts")


def _holds_experts(text: Mapping[str, Any], layer: int) -> bool:
    step = text.get("decoder_sparse_step") or 1
    return layer not in (text.get("mlp_only_layers") or ()) and (layer + 1) % step == 0
