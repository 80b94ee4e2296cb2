"""Group sparsity while every weight trains: pulls after each step, a choice for good, and the plan that is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from alignkit.environment import launched_with_fsdp
from alignkit.errors import CheckpointError, ConfigError, ModelError
from alignkit.models._engine import set_trained_value, trained_value
from alignkit.models.attachment import Attachment
from alignkit.pruning.groups import (
    LayerGroups,
    ffn_groups,
    group_norms,
    kv_groups,
    scaled_by_group,
)
from alignkit.pruning.importance import strongest
from alignkit.pruning.plan import PLAN_FILE, PruningPlan
from alignkit.pruning.prox import annealed_count, group_soft_threshold, masked_soft_threshold, wgsef_prox
from alignkit.pruning.validate import target_config

ENOUGH = 0.1
"""Part of their norm at the start that groups may still have when they are set to zero without a word of advice."""


def check(config: Any) -> None:
    """Refuse a launch whose shards no whole group can be read from.

    Raises:
        ConfigError: It is one of FSDP.
    """
    if launched_with_fsdp():
        why = (
            "`parametrization: sparse` under FSDP has not been tried. Launch with DDP or a DeepSpeed ZeRO stage instead"
        )
        raise ConfigError("the launcher shards the model", [why])


def prepare(config: Any, model: PreTrainedModel) -> None:
    """Nothing is frozen; refuses what could not be exported in the end.

    Raises:
        ModelError: The model is of no family that can be pruned, or cannot be as far as asked.
    """
    first = {axis.name: tuple(tuple(range(axis.kept)) for _ in axis.layers) for axis in _axes(config, model)}
    target_config(PruningPlan(**first), model.config)


def attach(config: Any, trainer: Any) -> GroupPull:
    """What pulls at the groups of the trainer's model."""
    return GroupPull(config, trainer.model, Path(trainer.args.output_dir))


@dataclass
class Axis:
    """The groups of one kind in all layers.

    Attributes:
        name: ``ffn`` or ``kv_groups``, as a plan calls it.
        layers: One entry a layer.
        kept: Groups of a layer that shall be left.
        start: Norms when training began [layers, groups], float64.
        norms: Norms now.
        chosen: The groups of each layer that stay for good; None as long as they are not settled.
    """

    name: str
    layers: Sequence[LayerGroups]
    kept: int
    start: Tensor = field(init=False)
    norms: Tensor = field(init=False)
    chosen: list[tuple[int, ...] | None] = field(init=False)

    def measure(self, model: PreTrainedModel) -> Tensor:
        """Norms of all groups, [layers, groups]; a collective under DeepSpeed."""
        return torch.stack([group_norms(_values(model, groups), groups) for groups in self.layers])

    def strongest(self, norms: Tensor) -> tuple[int, ...]:
        """Those of the groups of one layer that have the largest norms, as many as shall be left."""
        return strongest(norms, self.kept, self.name)

    def mask(self, kept: Sequence[int]) -> Tensor:
        """1 for the groups of one layer that are kept, 0 for the others; float64."""
        mask = torch.zeros_like(self.start[0])
        mask[list(kept)] = 1
        return mask


