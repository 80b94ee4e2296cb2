"""``gradient_checkpointing: auto``: off where the longest rows fit without it, by the estimate and one measured batch.

It costs a third of a step, so it is not wanted where memory is enough; and whether it is enough is decided by the
longest rows, which may come after days. Trainers read the switch in their constructors. It is decided from the estimate
before, and switched on after where a micro-batch of the longest rows shows that the estimate was too low.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from peft import PeftModel

from alignkit.data.lengths import RowLengths
from alignkit.errors import ModelError
from alignkit.models._comparison import runs_only_in_training
from alignkit.models.choices import Choice, model_shape, pinned, remember, remembered
from alignkit.models.wrapping import base_model
from alignkit.runs.memory import GIB, Launch, Plan, has_tokens, knobs

KEY = "gradient_checkpointing"
NEAR = 1.25
"""An estimate within this factor of what there is is measured."""
RESERVE = 1.5 * GIB
"""Of a device, for what no tensor shows: the context, workspaces of libraries, gaps between what is allocated."""


@dataclass(frozen=True)
class Decision:
    """Whether activations are computed again.

    Attributes:
        value: As far as the estimate goes.
        reason: Why, in one clause.
        is_near: Whether the estimate is too near to the limit to be believed.
    """

    value: bool
    reason: str
    is_near: bool = False


def decide(kept: int, free: int | None, *, on_cpu: bool) -> Decision:
    """Whether a run needs checkpointing.

    Args:
        kept: Bytes that a step over the longest rows takes without it, by the estimate.
        free: Bytes there are for all of the run; None where that is not known.
        on_cpu: Whether it is the memory of the host: what is short there is short at once, and nothing is measured.
    """
    if free is None:
        return Decision(not on_cpu, "how much memory there is is not known")
    found = f"a step over the longest rows takes {kept / GIB:.1f} of {free / GIB:.1f} GiB without it"
    if on_cpu:
        return Decision(kept > free, found)
    near = free / NEAR < kept < free * NEAR
    return Decision(kept >= free * NEAR, found, near)


def chosen(config: Any, args: Any, data: Any, choices: dict[str, Choice]) -> Plan | None:
    """Settle the switch in the trainer's arguments, before anything reads it; a collective.

    Args:
        config: The run's, with precisions settled.
        args: The trainer's arguments; changed.
        data: ``train`` and ``evaluation``, tokenised.
        choices: What has been chosen already; the choice is added. A resumed run finds its own there.

    Returns:
        What was estimated, where the decision is still to be confirmed by :func:`confirm`.
    """
    if config.gradient_checkpointing != "auto":
        choices[KEY] = pinned(KEY, config.gradient_checkpointing)
    elif KEY not in choices:
        return _estimated(config, args, data, choices)
    set_switch(args, bool(choices[KEY].value))
    return None


def set_switch(args: Any, value: bool) -> None:
    """Set the switch in arguments that are made already, under both of the names that are read.

    TRL reads the first and transformers the second, which it copies from the first when arguments are made.
    """
    args.gradient_checkpointing = args.activation_checkpointing = value


def _estimated(config: Any, args: Any, data: Any, choices: dict[str, Choice]) -> Plan | None:
    start, on_cpu = time.monotonic(), args.device.type == "cpu"
    free = least_free(args.device)
    try:
        plan = Plan.at_best(config, Launch.of_arguments(args), data.train, data.evaluation)
        decision = decide(plan.estimate(checkpointing=False).peak, free, on_cpu=on_cpu)
    except ModelError as error:
        plan, decision = None, Decision(not on_cpu, str(error).partition(".")[0])
    set_switch(args, decision.value)
    choices[KEY] = Choice(KEY, decision.value, decision.reason, time.monotonic() - start)
    return None if on_cpu else plan


def confirm(trainer: Any, plan: Plan | None, choices: dict[str, Choice]) -> None:
    """Look again once the trainer is built: at the layout it took, and, if it is near, at a real micro-batch.

    A collective.

    Args:
        trainer: Its policy is on its device.
        plan: What :func:`chosen` returned.
        choices: Of the run; changed where the decision is another one.
    """
    if plan is None:
        return
    start = time.monotonic()
    plan, free = plan.after(choices | _layout_of(trainer)), least_free(trainer.accelerator.device)
    if not trainer.args.gradient_checkpointing:
        kept = plan.estimate(checkpointing=False)
        decision = decide(kept.peak, free, on_cpu=False)
        if decision.is_near or not (kept.is_exact or decision.value):
            decision = _measured(trainer, decision, kept.parts.get("optimizer", 0), free)
        choices[KEY] = Choice(KEY, decision.value, decision.reason, choices[KEY].seconds + time.monotonic() - start)
        if decision.value:
            switch_on(trainer)
    warn_if_short(plan, free, checkpointing=bool(choices[KEY].value), says=trainer.is_world_process_zero())


def _layout_of(trainer: Any) -> dict[str, Choice]:
    """The layout that a trainer has taken, which is told once the run is described."""
    layout = vars(trainer).get("layout")
    return {} if layout is None else {"layout": layout.as_choice()}


def warn_if_short(plan: Plan, free: int | None, *, checkpointing: bool, says: bool) -> None:
    """Say that the longest rows will not fit, and what would make them."""
    if free is None or (needed := plan.estimate(checkpointing=checkpointing)).peak <= free or not says:
        return
    found = [str(knob) for knob in knobs(plan, free, checkpointing=checkpointing)][:3]
    advice = f"Write {'; or '.join(found)}" if found else "No single key makes it fit: take a smaller model"
    print(
        f"warning: a step over the longest rows is estimated at {needed.peak / GIB:.1f} GiB ({needed.where}), and the "
        f"device has {free / GIB:.1f}. {advice}."
    )


# --- what is measured -------------------------------------------------------------------------------------------------


def _measured(trainer: Any, decision: Decision, optimizer: int, free: int | None) -> Decision:
    """One micro-batch of the longest rows, forwards and backwards; nothing of the run is changed by it."""
    if runs_only_in_training(trainer) or trainer.is_deepspeed_enabled or not has_tokens(trainer.train_dataset):
        return Decision(True, f"{decision.reason}, and it cannot be measured before training")
    facts = _facts(trainer)
    if (peak := remembered(facts)) is None and (peak := peak_of_longest_rows(trainer)) is not None:
        remember(facts, peak)
    short = peak is None or (free is not None and peak + optimizer > free)
    if any(gather_object([short])):
        return Decision(True, "a micro-batch of the longest rows did not fit without it")
    assert peak is not None and free is not None
    return Decision(
        False, f"the longest rows took {(peak + optimizer) / GIB:.1f} of {free / GIB:.1f} GiB without it, measured"
    )


def _facts(trainer: Any) -> dict[str, Any]:
    """All that the peak of a micro-batch of the longest rows depends on, beside the machine."""
    base, rows = base_model(trainer.model), longest_rows(trainer)
    lengths = RowLengths.of(rows)
    return {
        "what": "peak of the longest rows",
        **model_shape(base),
        "trained": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "objective": [type(trainer).__name__, trainer.method.name],
        "sequences": lengths.longest.tolist(),
        "packed": lengths.each_packed.tolist(),
        "layout": [choice.value for choice in _layout_of(trainer).values()],
        "kernels": [choice.value for key, choice in trainer.choices.items() if key == "kernels"],
        "precision": trainer.accelerator.mixed_precision,
    }


def peak_of_longest_rows(trainer: Any) -> int | None:
    """Bytes at the highest point of a forward and a backward pass over the longest rows; None if they do not fit."""
    device = trainer.accelerator.device
    rows = longest_rows(trainer)
    _reset_peak(device)
    try:
        with _untouched(trainer):
            batch = send_to_device(trainer.data_collator(rows), device)
            with trainer.compute_loss_context_manager():
                loss = trainer.batch_loss(trainer.model, batch, None, record=False)
            trainer.accelerator.backward(loss)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    # What was computed has gone with the frame of the error.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _peak(device) if fits else None


def longest_rows(trainer: Any) -> list[Any]:
    """A micro-batch of the longest training rows."""
    lengths, size = RowLengths.of(trainer.train_dataset), trainer.args.per_device_train_batch_size
    packed = any(choice.value != "padded" for choice in _layout_of(trainer).values())
    each = lengths.each_packed if packed else lengths.longest
    order = np.argsort(each)[::-1]
    budget = getattr(trainer, "tokens_per_batch", None)
    if budget is not None:
        size = max(1, int(np.searchsorted(np.cumsum(each[order]), budget, side="right")))
    return [trainer.train_dataset[int(i)] for i in order[:size]]


@contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Afterwards the model, its gradients and the random state are what they were."""
    model, device = trainer.model, trainer.accelerator.device
    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
            for parameter in model.parameters():
                parameter.grad = None


def switch_on(trainer: Any) -> None:
    """Have a trainer that was built without it compute activations again; transformers begins with it in ``train``."""
    args = trainer.args
    set_switch(args, True)
    if isinstance(trainer.model, PeftModel):
        if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
            # As TRL's constructors do.
            how = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
            args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = how
        trainer.model.enable_input_require_grads()


# --- the device -------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can have on a device, those it holds included; None where nothing says so."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - RESERVE)
    if device.type == "xpu":
        free, _ = torch.xpu.mem_get_info(device)
        return int(free + torch.xpu.memory_reserved(device) - RESERVE)
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.is_file():
        return None
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def least_free(device: torch.device) -> int | None:
    """What the process with the least has, so that all decide alike; a collective."""
    known = [each for each in gather_object([free_memory(device)]) if each is not None]
    return min(known, default=None)


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
