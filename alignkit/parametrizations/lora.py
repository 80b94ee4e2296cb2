"""LoRA adapters through PEFT."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from alignkit.errors import ModelError

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
"""Kinds of module PEFT has a LoRA layer for."""


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


def check_modules(model: nn.Module, target_modules: str | Sequence[str], modules_to_save: Sequence[str] = ()) -> None:
    """Check that every name leads to a module of the model; PEFT passes over those that do not, one in a list of many.

    Args:
        model: The base.
        target_modules: As in :func:`lora_config`.
        modules_to_save: As in :func:`lora_config`.

    Raises:
        ModelError: Names the unknown modules and those there are.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    adaptable = {name for name, module in modules.items() if isinstance(module, ADAPTABLE)}
    problems = []
    if isinstance(target_modules, str):
        if target_modules != "all-linear" and not any(re.fullmatch(target_modules, name) for name in adaptable):
            problems.append(f"no module that can take an adapter matches lora_target_modules: {target_modules}")
    elif unknown := [name for name in target_modules if not _leads_to(name, adaptable)]:
        problems.append(f"lora_target_modules names {', '.join(unknown)}, which cannot take an adapter here")
    if unknown := [name for name in modules_to_save if not _leads_to(name, set(modules))]:
        problems.append(f"lora_modules_to_save names {', '.join(unknown)}, which the model does not have")
    if problems:
        kinds = sorted({name.rpartition(".")[2] for name in adaptable})
        raise ModelError(f"{'; '.join(problems)}. Write all-linear, or names among {', '.join(kinds)}.")


def _leads_to(name: str, modules: set[str]) -> bool:
    """Whether ``name`` is a module, or the last parts of the full name of one."""
    return any(full == name or full.endswith(f".{name}") for full in modules)


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