class GroupPull(Attachment):
    r"""Pulls at groups of weights after every step of the optimizer.

    Over the first ``sparse_until`` of a run, E steps, each step multiplies every group by the factor of one proximal
    step (:mod:`alignkit.pruning.prox`) whose threshold is::

        t = sparse_coef / E * mean over the layer of ||w_j|| when training began      (wgsef: sparse_coef / E)

    A layer of which no more than the wanted number of groups is not zero has reached its aim: what is left is pulled at
    no longer. After the last of the E steps the strongest groups of every other layer are chosen (under
    ``mask_sparsity`` those that were at the start) and the rest is set to zero. What is not chosen is kept at zero.

    Deviations: a proximal method has the learning rate times a coefficient for t; Adam's steps have no such length,
    and a coefficient would hold for one number of steps alone. ``mask_sparsity`` takes the mask from the norms at the
    start, where the authors train with a penalty on all channels to find it. The end of the pull is ours.

    Fidelity: of the proximal steps see there. ``wgsef`` is derived from the definition of its functional, with
    parameters of ours: those of the paper are not known.

    Args:
        config: Of the run.
        model: Its model, as it was loaded.
        directory: Of the run.
    """

    def __init__(self, config: Any, model: PreTrainedModel, directory: Path) -> None:
        self.config, self.model, self.directory = config, model, directory
        self.persistent = (_SavedPlan(self),)
        self.axes = _axes(config, model)
        for axis in self.axes:
            axis.start = axis.measure(model)
            axis.norms = axis.start.clone()
            axis.chosen = [None] * len(axis.layers)
        self._total = 0

    # --- steps -----------------------------------------------------------------------------------------------------

    def before_step(self, step: int, total: int) -> None:
        """Learn how long the run is."""
        self._total = total

    def after_step(self, step: int) -> None:
        """Pull, choose or hold, as the time has come."""
        last, said = step == self._end - 1, []
        for axis in self.axes:
            for index in range(len(axis.layers)):
                self._move(axis, index, step)
            if last:
                said.append(self._choose_rest(axis))
        if last and PartialState().is_main_process:
            self.plan().save(self.directory)
            print("\n".join(said))

    @property
    def _end(self) -> int:
        """Steps that may be followed by a pull."""
        return max(1, math.ceil(self.config.sparse_until * self._total))

    def _move(self, axis: Axis, index: int, step: int) -> None:
        """Pull at the groups of one layer or, once they are chosen, keep the others at zero."""
        values = _values(self.model, axis.layers[index])
        norms = group_norms(values, axis.layers[index])
        chosen = axis.chosen[index]
        # Those at zero have no gradient, but Adam's momentum carries them on.
        factors = self._pulled(axis, index, norms, step) if chosen is None else axis.mask(chosen)
        axis.norms[index] = norms
        self._scale(axis, index, values, norms, factors)
        if chosen is None and int((axis.norms[index] > 0).sum()) <= axis.kept:
            axis.chosen[index] = self._kept(axis, index)

    def _choose_rest(self, axis: Axis) -> str:
        """Choose in the layers where it has not been done, and set the other groups to zero; says what that took."""
        open_layers = [index for index, chosen in enumerate(axis.chosen) if chosen is None]
        taken = of = 0.0
        for index in open_layers:
            axis.chosen[index] = kept = self._kept(axis, index)
            gone = axis.mask(kept) == 0
            taken, of = taken + float(axis.norms[index][gone].sum()), of + float(axis.start[index][gone].sum())
            self._scale(axis, index, _values(self.model, axis.layers[index]), axis.norms[index], axis.mask(kept))
        text = f"{axis.name}: {axis.kept} of {axis.start.shape[1]} groups of each layer are kept from here on"
        if not open_layers:
            return f"{text}; the others had come to zero before"
        text += (
            f"; in {len(open_layers)} of {len(axis.layers)} layers others had not come to zero: of their norm at the "
            f"start {taken / of:.1%} was left, and is zero now"
        )
        return text if taken <= ENOUGH * of else f"{text}. A larger sparse_coef would have led them there by and by"

    def _scale(self, axis: Axis, index: int, values: Sequence[Tensor], norms: Tensor, factors: Tensor) -> None:
        """Multiply the groups of one layer, whose weights and norms are given."""
        scaled = norms * factors
        if torch.equal(scaled, norms):
            return
        axis.norms[index] = scaled
        for part, value in zip(axis.layers[index].parts, values, strict=True):
            set_trained_value(self.model.get_parameter(part.name), scaled_by_group(value, part.dim, factors))

    def _pulled(self, axis: Axis, index: int, norms: Tensor, step: int) -> Tensor:
        """Factors of the regulariser."""
        rate, start = self.config.sparse_coef / self._end, axis.start[index]
        if self.config.sparse_regulariser == "wgsef":
            fraction = self.config.sparse_anneal_fraction
            return wgsef_prox(norms, annealed_count(step, self._total, len(norms), axis.kept, fraction), rate)
        if self.config.sparse_regulariser == "group_lasso":
            return group_soft_threshold(norms, rate * start.mean())
        return masked_soft_threshold(norms, rate * start.mean(), axis.mask(axis.strongest(start)) == 0)

    # --- plan ------------------------------------------------------------------------------------------------------

    def plan(self) -> PruningPlan:
        """The groups that are kept: those chosen, and where that has not been done, those that would be now."""
        return PruningPlan(
            **{
                axis.name: tuple(self._kept(axis, i) if kept is None else kept for i, kept in enumerate(axis.chosen))
                for axis in self.axes
            }
        )

    def _kept(self, axis: Axis, index: int) -> tuple[int, ...]:
        norms = axis.start if self.config.sparse_regulariser == "mask_sparsity" else axis.norms
        return axis.strongest(norms[index])

    def resume(self, plan: PruningPlan) -> None:
        """Go on from a checkpoint's plan; a collective under DeepSpeed.

        Args:
            plan: What :meth:`plan` was then.
        """
        for axis in self.axes:
            axis.norms = axis.measure(self.model)
            # After every step the layers with so few groups are those where they had been chosen.
            few = (axis.norms > 0).sum(1) <= axis.kept
            rows = getattr(plan, axis.name)
            axis.chosen = [row if is_chosen else None for row, is_chosen in zip(rows, few.tolist(), strict=True)]
        if all(None not in axis.chosen for axis in self.axes) and PartialState().is_main_process:
            plan.save(self.directory)

    def metrics(self) -> dict[str, float]:
        """Groups at zero, and the norms of those that stay and of the others, in parts of their norm at the start."""
        found, plan = {}, self.plan()
        for axis in self.axes:
            kept = torch.stack([axis.mask(row) for row in getattr(plan, axis.name)]) > 0
            found[f"sparse/{axis.name}_zero"] = float((axis.norms == 0).double().mean())
            found[f"sparse/{axis.name}_kept_norm"] = float(axis.norms[kept].sum() / axis.start[kept].sum())
            found[f"sparse/{axis.name}_other_norm"] = float(axis.norms[~kept].sum() / axis.start[~kept].sum())
        return found


