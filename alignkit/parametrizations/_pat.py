"""Pruning-aware tuning: what a run of PAT puts on the model, and how its mask is formed (arXiv 2408.14721).

The adapter is :mod:`alignkit.models._pat_layers`, its equations :mod:`alignkit.models.mask_gate`. Up to the milestone
the mask is soft; there the channels with the largest logits are taken, exactly as many as will be left, and the rest of
the training has the narrow model. The task's loss reaches the mask through the gate; three terms are added to it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.environment import launched_with_fsdp
from alignkit.errors import CheckpointError, ConfigError, ModelError
from alignkit.models._pat_layers import MASK_UNIT, PatConfig, mask_of, sparsification_modules
from alignkit.models.attachment import Attachment, ParameterGroup
from alignkit.models.loading import is_quantized
from alignkit.models.mask_gate import Gate, active_loss, bimodality_loss, largest
from alignkit.parametrizations import _lora
from alignkit.pruning.families import writers
from alignkit.pruning.importance import importance
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.validate import next_width, target_config
from alignkit.storage.durability import write_whole

STATE = "pat.json"
SCORED_ROWS = 64
"""Training rows that importance is taken over; ours."""
MASK_START = 0.1
"""Logit, up and down, that a mask learnt from importance starts at: 2.5 % of a channel. Ours."""


def check(config: Any) -> None:
    """Refuse a launch that shards what the terms of the loss read.

    Raises:
        ConfigError: It is one of FSDP.
    """
    if launched_with_fsdp():
        why = (
            "`parametrization: pat` under FSDP: the terms that form its mask are taken outside the forward pass, in "
            "which alone FSDP gathers weights. Launch with DDP or a DeepSpeed ZeRO stage instead"
        )
        raise ConfigError("pat cannot be used in this launch", [why])


def prepare(config: Any, model: PreTrainedModel) -> PatConfig:
    """PEFT's configuration of the adapter a run starts.

    Raises:
        ModelError: The architecture has no plain form of the width asked for, or a layer that writes the residual
            stream gets no factors.
    """
    lora = _lora.prepare(config, model)
    channels = model.config.get_text_config().hidden_size
    width = next_width(model.config, channels - round(config.pat_hidden * channels))
    if width >= channels:
        raise ModelError(
            f"pat_hidden: {config.pat_hidden:g} would remove nothing: the next width that {type(model).__name__} of "
            f"{channels} hidden channels can have is {width}. Write a larger share, up to what `alignkit prune` lists."
        )
    target_config(PruningPlan(hidden=tuple(range(width))), _unquantized(model), keep_tied=config.pat_keep_tied)
    inputs = model.get_input_embeddings()
    layers = [name for name in writers(model) if model.get_submodule(name) is not inputs]
    _refuse_without_factors(lora, layers)
    if PartialState().is_main_process:
        print(f"pat: {channels} hidden channels become {width}")
    settings = {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
    if config.pat_weights == "full":
        settings |= {"r": 1, "lora_dropout": 0.0}
    return PatConfig(
        **settings,
        hsm_rank=config.pat_rank or math.ceil(0.05 * channels),
        hsm_form=config.pat_form,
        hsm_writers=layers,
        hsm_width=width,
        hsm_keep_tied=config.pat_keep_tied,
        whole_updates=config.pat_weights == "full",
        mask_trained=config.pat_mask != "frozen",
    )


def _unquantized(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of what is exported of it: of a base quantised for training, the weights that it stands for."""
    config: PreTrainedConfig = deepcopy(model.config)
    if is_quantized(model):
        del config.quantization_config
    return config


def _refuse_without_factors(lora: LoraConfig, layers: Sequence[str]) -> None:
    """PEFT makes a layer of its own, which a module can stand behind, where there are factors."""
    targets = lora.target_modules
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    if targets == "all-linear":
        return
    named = set() if isinstance(targets, str) else set(targets)
    if missing := [kind for kind in kinds if kind not in named]:
        raise ModelError(
            f"lora_target_modules leaves out {', '.join(missing)}, behind which PAT puts its modules. Write "
            f"all-linear, or a list of names that has {', '.join(kinds)}."
        )


def attach(config: Any, trainer: Any) -> PatTraining:
    """What forms the mask while the run trains."""
    training = PatTraining(config, trainer.model)
    if config.pat_mask != "zero":
        training.start_from(_importance(config, trainer))
    return training


