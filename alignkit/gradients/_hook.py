"""Where a gradient rule enters a trainer: one mixin, for every objective, parametrisation and process layout.

A trainer that inherits from :class:`GradientRuleHook` implements :meth:`~GradientRuleHook.batch_loss` and
:meth:`~GradientRuleHook.record`, sets ``gradient_rule`` to a :class:`ChosenRule` (or None), keeps what is on its
list ``persistent`` in checkpoints, and returns :meth:`~GradientRuleHook.ruled_loss` from its ``compute_loss``. Nothing
else changes: the scalar that comes back has the value of the loss and the edited gradient, so that scaling, backward
pass, accumulation, reduction over processes, clipping and logging are the trainer's own.

What is evaluated, once or twice a micro-batch, is the model inside its wrapper, with stand-ins for the trainable
weights (``_weights.py``): no gradient is reduced and no engine is stepped before the edited gradient is known.

Each process displaces along the gradient of each of its micro-batches ("m-SAM"), and the edited gradients add up.
With ``direction: global`` both gradients are averaged over processes before they are used, so that a step of one
micro-batch a process does not depend on the number of processes. Micro-batches of one step are displaced separately
all the same.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from alignkit.gradients._decay import DecayToStart
from alignkit.gradients._family import Evaluation, LowRankPair
from alignkit.gradients._measures import HeldDisplacement, measure
from alignkit.gradients._replay import random_state, replayed
from alignkit.gradients._schedule import ScheduleCheck, acts
from alignkit.gradients._support import check_supported
from alignkit.gradients._weights import (
    Trainable,
    all_tensors,
    evaluated_at,
    low_rank_pairs,
    starting_weights,
    trainable_tensors,
    whole_weights,
    zero_with_gradients,
)
from alignkit.losses.types import Metric
from alignkit.parts.rule import DisplacedOptions, EditOptions, GradientRule, load_rule
from alignkit.storage.persistent import Persistent

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class ChosenRule:
    """A gradient rule with its options, an instance of ``rule.options``."""

    rule: GradientRule
    options: Any


def chosen_rule(name: str | None, options: Any) -> ChosenRule | None:
    """The rule of a config, None where there is none.

    Args:
        name: Value of the key ``gradient_rule``.
        options: Instance of the rule's options.
    """
    return None if name is None else ChosenRule(load_rule(name), options)


@dataclass(frozen=True)
class _Known:
    """What is inside a wrapped model; kept, since finding out takes as long as a small step."""

    model: nn.Module
    inner: nn.Module
    tensors: Sequence[Trainable]


@dataclass(frozen=True)
class _MicroBatch:
    """What both evaluations of a micro-batch are given."""

    inner: nn.Module
    tensors: Sequence[Trainable]
    inputs: Mapping[str, Tensor]
    num_items_in_batch: Tensor | None


class GradientRuleHook(Trainer):
    """Mixin of a trainer; see the head of this file."""

    gradient_rule: ChosenRule | None = None
    persistent: list[Persistent]

    _kept: dict[str, Any] | None = None
    _start: Mapping[str, Tensor] | None = None
    _decay: DecayToStart | None = None
    _known: _Known | None = None
    _drawn: tuple[int, int] = (-1, 0)
    _has_looked = False

    # --- what the trainer implements -------------------------------------------------------------------------------

    def batch_loss(
        self, model: nn.Module, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None, *, record: bool
    ) -> Tensor:
        """This micro-batch's part of the step's loss; its metrics and tokens count only with ``record``."""
        raise NotImplementedError

    def record(self, name: str, metric: Metric) -> None:
        """Add a metric to the next log."""
        raise NotImplementedError

    def batch_share(self, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None) -> float:
        """What part of the step's mean loss a micro-batch is; their mean over processes and sum over a step is 1."""
        raise NotImplementedError

    # --- the loss --------------------------------------------------------------------------------------------------

    def ruled_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None) -> Tensor:
        """The loss of a micro-batch; while training, its gradient is what the rule makes of it.

        Args:
            model: The wrapped model.
            inputs: A collated batch.
            num_items_in_batch: Handed on to :meth:`batch_loss`.
        """
        if self.gradient_rule is None or not torch.is_grad_enabled() or not self._rule_is_on():
            return self.batch_loss(model, inputs, num_items_in_batch, record=True)
        known = self._known_of(model)
        tensors = [tensor for tensor in known.tensors if tensor.trains]
        batch = _MicroBatch(known.inner, tensors, inputs, num_items_in_batch)
        with self._evaluated_twice():
            loss, gradients = self._edited_gradients(batch, self.gradient_rule)
        return loss + zero_with_gradients(model, batch.inner, gradients, loss)

    def once_a_batch(self, name: str, compute: Callable[[], Kept]) -> Kept:
        """``compute()``, only once where a rule evaluates the same micro-batch twice.

        Args:
            name: Distinguishes what is computed.
            compute: Must not depend on the weights that train.
        """
        if self._kept is None:
            return compute()
        if name not in self._kept:
            self._kept[name] = compute()
        kept: Kept = self._kept[name]
        return kept

    def _known_of(self, model: nn.Module) -> _Known:
        if self._known is None or self._known.model is not model:
            inner = self.accelerator.unwrap_model(model)
            self._known = _Known(model, inner, all_tensors(inner))
        return self._known

    @contextlib.contextmanager
    def _evaluated_twice(self) -> Iterator[None]:
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _rule_is_on(self) -> bool:
        """Whether the rule edits the gradient of this optimizer step."""
        assert self.gradient_rule is not None
        return self.gradient_rule.rule.edit is not None and acts(self.gradient_rule.options, self.args, self.state)

    def _edited_gradients(self, batch: _MicroBatch, chosen: ChosenRule) -> tuple[Tensor, dict[Trainable, Tensor]]:
        """The loss, detached, and the gradient of every tensor that has one; those that are no target keep theirs."""
        rule, options, tensors = chosen.rule, chosen.options, batch.tensors
        weights = whole_weights(tensors)
        device = weights[0].device
        state = random_state(device)
        loss, gradients = self._evaluate_at(batch, weights, record=True)
        if self._is_averaged(options):  # over the same tensors everywhere, also those this process had no use for
            gradients = {i: gradients.get(i, torch.zeros_like(weight)) for i, weight in enumerate(weights)}
        targets = [i for i in gradients if options.rule_targets == "all" or tensors[i].is_lora]
        found = {tensors[i]: (weights[i], gradients[i]) for i in targets}
        evaluations = [self._first_evaluation(batch, found, loss, chosen)]
        if rule.displacement is not None:
            evaluations.append(self._second_evaluation(batch, weights, targets, evaluations[0], state, chosen))
        assert rule.edit is not None
        # A micro-batch of repeated rows alone has no gradient, which no rule needs to be asked about.
        is_empty = not evaluations[0].share
        edited = evaluations[0].gradient if is_empty else rule.edit(evaluations, options)
        for name, metric in measure(rule, options, evaluations).items():
            nothing = torch.zeros_like(metric.values)
            self.record(name, Metric(nothing, nothing) if is_empty else metric)
        by_target = dict(zip(targets, edited, strict=True))
        return loss, {tensors[i]: by_target.get(i, gradient) for i, gradient in gradients.items()}

    def _second_evaluation(
        self,
        batch: _MicroBatch,
        weights: Sequence[Tensor],
        targets: Sequence[int],
        first: Evaluation,
        state: Sequence[Tensor],
        chosen: ChosenRule,
    ) -> Evaluation:
        """The same micro-batch, with the random state of the first time, at the weights the rule displaces it to."""
        assert chosen.rule.displacement is not None
        if first.share:
            displacements = chosen.rule.displacement(first, chosen.options)
        else:
            displacements = [torch.zeros_like(x) for x in first.gradient]
        moved, held = list(weights), HeldDisplacement(self._autocast_dtype())
        for i, displacement in zip(targets, displacements, strict=True):
            moved[i] = weights[i] + displacement
            held.add(weights[i], moved[i], displacement)
        self._warn_once(held)
        with replayed(state, weights[0].device):
            loss, gradients = self._evaluate_at(batch, moved, record=False)
        # As large as everything that trains, as the edited gradient will be.
        del moved, displacements
        gradient = [gradients[i] if i in gradients else torch.zeros_like(weights[i]) for i in targets]
        gradient, loss, _ = self._averaged(gradient, loss, first.share, chosen.options)
        return replace(first, loss=loss, gradient=gradient, displacement_norm=held.length())

    def _autocast_dtype(self) -> torch.dtype | None:
        is_rounded = self.accelerator.native_amp and self.accelerator.mixed_precision == "bf16"
        return torch.bfloat16 if is_rounded else None

    def _warn_once(self, held: HeldDisplacement) -> None:
        if not self._has_looked and self.accelerator.is_main_process and (problem := held.problem()):
            print(problem)
        self._has_looked = True

    def _first_evaluation(
        self, batch: _MicroBatch, found: Mapping[Trainable, tuple[Tensor, Tensor]], loss: Tensor, chosen: ChosenRule
    ) -> Evaluation:
        """What the rule is told of the weights as they are; ``found`` holds weight and gradient."""
        weights, gradient = ([pair[i] for pair in found.values()] for i in range(2))
        pairs: list[LowRankPair] = []
        start: list[Tensor | None] = []
        if chosen.rule.needs_start:
            assert self._start is not None
            pairs = low_rank_pairs(batch.inner, list(found))
            factors = {i for pair in pairs for i in (pair.a, pair.b)}
            start = [None if i in factors else self._start[tensor.name] for i, tensor in enumerate(found)]
        share = self.batch_share(batch.inputs, batch.num_items_in_batch)
        gradient, loss, share = self._averaged(gradient, loss, share, chosen.options)
        return Evaluation(
            weights=weights,
            gradient=gradient,
            loss=loss,
            share=share,
            start=start,
            pairs=pairs,
            seed=self._next_seed(chosen.options),
        )

    def _evaluate_at(
        self, batch: _MicroBatch, weights: Sequence[Tensor], *, record: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss at these weights, detached, and the gradients of the tensors it depends on, by position."""
        with evaluated_at(batch.tensors, weights) as leaves:
            loss = self.batch_loss(batch.inner, batch.inputs, batch.num_items_in_batch, record=record)
            # Not autograd.grad, which checkpointing in its older, re-entrant form does not allow. The leaves are the
            # only ones that require a gradient, so nothing reaches the parameters.
            loss.backward()
        return loss.detach(), {i: leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}

    def _averaged(
        self, gradient: list[Tensor], loss: Tensor, share: float, options: EditOptions
    ) -> tuple[list[Tensor], Tensor, float]:
        """What a rule goes by: this process's own, or with ``direction: global`` the means over processes."""
        if not self._is_averaged(options):
            return gradient, loss, share
        parts = [*gradient, loss, loss.new_tensor(share)]
        flat = self.accelerator.reduce(torch.cat([x.flatten() for x in parts]), reduction="mean")
        pieces = flat.split([x.numel() for x in parts])
        *averaged, mean_loss, mean_share = [x.view_as(y).to(y.dtype) for x, y in zip(pieces, parts, strict=True)]
        return averaged, mean_loss, mean_share.item()

    def _is_averaged(self, options: EditOptions) -> bool:
        is_global = isinstance(options, DisplacedOptions) and options.direction == "global"
        return is_global and self.accelerator.num_processes > 1

    def _next_seed(self, options: EditOptions) -> int:
        """A seed for this micro-batch: another one in every step and on every process, unless all displace alike."""
        step = self.state.global_step
        self._drawn = (step, self._drawn[1] + 1 if self._drawn[0] == step else 0)
        is_global = isinstance(options, DisplacedOptions) and options.direction == "global"
        rank = 0 if is_global else self.accelerator.process_index
        mixed = random.Random(f"{self.args.seed} {step} {self._drawn[1]} {rank}")
        return mixed.getrandbits(62)

    # --- before and after ------------------------------------------------------------------------------------------

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as the host does, once it is known that the rule works in this process layout.

        Raises:
            ConfigError: It does not; nothing has been trained.
        """
        if self.gradient_rule is not None:
            tensors = trainable_tensors(self.model)
            check_supported(
                self.gradient_rule.rule,
                self.gradient_rule.options,
                model=self.model,
                tensors=tensors,
                accelerator=self.accelerator,
                args=self.args,
            )
            self.pop_callback(ScheduleCheck)
            self.add_callback(ScheduleCheck(self.gradient_rule.rule.name, self.gradient_rule.options))
            # Once: training that is taken up again has not started anew.
            if self.gradient_rule.rule.needs_start and self._start is None:
                self._start = starting_weights(self.model, tensors)
            if self.gradient_rule.rule.decay is not None and self._decay is None:
                self._decay = DecayToStart(self.gradient_rule.rule.decay(self.gradient_rule.options))
                self.add_callback(self._decay)
                self.persistent.append(self._decay)
        return super().train(*args, **options)