class _SavedPlan:
    """The plan in a checkpoint."""

    def __init__(self, pull: GroupPull) -> None:
        self.pull = pull

    def save(self, directory: Path) -> None:
        """Write the plan that would be, or is, chosen."""
        if PartialState().is_main_process:
            self.pull.plan().save(directory)

    def load(self, directory: Path) -> None:
        """Go on with the plan of a checkpoint.

        Raises:
            CheckpointError: It holds none.
        """
        if not (directory / PLAN_FILE).is_file():
            raise CheckpointError(
                f"{directory} holds no {PLAN_FILE}: it was saved without parametrization: sparse. Resume with the "
                "parametrisation that it was trained with, or start again."
            )
        self.pull.resume(PruningPlan.load(directory))


def _axes(config: Any, model: PreTrainedModel) -> list[Axis]:
    """The axes on which something shall go.

    Raises:
        ModelError: The model is of no family that can be pruned, or what shall go is none of its groups, or all.
    """
    found = []
    for name, groups_of in (("ffn", ffn_groups), ("kv_groups", kv_groups)):
        part = getattr(config, f"sparse_{name}")
        if not part:
            continue
        layers = groups_of(model)
        count = layers[0].count
        gone = math.floor(part * count + 0.5)
        if not 0 < gone < count:
            least, most = 1 / count, (count - 1) / count
            raise ModelError(
                f"sparse_{name}: {part:g} takes {gone} of the {count} groups of a layer. Write a part from {least:.3g} "
                f"to {most:.3g}" + (", or 0 to leave this axis alone" if count > 1 else "")
            )
        found.append(Axis(name, layers, count - gone))
    return found


def _values(model: PreTrainedModel, groups: LayerGroups) -> list[Tensor]:
    return [trained_value(model.get_parameter(part.name)) for part in groups.parts]
