"""ATP in a run: decisions are learnt beside the adapter, settled once, and the adapter's share of what goes fades out.

One step of the control phase (algorithm of the authors' code): a calibration batch goes through the model outside
training mode under soft masks, and the generator learns from it; hard masks are drawn; the adapter trains under these;
a proximal step shrinks the LoRA weights of what is pruned. After the phase the masks are those of the largest logits,
equally many in every layer, and only the last two remain.

Ours: the calibration loss is that of the run's own objective, which for supervised rows is the cross-entropy of the
authors; calibration rows are held-out rows where there are some, else training rows drawn anew.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.data.prefix import on_device
from alignkit.environment import launched_with_fsdp
from alignkit.errors import CheckpointError, ConfigError, ModelError
from alignkit.models._atp_layers import (
    MASKED,
    READERS,
    AtpConfig,
    Factor,
    factors_of,
    masks_of,
    set_masks,
    soft_masks_in,
)
from alignkit.models._engine import set_trained_value, trained_value
from alignkit.models.attachment import Attachment
from alignkit.models.modes import evaluating
from alignkit.models.sparse_adapter import POLICY
from alignkit.parametrizations import _lora
from alignkit.pruning import decisions
from alignkit.pruning.decisions import DecisionGenerator, Structure
from alignkit.pruning.families import LAYERS, find_family, sizes_of
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.prox import masked_soft_threshold
from alignkit.pruning.validate import target_config

STATE = "atp_decisions.pt"
"""File of a checkpoint with the generator, its optimizer and the masks."""
TINY = 1e-20
"""Below the roots of the group lasso, as in the authors' code: the gradient at zero is a number."""
STRENGTHS = {"proximal": 50_000.0, "group_lasso": 1.0}
"""How strongly each penalty acts unless the configuration says otherwise; the authors' values."""
MOST_GRADIENT = 1.0
"""Norm that the generator's gradient is clipped to, as in the authors' code."""


def check(config: Any) -> None:
    """Refuse a launch in which decisions cannot be learnt.

    Raises:
        ConfigError: FSDP shards the model.
    """
    if launched_with_fsdp():
        raise ConfigError("atp cannot be used in this launch", [_no_second_pass("FSDP")])


