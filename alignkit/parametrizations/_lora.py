"""LoRA adapters through PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from alignkit.bounded import slow_pattern
from alignkit.environment import launched_with_fsdp
from alignkit.errors import ConfigError, ModelError
from alignkit.models.attachment import Attachment, ParameterGroup
from alignkit.models.loading import REWARD_HEAD
from alignkit.models.vocabulary import embedding_modules
from alignkit.parametrizations._lora_start import start, starting_config

_SCAN = ("conv1d", "x_proj", "dt_proj", "out_proj")
_SCAN_AND_OUT = ("conv1d", "out_proj")
READ_FROM_OUTSIDE = {
    "mamba": _SCAN,
    "falcon_mamba": _SCAN,
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), _SCAN_AND_OUT),
    "jamba": ("conv1d", "dt_proj"),
}
"""By model type, the modules whose weights transformers hands to a state-space kernel instead of calling them."""

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
"""Kinds of module PEFT has a LoRA layer for."""


def check(config: Any) -> None:
    """Refuse a start on weights of which no process has all.

    Raises:
        ConfigError: Says what to write.
    """
    sharded = is_deepspeed_zero3_enabled() or launched_with_fsdp()
    if config.adapter is None and isinstance(config.init_lora_weights, str) and sharded:
        problem = (
            f"`init_lora_weights: {config.init_lora_weights}`: under ZeRO-3 and FSDP no process has whole weights "
            "before training. Launch with DDP or ZeRO-2, or write init_lora_weights: true"
        )
        raise ConfigError("the factors cannot start there in this launch", [problem])


def prepare(config: Any, model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of the adapter a run starts.

    Raises:
        ModelError: It names modules that the model does not have, or its rank is beyond them.
    """
    check_modules(model, config.lora_target_modules, config.lora_modules_to_save)
    check_rank(model, config.lora_r)
    left_out = unadaptable(model) if config.lora_target_modules == "all-linear" else {}
    if left_out and PartialState().is_main_process:
        for reason in dict.fromkeys(left_out.values()):
            names = ", ".join(sorted(name for name, why in left_out.items() if why == reason))
            print(f"lora_target_modules: all-linear leaves out {names}, which {reason}")
    adapter = lora_config(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        modules_to_save=[*config.lora_modules_to_save, *_of_new_tokens(config, model)],
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        exclude=list(left_out),
    )
    adapter = starting_config(config, adapter)
    return of_reward_model(adapter) if config.gives_rewards else adapter


def _of_new_tokens(config: Any, model: PreTrainedModel) -> list[str]:
    """Modules that train in full for the sake of new tokens."""
    found = embedding_modules(model) if config.new_tokens else []
    return [name for name in found if name not in config.lora_modules_to_save]


def of_reward_model(adapter: LoraConfig) -> LoraConfig:
    """The adapter of a model with a head of numbers, which is trained in full and saved beside it.

    Args:
        adapter: That of a causal language model; changed.
    """
    adapter.task_type = TaskType.SEQ_CLS
    adapter.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or ()), REWARD_HEAD]))
    return adapter


def go_on(config: Any, model: PeftModel) -> None:
    """Nothing: a loaded adapter trains as it is."""


def attach(config: Any, trainer: Any) -> Attachment | None:
    """Put new factors where they start; the learning rate of the factors B, where they have one of their own."""
    if config.adapter is None and isinstance(config.init_lora_weights, str):
        start(trainer.model, config.init_lora_weights, trainer.train_dataset)
    if config.loraplus_lr_ratio is None:
        return None
    return LoraPlus(trainer.model, trainer.args.learning_rate * config.loraplus_lr_ratio)


class LoraPlus(Attachment):
    """Trains the factors B faster than the factors A (Hayou et al. 2024, arXiv 2402.12354, section 4).

    Factors of embeddings keep the learning rate of the run.

    Args:
        model: The PEFT model.
        learning_rate: Of the factors B, at the top of the schedule.
    """

    def __init__(self, model: PeftModel, learning_rate: float) -> None:
        self.model, self.learning_rate = model, learning_rate

    def parameter_groups(self, total: int) -> Sequence[ParameterGroup]:
        """One group, decayed like other weights."""
        factors = [weight for name, weight in self.model.named_parameters() if ".lora_B." in name]
        return [ParameterGroup([weight for weight in factors if weight.requires_grad], self.learning_rate, decays=True)]


