"""The arguments of a run's trainer, and what of them cannot work on this machine or in this launch."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from alignkit.config.base import ProgramConfig
from alignkit.config.check import in_force
from alignkit.config.kernels import needs_accelerator
from alignkit.config.keys import base_keys
from alignkit.config.optimizers import MUON
from alignkit.environment import launched_precision, launched_with_deepspeed, launched_with_fsdp
from alignkit.errors import ConfigError
from alignkit.gradients._support import RunLayout, check_layout
from alignkit.models.choices import Choice, pinned
from alignkit.models.precision import mixed_bfloat16
from alignkit.parametrizations._policy import weights_dtype
from alignkit.parts.parametrization import load_half, load_parametrization
from alignkit.parts.rule import load_rule

MOST_STEPS = 10**9


def training_arguments(config: ProgramConfig, bridge: ModuleType, choices: dict[str, Choice]) -> Any:
    """The arguments of the host's trainer; creating them sets up the processes too (and ZeRO-3, before a model loads).

    Args:
        bridge: That of the batch shape (:func:`~alignkit.parts.shape.load_bridge`).
        choices: What the run chooses by itself; what is decided here is added. A resumed run finds its own here.

    Raises:
        ConfigError: The config needs an accelerator and there is none, does not fit the launcher, or has options that
            PEFT does not know.
    """
    args = bridge.training_arguments(config, common_arguments(config))
    # A batch that comes from pinned memory need not wait for what the device has still to do.
    args.accelerator_config.non_blocking = args.dataloader_pin_memory
    check_device(config, args)
    check_gradient_rule(config, args)
    check_optimizer(config)
    load_half(load_parametrization(config.parametrization)).check(config)
    return args


def common_arguments(config: ProgramConfig) -> dict[str, Any]:
    """The arguments that TRL's trainers have in common."""
    values = in_force(config)
    return {
        **{name: values[name] for name, key in base_keys(config.program).items() if key.info.passes_to_trainer},
        "bf16": mixed_bfloat16(config)[0],
        **_optimizer(config),
        # auto is settled once the lengths of the rows are known.
        "gradient_checkpointing": config.gradient_checkpointing is True,
        "prediction_loss_only": True,
        # CheckpointGuard deletes old checkpoints, after the new one is known to be complete.
        "save_total_limit": None,
        "save_only_model": False,
        # A loss that is not finite must be seen, not averaged away.
        "logging_nan_inf_filter": False,
        "ignore_data_skip": False,
    }


def _optimizer(config: ProgramConfig) -> dict[str, Any]:
    """The optimizer with its settings, as transformers takes them; Muon, which it has not, is told to the bridge."""
    given = config.optim_args or {}
    is_muon = config.optim == MUON
    settings = {MUON: True, **given} if is_muon else given
    told = ",".join(f"{name}={str(value).lower()}" for name, value in settings.items())
    return {"optim": "adamw_torch" if is_muon else config.optim, "optim_args": told or None}


def fitted(config: Any, choices: dict[str, Choice]) -> Any:
    """The configuration with the precisions that fit the machine and the launch in place of ``auto`` and null.

    Args:
        choices: Those of the run when it began, where it is resumed; the one made here is added.

    Raises:
        ConfigError: The precision cannot be had, the launcher's file says another one, or the run began in another one.
    """
    check_bf16(config)
    check_launcher(config)
    before, (in_bfloat16, reason) = choices.get("bf16"), mixed_bfloat16(config)
    if config.bf16 != "auto":
        choices["bf16"] = pinned("bf16", in_bfloat16)
    elif before is not None and before.value and not in_bfloat16:
        problem = f"`bf16: auto` was bfloat16 when the run began, and is not here: {reason}. Resume it where it began"
        raise ConfigError("the run would go on in another precision", [problem])
    elif before is None:
        choices["bf16"] = Choice("bf16", in_bfloat16, reason)
    config = dataclasses.replace(config, bf16=choices["bf16"].value)
    return dataclasses.replace(config, dtype=weights_dtype(config))


def check_launcher(config: Any) -> None:
    """Refuse a precision that is not the one of the launcher's file.

    Raises:
        ConfigError: Two are asked for.
    """
    stated = launched_precision()
    written = "fp16" if config.fp16 else {True: "bf16", False: "no"}.get(config.bf16)
    if None not in (stated, written) and stated != written:
        given = "fp16: true" if config.fp16 else f"bf16: {str(config.bf16).lower()}"
        why = f"the launcher's file says {stated}, and a run has one mixed precision"
        fix = "Write bf16: auto, which follows it, or change mixed_precision (of a DeepSpeed file, bf16) there"
        raise ConfigError("config and launcher ask for two precisions", [f"`{given}`: {why}. {fix}"])


