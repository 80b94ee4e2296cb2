"""LoRA adapters through PEFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig
from torch import nn


def lora_config(
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    use_rslora: bool = False,
    use_dora: bool = False,
) -> LoraConfig:
    """A PEFT configuration for a causal language model.

    Args:
        r: Rank of the update.
        alpha: Scale; the update is multiplied by ``alpha / r`` (``alpha / sqrt(r)`` with ``use_rslora``).
        dropout: Dropout on the adapter's input.
        target_modules: ``all-linear``, one suffix, or several.
        modules_to_save: Modules trained in full and saved with the adapter.
        use_rslora: Rank-stabilised scaling.
        use_dora: Weight-decomposed LoRA.
    """
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=list(modules_to_save) or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )


@dataclass(frozen=True)
class TrainableReport:
    """How many numbers may move, and in which kinds of module.

    Attributes:
        trainable, total: Parameter counts of the whole (unsharded) model.
        by_module: Trainable parameters by the last meaningful part of the module name.
    """

    trainable: int
    total: int
    by_module: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        parts = ", ".join(f"{name} {count:,}" for name, count in self.by_module.items())
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %): {parts}"


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count the trainable parameters of ``model`` by kind of module; ZeRO-3 partitions count in full."""
    counts: Counter[str] = Counter()
    trainable = total = 0
    for name, parameter in model.named_parameters():
        size = vars(parameter).get("ds_numel", parameter.numel())
        total += size
        if parameter.requires_grad:
            trainable += size
            counts[_module_kind(name)] += size
    return TrainableReport(trainable, total, dict(counts.most_common()))


def _module_kind(parameter_name: str) -> str:
    ignored = {"weight", "bias", "default", "base_layer", "original_module", "modules_to_save"}
    parts = [p for p in parameter_name.split(".") if p not in ignored and not p.startswith("lora_")]
    return parts[-1] if parts else parameter_name