def lora_config(
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    use_rslora: bool = False,
    use_dora: bool = False,
    exclude: Sequence[str] = (),
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
        exclude: Modules that ``all-linear`` leaves out.
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
        exclude_modules=list(exclude) or None,
    )


def unadaptable(model: PreTrainedModel) -> dict[str, str]:
    """Linear modules that low-rank factors cannot be put on, with the reason; ``all-linear`` is to leave them out.

    Args:
        model: The base.
    """
    found = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and "Router" in type(module).__name__:
            found[last] = "routes tokens to experts, which is more than the product that factors could be added to"
        elif isinstance(module, ADAPTABLE) and last in READ_FROM_OUTSIDE.get(model.config.model_type, ()):
            found[last] = "a state-space kernel reads from outside, so that factors beside it would never be used"
    return found


def check_modules(
    model: PreTrainedModel, target_modules: str | Sequence[str], modules_to_save: Sequence[str] = ()
) -> None:
    """Check that every name leads to a module of the model; PEFT passes over those that do not, one in a list of many.

    Args:
        model: The base.
        target_modules: As in :func:`lora_config`.
        modules_to_save: As in :func:`lora_config`.

    Raises:
        ModelError: Names the unknown modules and those there are.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target_modules, str) and (slow := slow_pattern([target_modules], list(modules))):
        raise ModelError(f"lora_target_modules: {slow}. Write all-linear, or a list of names.")
    barred = unadaptable(model)
    adaptable = {
        name
        for name, module in modules.items()
        if isinstance(module, ADAPTABLE) and name.rpartition(".")[2] not in barred
    }
    problems = _barred(target_modules, barred, modules)
    head = model.get_output_embeddings()
    linear = [
        name for name in adaptable if isinstance(modules[name], (nn.Linear, Conv1D)) and modules[name] is not head
    ]
    if target_modules == "all-linear" and not linear:
        raise ModelError("the model has no linear layer that could take an adapter. Write parametrization: full.")
    if isinstance(target_modules, str):
        if target_modules != "all-linear" and not any(re.fullmatch(target_modules, name) for name in adaptable):
            problems.append(f"no module that can take an adapter matches lora_target_modules: {target_modules}")
    elif unknown := [name for name in target_modules if not _leads_to(name, adaptable) and not problems]:
        problems.append(f"lora_target_modules names {', '.join(unknown)}, which cannot take an adapter here")
    if unknown := [name for name in modules_to_save if not _leads_to(name, set(modules))]:
        problems.append(f"lora_modules_to_save names {', '.join(unknown)}, which the model does not have")
    if problems:
        kinds = sorted({name.rpartition(".")[2] for name in adaptable if modules[name] is not head})
        raise ModelError(f"{'; '.join(problems)}. Write all-linear, or names among {', '.join(kinds)}.")


def check_rank(model: PreTrainedModel, rank: int) -> None:
    """Check that adapters of this rank are not larger than every layer they could adapt.

    Args:
        model: The base.
        rank: ``lora_r``.

    Raises:
        ModelError: They are.
    """
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    widest = max((max(layer.in_features, layer.out_features) for layer in layers), default=rank)
    if rank > widest:
        raise ModelError(
            f"`lora_r: {rank}` is larger than the layers it adapts, whose sides have at most {widest}: a pair "
            f"of factors would hold more than the layer. Write a value well below {widest}, or parametrization: full."
        )


def _barred(target_modules: str | Sequence[str], barred: Mapping[str, str], modules: Iterable[str]) -> list[str]:
    """Say which of the modules asked for cannot take an adapter, and why."""
    if target_modules == "all-linear":
        return []
    if isinstance(target_modules, str):
        asked = {name.rpartition(".")[2] for name in modules if re.fullmatch(target_modules, name)}
    else:
        asked = {name.rpartition(".")[2] for name in target_modules}
    return [f"lora_target_modules asks for {name}, which {why}" for name, why in barred.items() if name in asked]


def _leads_to(name: str, modules: set[str]) -> bool:
    """Whether ``name`` is a module, or the last parts of the full name of one."""
    return any(full == name or full.endswith(f".{name}") for full in modules)