def check_bf16(config: ProgramConfig) -> None:
    """Refuse bfloat16 mixed precision where transformers would, before it does so with a traceback.

    Raises:
        ConfigError: There is no accelerator for it, and the CPU has not been chosen.
    """
    if (
        config.bf16 is True
        and not config.use_cpu
        and not is_torch_bf16_gpu_available()
        and not is_torch_xla_available()
    ):
        problem = "`bf16: true` on the CPU has to be asked for. Write use_cpu: true as well, or remove bf16"
        raise ConfigError("torch finds no accelerator with bfloat16 on this machine", [problem])


def check_device(config: ProgramConfig, args: TrainingArguments) -> None:
    """Refuse what needs an accelerator where there is none.

    Raises:
        ConfigError: Lists it.
    """
    if args.device.type != "cpu":
        return
    problems = []
    if config.fp16:
        advice = "Write bf16: true and use_cpu: true, or remove it"
        problems.append(f"`fp16: true`: float16 mixed precision needs an accelerator. {advice}")
    adapter = None if config.adapter is None else LoraConfig.from_pretrained(config.adapter)
    if config.quantization == "int8" and (config.use_dora or (adapter is not None and adapter.use_dora)):
        why = "PEFT measures unpacked weights, and int8 weights are unpacked on an accelerator alone"
        named = "`use_dora: true`" if adapter is None else f"`adapter: {config.adapter}`, which has use_dora,"
        advice = "Write quantization: nf4 or none" + (", or remove use_dora" if adapter is None else "")
        problems.append(f"{named} with `quantization: int8`: {why}. {advice}")
    if config.kernels == "liger":
        advice = "Write kernels: none or compile"
        problems.append(f"`kernels: liger`: its kernels are written in Triton, which needs a CUDA device. {advice}")
    if needs_accelerator(config.attn_implementation):
        kernel = f"`attn_implementation: {config.attn_implementation}`"
        problems.append(f"{kernel}: it has no backward pass on the CPU. Write attn_implementation: sdpa")
    if problems:
        raise ConfigError("training runs on the CPU: torch finds no accelerator on this machine", problems)


def check_optimizer(config: ProgramConfig) -> None:
    """Refuse an optimizer that reads whole matrices where the launch cuts them up.

    Raises:
        ConfigError: Says what to write.
    """
    if config.optim == MUON and (launched_with_deepspeed() or launched_with_fsdp()):
        problem = (
            "`optim: muon`: DeepSpeed and FSDP hand an optimizer parts of weights, and Muon needs whole matrices. "
            "Write optim: adamw_torch, or launch with DDP (configs/accelerate/ddp.yaml)"
        )
        raise ConfigError("the optimizer cannot work in this launch", [problem])


def check_length(
    config: ProgramConfig, args: TrainingArguments, rows: Dataset | IterableDataset, bridge: ModuleType
) -> None:
    """Refuse a share of the rows that is no step, and more steps than a run can take.

    Args:
        args: The trainer's arguments.
        rows: The training rows, as the trainer takes them; those of a stream are not counted.
        bridge: That of the batch shape.

    Raises:
        ConfigError: Says how many steps it would be.
    """
    if config.max_steps > 0 or not isinstance(rows, Dataset):
        return
    an_epoch = math.ceil(bridge.batches_an_epoch(args, len(rows)) / args.gradient_accumulation_steps)
    steps = config.num_train_epochs * an_epoch
    given = f"`num_train_epochs: {config.num_train_epochs:g}` of {an_epoch:,} steps each is"
    if 0 < steps < 1:
        problem = f"{given} less than one step. Write at least {1 / an_epoch:.3g}, or max_steps: 1"
    elif steps > MOST_STEPS:
        problem = f"{given} {steps:.3g} steps, which no run takes. Write a smaller number, or max_steps"
    else:
        return
    raise ConfigError("the length of the run cannot be meant", [problem])


def check_gradient_rule(config: ProgramConfig, args: TrainingArguments) -> None:
    """Refuse a gradient rule that cannot work as the run was launched, before hours are spent on its rows.

    Raises:
        ConfigError: Lists what stands in the way.
    """
    if config.gradient_rule is not None:
        has_adapter = load_parametrization(config.parametrization).has_adapter
        check_layout(load_rule(config.gradient_rule), RunLayout.of_arguments(args), has_adapter=has_adapter)
