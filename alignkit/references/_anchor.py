"""A reference that follows the policy, for full fine-tuning (a second model) and for PEFT (a second adapter).

The anchor of a PEFT policy is the adapter ``ref``, TRL's name for a frozen copy; its tensors are paired with the
policy's by name, ``modules_to_save`` included. What an anchor has become is saved in every checkpoint and restored on
resuming, under DeepSpeed too.

Upstream names relied on: ``deepspeed.zero.GatheredParameters`` and the ``ds_id`` attribute of partitioned parameters;
PEFT's ``add_adapter`` and parameter names with ``.default.``.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import CheckpointError
from alignkit.losses.types import Metric
from alignkit.models.full_rank import settle
from alignkit.models.metric_sums import MetricSums
from alignkit.parts.method import AnchorSchedule

WEIGHTS_FILE, STATE_FILE = "anchor.safetensors", "anchor.json"
POLICY, ANCHOR = "default", "ref"
"""Adapter names of a PEFT policy and its anchor."""


def add_anchor_adapter(model: PeftModel) -> None:
    """Give a PEFT model a frozen copy of its adapter, unless it has one."""
    if ANCHOR in model.peft_config:
        return
    model.add_adapter(ANCHOR, model.peft_config[POLICY])
    settle(model)
    with torch.no_grad():
        for policy, anchor in _adapter_pairs(model).values():
            with _whole(anchor, policy) as may_write:
                if may_write:
                    anchor.copy_(policy)
    model.set_adapter(POLICY)


class MovingAnchor(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Moves the reference after every optimizer step, as its schedule says.

    Args:
        schedule: When and how far.
        accelerator: Of the trainer, for the mean drift over ranks.
        policy: The policy, unwrapped.
        anchor: The reference model, unwrapped; None when it is an adapter of the policy.
    """

    def __init__(
        self, schedule: AnchorSchedule, accelerator: Accelerator, policy: nn.Module, anchor: nn.Module | None
    ) -> None:
        self.schedule, self.accelerator = schedule, accelerator
        self._drift = MetricSums()
        self._recent: deque[float] = deque(maxlen=schedule.window)
        self._exact: dict[str, Tensor] = {}
        if isinstance(policy, PeftModel) and anchor is None:
            self._pairs = _adapter_pairs(policy)
        else:
            assert anchor is not None
            anchors = dict(anchor.named_parameters())
            self._pairs = {name: (p, anchors[name]) for name, p in policy.named_parameters() if p.requires_grad}

    def observe(self, drift: Metric) -> None:
        """Add the drift of one micro-batch."""
        if self.schedule.kind == "kl_triggered":
            self._drift.add("drift", drift)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Warn of an anchor that will not move."""
        if PartialState().is_main_process and (problem := still(self.schedule, state.max_steps)):
            print(problem)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Move the anchor if its time has come."""
        schedule = self.schedule
        if schedule.kind == "ema":
            self._move(1.0 - schedule.decay)
        elif schedule.kind == "periodic":
            if state.global_step % schedule.steps == 0:
                self._move(1.0)
        else:
            self._recent.extend(self._drift.means(self.accelerator).values())
            if len(self._recent) == schedule.window and sum(self._recent) / schedule.window > schedule.threshold:
                self._move(1.0)
                self._recent.clear()

    def save(self, directory: Path) -> None:
        """Write what the anchor has become; a collective."""
        tensors: dict[str, Tensor] = {}
        for name, (_, anchor) in self._pairs.items():
            with _whole(anchor):
                if PartialState().is_main_process:
                    tensors[name] = self._exact.get(name, anchor).detach().cpu().clone().contiguous()
        if PartialState().is_main_process:
            save_file(tensors, directory / WEIGHTS_FILE)
            (directory / STATE_FILE).write_text(json.dumps({"recent_drift": list(self._recent)}), encoding="utf-8")

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Go on with the anchor of a checkpoint; a collective.

        Raises:
            CheckpointError: It holds none.
        """
        path = directory / WEIGHTS_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{directory} holds no {WEIGHTS_FILE}: it was saved without a moving anchor. Resume with the anchor "
                "it was trained with, or start again."
            )
        tensors = load_file(path)
        self._exact.clear()
        for name, (_, anchor) in self._pairs.items():
            with _whole(anchor) as may_write:
                if may_write:
                    anchor.copy_(tensors[name])
                    if tensors[name].dtype != anchor.dtype:
                        self._exact[name] = tensors[name].to(anchor.device)
        self._recent.clear()
        self._recent.extend(json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))["recent_drift"])

    @torch.no_grad()
    def _move(self, share: float) -> None:
        """anchor <- anchor + share * (policy - anchor); a collective."""
        for name, (policy, anchor) in self._pairs.items():
            with _whole(anchor, policy) as may_write:
                if may_write and share == 1.0:
                    anchor.copy_(policy)
                elif may_write:
                    average = self._average(name, anchor)
                    average.lerp_(policy.to(average.dtype), share)
                    anchor.copy_(average)

    def _average(self, name: str, anchor: Tensor) -> Tensor:
        """What the average is taken in: the anchor, or a float32 copy of one whose precision would round steps away.

        DeepSpeed casts what trains, and the anchor with it, to half precision when training begins.
        """
        if anchor.dtype not in (torch.float16, torch.bfloat16):
            return anchor.detach()
        if name not in self._exact:
            self._exact[name] = anchor.detach().float()
        return self._exact[name]


def still(schedule: AnchorSchedule, max_steps: int) -> str | None:
    """A warning where an anchor cannot move before the last step of a run; otherwise None.

    Args:
        schedule: When it moves.
        max_steps: Optimizer steps of the run.
    """
    if schedule.kind == "ema":
        return None
    key, first = ("anchor_steps", schedule.steps) if schedule.kind == "periodic" else ("anchor_window", schedule.window)
    if first < max_steps:
        return None
    return (
        f"warning: anchor: {schedule.kind} never moves in this run: {key} is {first}, and the run has {max_steps} "
        f"steps. Write {key} below {max_steps}, or anchor: fixed."
    )


def _adapter_pairs(model: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Policy and anchor tensors of a PEFT model by the policy's name; ``modules_to_save`` included."""
    parameters = dict(model.named_parameters())
    return {
        name: (parameter, parameters[name.replace(f".{POLICY}", f".{ANCHOR}")])
        for name, parameter in parameters.items()
        if f".{POLICY}." in f"{name}."
    }


@contextlib.contextmanager
def _whole(anchor: nn.Parameter, policy: nn.Parameter | None = None) -> Iterator[bool]:
    """Gather what ZeRO-3 has partitioned; yields whether this process writes the anchor (others then receive it)."""
    with contextlib.ExitStack() as stack:
        if policy is not None and _is_partitioned(policy):
            stack.enter_context(_gathered(policy, None))
        if _is_partitioned(anchor):
            stack.enter_context(_gathered(anchor, 0))
            yield PartialState().is_main_process
        else:
            yield True


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return "ds_id" in vars(parameter)


def _gathered(parameter: nn.Parameter, modifier_rank: int | None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)
