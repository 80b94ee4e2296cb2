"""How many numbers of a model may move, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

ROUTERS = ("gate", "router", "shared_expert_gate")
"""What the module is called that chooses the experts of a token, in a model that has experts."""


@dataclass(frozen=True)
class TrainableReport:
    """How many numbers may move, and in which kinds of module.

    Attributes:
        trainable, total: Parameter counts of the whole (unsharded) model.
        by_module: Trainable parameters by the last meaningful part of the module name.
        by_block: The same by kind of block: ``attention``, ``mlp``, ``experts``, ``router``, ``embedding``, ``head``,
            ``other``.
    """

    trainable: int
    total: int
    by_module: dict[str, int]
    by_block: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        text = f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %): {_listed(self.by_module)}"
        if len(self.by_block) > 1:
            text += f"\n  by kind of block: {_listed(self.by_block)}"
        if "router" in self.by_block and len(self.by_block) > 1:
            text += (
                "\n  routers, which choose the experts, are among them: to leave them as they are, list other modules"
            )
        return text


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count the trainable parameters of ``model``; ZeRO-3 partitions and packed 4-bit weights count in full."""
    modules: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    trainable = total = 0
    parameters = list(model.named_parameters())
    has_experts = any("experts" in name.split(".") for name, _ in parameters)
    for name, parameter in parameters:
        size = _size(parameter)
        total += size
        if parameter.requires_grad:
            trainable += size
            modules[_module_kind(name)] += size
            blocks[_block_kind(name, has_experts=has_experts)] += size
    return TrainableReport(trainable, total, dict(modules.most_common()), dict(blocks.most_common()))


def _size(parameter: nn.Parameter) -> int:
    """Numbers a parameter stands for: bitsandbytes packs two of 4 bits in a byte, DeepSpeed leaves a part here."""
    own = vars(parameter)
    if own.get("quant_state") is not None:
        return int(own["quant_state"].shape.numel())
    return int(own.get("ds_numel", parameter.numel()))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _block_kind(parameter_name: str, *, has_experts: bool) -> str:
    """Kind of the block a parameter belongs to, by the names of the modules around it."""
    parts = parameter_name.split(".")
    if has_experts and _module_kind(parameter_name) in ROUTERS:
        return "router"
    kinds = {
        "head": ("lm_head", "embed_out", "output_projection", "score"),
        "experts": ("expert",),
        "attention": ("attn", "attention"),
        "mlp": ("mlp", "feed_forward", "ffn", "fc1", "fc2"),
        "embedding": ("embed", "wte", "wpe"),
    }
    return next((kind for kind, words in kinds.items() if any(w in p for p in parts for w in words)), "other")


def _module_kind(parameter_name: str) -> str:
    ignored = {"weight", "bias", "default", "base_layer", "original_module", "modules_to_save"}
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    parts = [p for p in parameter_name.split(".") if p not in ignored and not p.startswith(prefixes)]
    return parts[-1] if parts else parameter_name