def prepare(config: Any, model: PreTrainedModel) -> AtpConfig:
    """PEFT's configuration of the adapter a run starts.

    Raises:
        ModelError: The model cannot be pruned like this, or not as much, or the adapter leaves out what goes.
        ConfigError: ZeRO-3 shards the model.
    """
    if is_deepspeed_zero3_enabled():
        raise ConfigError("atp cannot be used in this launch", [_no_second_pass("ZeRO-3")])
    dense, layers = _dense(model), model.config.num_hidden_layers
    find_family(dense)
    sizes = {"ffn": sizes_of(dense).ffn, "kv_groups": sizes_of(dense).kv_groups}
    removed = {"ffn": config.atp_ffn, "kv_groups": config.atp_kv_groups}
    kept = {kind: _kept(kind, sizes[kind], share) for kind, share in removed.items() if share > 0}
    plan = {kind: tuple(tuple(range(count)) for _ in range(layers)) for kind, count in kept.items()}
    target_config(PruningPlan(**plan), dense)
    lora = _lora.prepare(config, model)
    _check_targets(lora, model, kept)
    return AtpConfig(
        **{f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"},
        atp_layers=layers,
        atp_sizes={kind: sizes[kind] for kind in kept},
        atp_kept=kept,
    )


def attach(config: Any, trainer: Any) -> Decisions:
    """What learns the decisions.

    Raises:
        ConfigError: There are no rows that can be drawn for calibration.
    """
    found = Decisions(config, trainer)
    if trainer.accelerator.is_main_process:
        print(
            f"atp: every layer keeps {_in_words(found.structures)}; decisions are learnt on {_rows_in_words(trainer)}"
        )
    return found


def structures_of(model: PeftModel) -> list[Structure]:
    """The kinds of structures that an adapter of ATP prunes, with the parameters that go with one of each.

    Args:
        model: A model with such an adapter.
    """
    config, base = model.peft_config[POLICY], model.get_base_model()
    found = []
    for kind, size in config.atp_sizes.items():
        layers = [base.get_submodule(f"{LAYERS}.0.{name}").get_base_layer() for name in MASKED[kind]]
        reader = base.get_submodule(f"{LAYERS}.0.{READERS[kind]}")
        rows = sum(layer.out_features * (layer.in_features + (layer.bias is not None)) for layer in layers)
        found.append(
            Structure(kind, size, config.atp_kept[kind], (rows + reader.in_features * reader.out_features) // size)
        )
    return found


class Decisions(Attachment):
    """Learns what to prune, settles it, and drives the adapter's share of it to zero.

    Everything random is drawn from the seed of the run and the number of the step, so that a run that is resumed draws
    what it would have drawn. All processes draw the same noise; the first one's masks are in force everywhere.

    Args:
        config: The configuration of the run.
        trainer: Its trainer, with the adapter in place.
    """

    def __init__(self, config: Any, trainer: Any) -> None:
        self.config, self.trainer = config, trainer
        self.structures = structures_of(trainer.model)
        self.generator = DecisionGenerator(
            len(self._masks()[self.structures[0].name]), self.structures, seed=config.seed
        )
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=config.atp_generator_lr)
        self.strength = config.atp_penalty_strength or STRENGTHS[config.atp_penalty]
        self.rows = _calibration_rows(trainer)
        self.settled: str | None = None
        self.total = 1
        self.seen: dict[str, float] = {}
        self.persistent = (self,)

    # --- a step ----------------------------------------------------------------------------------------------------

    def before_step(self, step: int, total: int) -> None:
        """Learn and draw decisions, or settle them where that is due."""
        self.total = total
        self.generator.to(self.trainer.accelerator.device)
        # At least the last step is one of the model that is exported.
        # A run that is resumed for more steps than it had does not open settled decisions again.
        if self.settled is None and step < min(math.ceil(self.config.atp_control_fraction * total), total - 1):
            self._learn(step)
            self._put(self._drawn(step))
        elif self.settled is None:
            self._settle()

    def after_step(self, step: int) -> None:
        """The proximal step on the LoRA weights of what is pruned."""
        if self.config.atp_penalty != "proximal":
            return
        masks = self._masks()
        thresholds = decisions.thresholds(
            masks,
            step=step + 1,
            total=self.total,
            strength=self.strength,
            lr=self.trainer.optimizer.param_groups[0]["lr"],
        )
        for kind, layers in factors_of(self.trainer.model).items():
            for factors, mask, threshold in zip(layers, masks[kind], thresholds[kind], strict=True):
                if not threshold:
                    continue
                values = [trained_value(factor.weight) for factor in factors]
                scale = masked_soft_threshold(_joint_norms(factors, values), threshold, mask == 0)
                for factor, value in zip(factors, values, strict=True):
                    set_trained_value(factor.weight, factor.scaled(value, scale))

    def terms(self) -> Mapping[str, Tensor]:
        """The group lasso of version 1, where that is chosen."""
        if self.config.atp_penalty != "group_lasso":
            return {}
        norms = {
            kind: [[(factor.squares(factor.weight) + TINY).sqrt() for factor in factors] for factors in layers]
            for kind, layers in factors_of(self.trainer.model).items()
        }
        return {"atp_group_lasso": self.strength * decisions.group_lasso(norms, self._masks())}

    def metrics(self) -> Mapping[str, float]:
        """What is kept, how much that changes, the losses of the generator, and what of the adapter is still to go."""
        found = dict(self.seen) if self.settled is None else {}
        for kind, mask in self._masks().items():
            counts = mask.sum(-1)
            found[f"atp/{kind}_kept"] = float(counts.mean())
            found[f"atp/{kind}_kept_least"], found[f"atp/{kind}_kept_most"] = float(counts.min()), float(counts.max())
        return found | {"atp/pruned_norms": self._pruned_norms()}

    # --- decisions -------------------------------------------------------------------------------------------------

    def _learn(self, step: int) -> None:
        """One step of the generator on a calibration batch: the loss under soft masks, and the ratio of hard ones."""
        accelerator = self.trainer.accelerator
        soft = self._soft(step, "learn")
        with soft_masks_in(self.trainer.model, soft), evaluating(self.trainer.model), accelerator.autocast():
            task = self._calibration_loss(step)
        hard = {kind: decisions.hard_masks(mask) for kind, mask in soft.items()}
        ratio = decisions.structure_ratio_loss(hard, self.structures)
        parameters = list(self.generator.parameters())
        # Of the generator alone: the adapter trains by its own batch.
        gradients = torch.autograd.grad(task + self.config.atp_ratio_weight * ratio, parameters)
        for parameter, gradient in zip(parameters, accelerator.reduce(list(gradients), reduction="mean"), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, MOST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        losses = accelerator.reduce(torch.stack([task.detach().float(), ratio.detach()]), reduction="mean")
        self.seen = {"atp/calibration_loss": float(losses[0]), "atp/ratio_loss": float(losses[1])}

    def _calibration_loss(self, step: int) -> Tensor:
        """The objective on a calibration batch; the mean over processes is that of the whole batch."""
        trainer = self.trainer
        accelerator, size = trainer.accelerator, trainer.args.per_device_train_batch_size
        draw = random.Random(f"{self.config.seed} {step} rows")
        places = [draw.randrange(len(self.rows)) for _ in range(size * accelerator.num_processes)]
        own = places[accelerator.process_index :: accelerator.num_processes]
        batch = trainer.data_collator([self.rows[place] for place in own])
        inputs = on_device(batch, accelerator.device)
        _, result = trainer.evaluate_objective(trainer.model, inputs)
        counts = {kind: accelerator.reduce(n, reduction="sum") for kind, n in trainer.item_counts(inputs).items()}
        terms = [term.weight * term.values.sum() / counts[term.item].clamp(min=1) for term in result.terms]
        loss: Tensor = torch.stack(terms).sum() * accelerator.num_processes
        return loss

    def _soft(self, step: int, purpose: str) -> dict[str, Tensor]:
        """Soft masks of the generator, with noise of this step's own."""
        noise = torch.Generator().manual_seed(random.Random(f"{self.config.seed} {step} {purpose}").getrandbits(62))
        return {
            kind: decisions.soft_masks(
                logits,
                decisions.gumbel_noise(logits.shape, noise).to(logits.device),
                keep_bias=self.config.atp_keep_bias,
                temperature=self.config.atp_temperature,
            )
            for kind, logits in self.generator().items()
        }

    @torch.no_grad()
    def _drawn(self, step: int) -> dict[str, Tensor]:
        return {kind: decisions.hard_masks(mask) for kind, mask in self._soft(step, "draw").items()}

    @torch.no_grad()
    def _settle(self) -> None:
        """Keep what the generator would rather keep, equally many in every layer, from now on."""
        logits = self.generator()
        self._put({s.name: decisions.equal_counts(logits[s.name], s.kept) for s in self.structures})
        self.settled = decisions.digest(self._masks())

    def _put(self, masks: Mapping[str, Tensor]) -> None:
        """Put the first process's masks in force on all."""
        before = {kind: mask.clone() for kind, mask in self._masks().items()}
        set_masks(self.trainer.model, broadcast(dict(masks), from_process=0))
        digests = set(gather_object([decisions.digest(self._masks())]))
        if len(digests) > 1:
            raise ModelError(f"the processes prune differently: their masks have {len(digests)} digests")
        self.seen["atp/churn"] = decisions.churn(before, self._masks())

    def _masks(self) -> dict[str, Tensor]:
        return masks_of(self.trainer.model)

    @torch.no_grad()
    def _pruned_norms(self) -> float:
        """Sum of the joint norms of all pruned groups of LoRA weights."""
        total, masks = 0.0, self._masks()
        for kind, layers in factors_of(self.trainer.model).items():
            for factors, mask in zip(layers, masks[kind], strict=True):
                norms = _joint_norms(factors, [trained_value(factor.weight) for factor in factors])
                total += float((norms * (1 - mask)).sum())
        return total

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Write the generator, its optimizer and the masks."""
        if not self.trainer.args.should_save:
            return
        state = {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masks": self._masks(),
            "settled": self.settled,
        }
        torch.save(state, directory / STATE)

    def load(self, directory: Path) -> None:
        """Go on with them.

        Raises:
            CheckpointError: They are not there, or the masks are not those that were settled.
        """
        file = directory / STATE
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: this checkpoint was written by another parametrisation than atp")
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.generator.to(self.trainer.accelerator.device).load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_masks(self.trainer.model, state["masks"])
        self.settled = state["settled"]
        if self.settled is not None and self.settled != decisions.digest(self._masks()):
            raise CheckpointError(f"{file} is damaged: its masks are not those that were settled")


def _in_words(structures: Sequence[Structure]) -> str:
    names = {"ffn": "feed-forward channels", "kv_groups": "KV groups"}
    return " and ".join(f"{s.kept} of {s.size} {names[s.name]}" for s in structures)


def _rows_in_words(trainer: Any) -> str:
    rows = _calibration_rows(trainer)
    if rows is trainer.train_dataset:
        return f"the {len(rows)} rows that are trained on"
    return f"{len(rows)} held-out rows, so what is measured on these flatters them"


def _dense(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of a model as it is exported: not quantised."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    dense: PreTrainedConfig = type(model.config).from_dict(values)
    return dense


def _no_second_pass(sharding: str) -> str:
    return (
        f"`parametrization: atp` under {sharding}: decisions are learnt in a pass of their own, through the model "
        "inside its wrapper, for which sharded weights are not gathered. Launch with DDP or ZeRO-2"
    )


def _kept(kind: str, size: int, share: float) -> int:
    """How many structures of a layer are kept.

    Raises:
        ModelError: None would be, or all.
    """
    kept = size - round(share * size)
    if 0 < kept < size:
        return kept
    problem = f"`atp_{kind}: {share}` would remove {'all' if kept == 0 else 'none'} of the {size} in a layer"
    if size == 1:
        raise ModelError(f"{problem}, which are all one. Write atp_{kind}: 0.")
    nearest = (size - 1 if kept == 0 else 1) / size
    raise ModelError(f"{problem}. Write atp_{kind}: {nearest:.4g}, or 0.")


def _check_targets(lora: Any, model: PreTrainedModel, kinds: Mapping[str, int]) -> None:
    """Refuse an adapter that leaves out projections whose rows go: they would stay as they are."""
    names = {name.rpartition(".")[2] for kind in kinds for name in MASKED[kind]}
    targets = lora.target_modules
    if targets == "all-linear":
        return
    layers = range(model.config.num_hidden_layers)
    full = [f"{LAYERS}.{layer}.{name}" for layer in layers for kind in kinds for name in MASKED[kind]]
    missing = [name for name in full if not _is_target(name, targets)]
    if missing:
        raise ModelError(
            f"lora_target_modules leaves out {missing[0]}, whose rows atp removes. Write all-linear, or name at least "
            f"{', '.join(sorted(names))}."
        )


def _is_target(name: str, targets: str | set[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _joint_norms(factors: Sequence[Factor], values: Sequence[Tensor]) -> Tensor:
    """One norm [structures] of all factors together."""
    return torch.stack([f.squares(value) for f, value in zip(factors, values, strict=True)]).sum(0).sqrt()


def _calibration_rows(trainer: Any) -> Any:
    """Rows that decisions are learnt on: held-out ones, or where there are none those that are trained on.

    Raises:
        ConfigError: They are streams.
    """
    held_out = trainer.eval_dataset
    sets = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
    for rows in (*sets, trainer.train_dataset):
        if rows is not None and isinstance(rows, Sized) and len(rows):
            return rows
    problem = (
        "`parametrization: atp` draws rows to learn its decisions on, which a stream cannot give. Add eval_data with "
        "rows that are not streamed"
    )
    raise ConfigError("atp cannot be used with these rows", [problem])
