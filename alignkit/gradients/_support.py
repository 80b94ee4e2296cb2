"""In which process layouts and precisions a rule cannot be used; what is no matter of the config file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.environment import launched_with_fsdp
from alignkit.errors import ConfigError
from alignkit.gradients._weights import Trainable
from alignkit.parts.rule import EditOptions, GradientRule


@dataclass(frozen=True)
class RunLayout:
    """What a rule depends on and is known before a model is loaded.

    Attributes:
        is_fsdp: Whether the model is sharded by FSDP.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        is_compiled: Whether the model is compiled.
        num_gpus: GPUs that one process drives.
        deepspeed_config: The config of DeepSpeed, None where it is not at work.
    """

    is_fsdp: bool
    mixed_precision: str
    is_compiled: bool
    num_gpus: int
    deepspeed_config: Mapping[str, Any] | None

    @classmethod
    def of_arguments(cls, args: TrainingArguments) -> RunLayout:
        """The layout as the arguments of a run and the launcher have it."""
        return cls(
            is_fsdp=launched_with_fsdp(),
            mixed_precision=args.mixed_precision,
            is_compiled=args.torch_compile or TorchDynamoPlugin().backend != DynamoBackend.NO,
            num_gpus=args.n_gpu,
            deepspeed_config=None if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config,
        )

    @classmethod
    def of_accelerator(cls, accelerator: Accelerator, args: TrainingArguments) -> RunLayout:
        """The layout as it came out in a trainer."""
        uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        return cls(
            is_fsdp=accelerator.distributed_type == DistributedType.FSDP,
            mixed_precision=accelerator.mixed_precision,
            is_compiled=args.torch_compile or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            num_gpus=args.n_gpu,
            deepspeed_config=accelerator.state.deepspeed_plugin.deepspeed_config if uses_deepspeed else None,
        )


def check_layout(rule: GradientRule, layout: RunLayout, *, has_adapter: bool) -> None:
    """Refuse a run in whose layout the rule cannot work, before anything is loaded.

    Args:
        layout: Of the run.
        has_adapter: Whether an adapter trains rather than the model itself.

    Raises:
        ConfigError: Lists what stands in the way.
    """
    _refuse(_layout_problems(rule, layout, has_adapter=has_adapter))


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
        model: The model, not wrapped.
        tensors: What of it trains.
        accelerator: Knows the process layout and the precision.
        args: The trainer's arguments.

    Raises:
        ConfigError: Lists what stands in the way.
    """
    layout, has_adapter = RunLayout.of_accelerator(accelerator, args), isinstance(model, PeftModel)
    name, problems = _name(rule), _layout_problems(rule, layout, has_adapter=has_adapter)
    if not tensors:
        problems.append(f"{name}: the model has no tensor that trains. Let something train, or remove the rule")
    if (rule.decay is None and not has_adapter) or (rule.decay is not None and layout.deepspeed_config is None):
        low = {str(tensor.parameter.dtype) for tensor in tensors} & {"torch.bfloat16", "torch.float16"}
        if low:
            problems.append(
                f"{name}: what trains is held in {', '.join(sorted(low))}, whose rounding swallows steps as small as "
                "the rule's. Write dtype: float32 (bf16: true still computes in bfloat16)"
                + (", or gradient_rule: l2_sp, whose pull goes through the optimizer" if rule.decay else "")
            )
    if isinstance(options, EditOptions) and options.rule_targets != "all":
        if not any(tensor.is_lora for tensor in tensors):
            problems.append("`rule_targets: lora`: no LoRA factor trains. Write rule_targets: all")
    _refuse(problems)


def _name(rule: GradientRule) -> str:
    return f"`gradient_rule: {rule.name}`"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("the gradient rule cannot be used in this run", problems)


def _layout_problems(rule: GradientRule, layout: RunLayout, *, has_adapter: bool) -> list[str]:
    name, problems = _name(rule), []
    if layout.is_fsdp:
        problems.append(f"{name} under FSDP has not been tried. Launch with DDP or a DeepSpeed ZeRO stage instead")
    if rule.edit is not None:
        if layout.mixed_precision == "fp16":
            problems.append(f"{name} with fp16: its gradients are taken without loss scaling. Use bf16 or float32")
        if layout.num_gpus > 1:
            problems.append(f"{name}: one process drives {layout.num_gpus} GPUs. Start with `accelerate launch`")
        if layout.is_compiled:
            problems.append(
                f"{name}: a compiled model does not see displaced weights. Remove torch_compile, or the launcher's "
                "dynamo_backend"
            )
        if is_deepspeed_zero3_enabled() and not has_adapter:
            problems.append(
                f"{name} under ZeRO-3 without an adapter would gather the whole model on every process. Write "
                "parametrization: lora, or launch with ZeRO-2"
            )
    if rule.decay is not None and layout.deepspeed_config is not None:
        problems += [f"{name} {why}" for why in _stepped_elsewhere(layout.deepspeed_config)]
    return problems


def _stepped_elsewhere(deepspeed_config: Mapping[str, Any]) -> list[str]:
    """Ways to offload in which weights are stepped where the hook of the torch optimizer does not see them.

    As read in DeepSpeed 0.19.8. Plain offloading, to the processor or to NVMe, steps the one torch optimizer with the
    weights in place, and so does every ZeRO stage without offloading.
    """
    # Slow to import, and only wanted where DeepSpeed is at work anyway.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    zero, problems = DeepSpeedZeroConfig(**deepspeed_config["zero_optimization"]), []
    if offload := zero.offload_optimizer:
        if offload.super_offload and zero.stage == 3:
            problems.append(
                "with `super_offload: true` of DeepSpeed: another process steps the weights. Remove super_offload"
            )
        elif offload.device != OffloadDeviceEnum.none and offload.ratio < 1:
            problems.append(
                f"with `ratio: {offload.ratio}` in DeepSpeed's offload_optimizer: a second optimizer steps what is not "
                "offloaded. Remove ratio, which offloads all of it"
            )
    if zero.zenflow is not None:
        problems.append(
            "with `zenflow` of DeepSpeed: optimizers of its own step the weights, partly in another process. Remove "
            "zenflow"
        )
    return problems
