"""In which process layouts and precisions a rule cannot be used; what is no matter of the config file alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.errors import ConfigError
from alignkit.gradients._weights import Trainable
from alignkit.gradients.rule import EditOptions, GradientRule


def check_supported(
    rule: GradientRule,
    options: Any,
    *,
    model: nn.Module,
    tensors: Sequence[Trainable],
    accelerator: Accelerator,
    args: TrainingArguments,
) -> None:
    """Refuse a run that the rule cannot work in, before it trains.

    Args:
        rule: The rule.
        options: Its options.
        model: The model, not wrapped.
        tensors: What of it trains.
        accelerator: Knows the process layout and the precision.
        args: The trainer's arguments.

    Raises:
        ConfigError: Lists what stands in the way.
    """
    name, problems = f"`gradient_rule: {rule.name}`", []
    if accelerator.distributed_type == DistributedType.FSDP:
        problems.append(f"{name} under FSDP has not been tried. Launch with DDP or a DeepSpeed ZeRO stage instead")
    if not tensors:
        problems.append(f"{name}: the model has no tensor that trains. Let something train, or remove the rule")
    if rule.edit is not None:
        if accelerator.mixed_precision == "fp16":
            problems.append(f"{name} with fp16: its gradients are taken without loss scaling. Use bf16 or float32")
        if args.n_gpu > 1:
            problems.append(f"{name}: one process drives {args.n_gpu} GPUs. Start with `accelerate launch`")
        if args.torch_compile:
            problems.append(f"{name}: a compiled model does not see displaced weights. Remove torch_compile")
        if is_deepspeed_zero3_enabled() and not isinstance(model, PeftModel):
            problems.append(
                f"{name} under ZeRO-3 without an adapter would gather the whole model on every process. Write "
                "parametrization: lora, or launch with ZeRO-2"
            )
    if isinstance(options, EditOptions) and options.rule_targets == "lora":
        if not any(tensor.is_lora for tensor in tensors):
            problems.append("`rule_targets: lora`: no LoRA factor trains. Write rule_targets: all")
    if problems:
        raise ConfigError("the gradient rule cannot be used in this run", problems)