class PatTraining(Attachment):
    """Moves the gate, adds the terms, and settles the mask at the milestone.

    Args:
        config: Options of ``pat``.
        model: The model with the adapter.
    """

    def __init__(self, config: Any, model: torch.nn.Module) -> None:
        self.config, self.model, self.mask = config, model, mask_of(model)
        self.is_released = config.pat_form == "released"
        given = config.pat_bimodality_coef
        self.bimodality_coef = float(self.is_released) if given is None else given
        self._looked_at: Tensor | None = None
        self._milestone: int | None = None
        self.persistent = (self,)

    def start_from(self, scores: Tensor) -> None:
        """Let the mask begin with the most important channels: slightly open, or chosen for good.

        Args:
            scores: [D], the same on every process.
        """
        chosen = largest(scores.to(self.mask.kept.device), self.mask.width)
        with torch.no_grad():
            if self.mask.is_trained:
                start = torch.where(chosen, MASK_START, -MASK_START) / MASK_UNIT
                self.mask.parameter.copy_(start)
            else:
                self.mask.chosen.copy_(chosen)

    def milestone(self, total: int) -> int:
        """Step from which the mask is hard; it stays where it was when a run is resumed for more steps than it had."""
        return int(self.config.pat_milestone_steps or total // 3) if self._milestone is None else self._milestone

    def before_step(self, step: int, total: int) -> None:
        """Put the gate where it belongs at this step; at the milestone, the mask becomes hard."""
        self._milestone = milestone = self.milestone(total)
        if milestone >= total:
            raise ModelError(
                f"pat_milestone_steps: {milestone} is not reached in a run of {total} steps: its mask would never be "
                "hard, and what is exported would not be what was trained. Write a smaller number; null takes a third."
            )
        self.mask.gate = Gate(step, milestone, self.config.pat_freeze_fraction)
        if step >= milestone and not self.mask.is_hard:
            self.mask.harden()
            _compare_over_ranks(self.mask.kept)
        if self._looked_at is None:
            self._looked_at = self.mask.would_keep()

    def terms(self) -> Mapping[str, Tensor]:
        """Identity over all modules; number and two-sidedness of the mask's logits until it is hard."""
        identity = sum(module(None) for _, module in sparsification_modules(self.model))
        terms = {"identity": self.config.pat_identity_coef * identity}
        if self.mask.is_trained:
            # Hard, the mask's parameter has the gradient zero and not none, which DistributedDataParallel waits for.
            weight = float(not self.mask.is_hard)
            logits = self.mask.logits()
            active = active_loss(logits, self.mask.width, released=self.is_released)
            terms["active"] = weight * self.config.pat_active_coef * active
            terms["bimodality"] = weight * self.bimodality_coef * bimodality_loss(logits)
        return terms

    def parameter_groups(self, total: int) -> Sequence[ParameterGroup]:
        """The mask's logits, which have a way of about 0.5 to go until the milestone."""
        if not self.mask.is_trained:
            return ()
        rate = self.config.pat_mask_learning_rate or 0.5 / max(self.milestone(total), 1)
        return [ParameterGroup([self.mask.parameter], rate / MASK_UNIT)]

    def metrics(self) -> Mapping[str, float]:
        """Open channels, how soft the mask still is, and the share of it that changed since the last line."""
        kept, before = self.mask.would_keep(), self._looked_at
        self._looked_at = kept
        logits = self.mask.stepped_logits() if self.mask.is_trained else None
        value = self.mask.at(logits)
        value = torch.ones_like(kept, dtype=torch.float32) if value is None else value
        is_open = kept if logits is None or self.mask.is_hard else logits > 0
        found = {
            "soft_distance": (value - kept.float()).abs().mean(),
            "mask_churn": (kept ^ (kept if before is None else before)).float().mean(),
            "open_channels": is_open.sum(),
        }
        return {f"pat/{name}": float(value) for name, value in found.items()}

    def save(self, directory: Path) -> None:
        """Write the milestone."""
        if PartialState().is_main_process:
            write_whole(directory / STATE, json.dumps({"milestone": self._milestone}) + "\n")

    def load(self, directory: Path) -> None:
        """Go on with it.

        Raises:
            CheckpointError: It is not there.
        """
        if not (file := directory / STATE).is_file():
            raise CheckpointError(f"{file} is missing: this checkpoint was written by another parametrisation than pat")
        self._milestone = json.loads(file.read_text())["milestone"]


def _importance(config: Any, trainer: Any) -> Tensor:
    """[D] scores of the hidden channels of the model before training, those of the first process."""
    if is_deepspeed_zero3_enabled():
        raise ModelError(
            "pat_mask: importance and frozen look at the whole model before training, of which ZeRO-3 leaves each "
            "process a part. Write pat_mask: zero, or launch with ZeRO-2."
        )
    device = trainer.accelerator.device
    batches = (
        {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": torch.ones(1, len(ids), device=device).long(),
        }
        for ids in _token_rows(trainer.train_dataset)
    )
    with trainer.model.disable_adapter():
        scores = importance(trainer.model.get_base_model(), batches, "activation").hidden
    found: Tensor = broadcast(scores.float().to(device))
    return found


def _token_rows(rows: Any) -> list[list[int]]:
    """Token ids of the first training rows, prompt and completion where these are apart."""
    return [ids for ids in map(_ids_of, islice(rows, SCORED_ROWS)) if ids]


def _ids_of(row: Mapping[str, Any]) -> list[int]:
    """The ids of a row of any shape: of candidates, the prompt with the first of them."""
    found: list[int] = []
    for name in ("input_ids", "prompt_ids", "completion_ids"):
        ids = row.get(name) or []
        found += ids[0] if ids and isinstance(ids[0], list) else ids
    return found


def _compare_over_ranks(kept: Tensor) -> None:
    """Refuse to go on with masks that differ between processes; a collective."""
    digest = hashlib.sha256(bytes(kept.cpu().to(torch.uint8).tolist())).hexdigest()
    if len(found := set(gather_object([digest]))) > 1:
        raise ModelError(f"the processes have settled on {len(found)} different masks: their weights are not the same.")
