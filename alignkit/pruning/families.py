"""The families of models that can be pruned, and where each keeps what.

All have RMS norms, which keep zeros of the residual stream zero, separate projections, and stock code that takes the
width of a head from its config. LayerNorm subtracts the mean, so a pruned channel would come back through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from alignkit.errors import ModelError

EMBEDDING, LAYERS, FINAL_NORM, HEAD = "model.embed_tokens", "model.layers", "model.norm", "lm_head"
"""Full names of modules, the same in every family."""

QUERY, KEY, VALUE, ATTENTION_OUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
"""Names of modules within a decoder layer."""


@dataclass(frozen=True)
class Family:
    """What differs between families.

    Attributes:
        model_type: As in the config.
        norms: Norms of a layer that read the residual stream.
        post_norms: Norms of a layer between a projection and the residual stream, in a sandwich.
        adds_one: Whether a norm multiplies by 1 + its weight, not by its weight.
        scales_embedding: Whether embeddings are multiplied by the root of the hidden size.
        width_of_heads: Whether stock code refuses a hidden size that is no multiple of the number of heads.
    """

    model_type: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str, ...] = ()
    adds_one: bool = False
    scales_embedding: bool = False
    width_of_heads: bool = False


def _sandwich(model_type: str) -> Family:
    return Family(
        model_type,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        adds_one=True,
        scales_embedding=True,
        width_of_heads=True,
    )


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", width_of_heads=True),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("gemma", adds_one=True, scales_embedding=True),
        _sandwich("gemma2"),
        _sandwich("gemma3_text"),
    )
}
"""Every family by its model type."""

_LAYER_NORM = (
    "its LayerNorm subtracts the mean, so pruned channels of the residual stream come back, and no stock class has an "
    "RMS norm in its place"
)
_REASONS = {
    **dict.fromkeys(
        ("bloom", "codegen", "cohere", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "olmo",
         "opt", "phi", "stablelm", "starcoder2"),
        _LAYER_NORM,
    ),
    "gemma3": (
        "it is the model with a vision tower. Load its text half with Gemma3ForCausalLM, save it, and prune that "
        "(gemma3_text)"
    ),
    "phi3": (
        "its query, key and value projections are fused in one, and gate and up in another. Split them and save the "
        "model as a mistral, which computes the same, and prune that"
    ),
}  # fmt: skip
_EXPERTS = (
    "it is a mixture of experts, whose experts and router are on no axis of a plan. Tune it unpruned, or prune a dense "
    "model"
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, by axis and beside.

    Attributes:
        hidden: Channels of the residual stream.
        ffn: Channels inside an MLP.
        kv_groups: Key/value heads.
        layers: Decoder layers.
        heads: Query heads.
        head_dim: Channels of a head.
    """

    hidden: int
    ffn: int
    kv_groups: int
    layers: int
    heads: int
    head_dim: int

    @property
    def queries(self) -> int:
        """Query heads of a group."""
        return self.heads // self.kv_groups


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The sizes that the config of a model says.

    Args:
        config: Of one of :data:`FAMILIES`.
    """
    # Qwen2 has no such field of its own, and none of the others needs one.
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return Sizes(
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        kv_groups=config.num_key_value_heads,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        head_dim=head_dim,
    )


def find_family(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Args:
        config: Its config.

    Raises:
        ModelError: It is none that can be pruned; says why where that is known, and what can be.
    """
    if family := FAMILIES.get(config.model_type):
        return family
    reason = _REASONS.get(config.model_type)
    if reason is None and any("expert" in name for name in config.to_dict()):
        reason = _EXPERTS
    raise ModelError(
        f"a model of type {config.model_type!r} cannot be pruned{f': {reason}' if reason else ''}. What can be: "
        f"{', '.join(sorted(FAMILIES))}."
    )


def writers(model: PreTrainedModel) -> list[str]:
    """Full names of the modules that write to the residual stream: embedding, attention outputs, MLP outputs.

    Args:
        model: Of one of :data:`FAMILIES`, without adapters around its modules.
    """
    return writer_names(model.config)


def writer_names(config: PreTrainedConfig) -> list[str]:
    """What :func:`writers` lists, from the config alone.

    Args:
        config: Of one of :data:`FAMILIES`.
    """
    find_family(config)
    layers = range(config.num_hidden_layers)
    return [EMBEDDING, *(f"{LAYERS}.{layer}.{name}" for layer in layers for name in (ATTENTION_OUT, DOWN))]
