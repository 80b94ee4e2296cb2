"""What the bridges to TRL's trainers share: one objective, one division, metrics summed and gathered once a log.

A bridge inherits from :class:`ObjectiveBridge` first and from its TRL trainer second. It says how a batch becomes a
loss output (``evaluate_objective``), how items are counted and how the rows that accelerate repeats are masked.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``_metrics`` of every trainer and the averaging in its ``log``
- trl ``aux_loss_enabled`` and ``router_aux_loss_coef``
- transformers ``Trainer._get_dataloader(dataset, description, batch_size, ...)`` of training and evaluation
- transformers ``Trainer._load_from_checkpoint(resume_from_checkpoint, model)``, which DeepSpeed's resumption bypasses
- transformers ``Trainer._load_optimizer_and_scheduler(checkpoint)``, called when training resumes, once everything is
  wrapped and DeepSpeed has loaded its engine
- transformers ``Trainer._save_checkpoint(model, trial)``, which writes ``checkpoint-<step>`` before callbacks are told
- transformers ``Trainer.get_batch_samples``, whose second value reaches ``compute_loss`` as ``num_items_in_batch``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from alignkit.data.filling import FilledStream
from alignkit.errors import CheckpointError
from alignkit.gradients._hook import ChosenRule, GradientRuleHook
from alignkit.losses.types import LossOutput, Metric
from alignkit.models._aux_loss import check_aux_loss
from alignkit.models._comparison import CompareWhenTrainingBegins, ScoringRun, runs_only_in_training
from alignkit.models._engine import engine_difference, keep_sums_whole
from alignkit.models._forward import compute_precision
from alignkit.models.adapter_casts import leave_casts_to_autocast
from alignkit.models.attachment import Attachment
from alignkit.models.choices import Choice
from alignkit.models.embedding_noise import disturb_embeddings
from alignkit.models.files import ADAPTER_WEIGHTS
from alignkit.models.full_rank import settle
from alignkit.models.metric_sums import MetricSums
from alignkit.models.optimizers import as_told, average, move_to_own_group
from alignkit.models.precision import hold_in_float32
from alignkit.models.router_watch import RouterWatch, watch_adapter
from alignkit.models.saved_comparison import adapter_difference, load_saved_weights, model_difference
from alignkit.models.sparse_adapter import equip
from alignkit.models.wrapping import base_model
from alignkit.reports.router_loads import keep_loads
from alignkit.shapes._streams import StreamResume
from alignkit.storage.persistent import Persistent


class ObjectiveBridge(StreamResume, GradientRuleHook):
    """The objective of a method in a TRL trainer. A subclass calls :meth:`prepare_bridge` before TRL's constructor.

    Attributes:
        item_kinds: What a term of this batch shape may be averaged over.
        persistent: What checkpoints keep beside what transformers keeps in them; add to it before training begins.
        before_saving: Called on every process with the directory of a checkpoint before it is written, whatever has
            asked for the save; may raise, and nothing is written.
        choices: What the run has chosen by itself, by ``Choice.key``; there before TRL's constructor is called.
    """

    item_kinds: ClassVar[tuple[str, ...]]

    _tag_names = ["alignkit", "trl"]
    _name = "alignkit"
    # The loss is divided by the item counts of the whole accumulation window.
    loss_is_scaled_for_ga = True

    neftune_noise_alpha: float | None
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _metrics: dict[str, dict[str, list[float]]]

    def prepare_bridge(self, gradient_rule: ChosenRule | None = None) -> None:
        """Set up the running sums and take the gradient rule; nothing of the host is touched."""
        self.gradient_rule = gradient_rule
        self.choices: dict[str, Choice] = {}
        self.persistent: list[Persistent] = []
        self.before_saving: list[Callable[[Path], None]] = []
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._loss_weights: dict[str, float] = {}
        self._evaluation_prefix = "eval"
        self.router_watch: RouterWatch | None = None
        self.attachment = Attachment()

    def attach(self, attachment: Attachment) -> None:
        """Take what the parametrisation does while training; called once the trainer is built."""
        self.attachment = attachment
        self.persistent.extend(attachment.persistent)
        self.add_callback(_AfterStep(attachment))

    def hold_masters(self, start: Mapping[str, Tensor]) -> None:
        """Hold what trains in float32, from the values it had before TRL's constructor; called right after that.

        DeepSpeed steps float32 copies of its own, and FSDP's wrapping makes float32 of what trains in mixed precision.

        Args:
            start: From :func:`~alignkit.models.precision.trained_values`.
        """
        settle(self.model)
        equip(self.model)
        if self.neftune_noise_alpha is not None:
            disturb_embeddings(self.model, self.neftune_noise_alpha)
            self.neftune_noise_alpha = None  # transformers would add noise of its own, which goes by the layout
        self.router_watch = watch_adapter(self.model)
        if self.is_deepspeed_enabled:
            keep_sums_whole(self.model, self.accelerator.state.deepspeed_plugin.deepspeed_config)
        autocast = self.accelerator.mixed_precision != "no"
        if not (self.is_deepspeed_enabled or (self.is_fsdp_enabled and autocast)):
            hold_in_float32(self.model, start, autocast=autocast)
        leave_casts_to_autocast(self.model)

    # --- what a bridge says ----------------------------------------------------------------------------------------

    def evaluate_objective(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, LossOutput]:
        """One forward pass with gradient: what the model put out (with ``aux_loss``), and the method's terms."""
        raise NotImplementedError

    def item_counts(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local number of items of every kind in ``item_kinds``, each an int64 scalar."""
        raise NotImplementedError

    def keep_rows(self, inputs: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        """``inputs`` with all but its first ``kept`` rows masked."""
        raise NotImplementedError

    def num_rows(self, inputs: Mapping[str, Tensor]) -> int:
        """Rows of a collated batch."""
        raise NotImplementedError

    def record_batch(self, inputs: Mapping[str, Tensor], output: Any, result: LossOutput) -> None:
        """Record what the bridge logs beside the terms and the method's metrics."""
        raise NotImplementedError

    def compare_policy(self, run: ScoringRun) -> None:
        """Compare the policy with itself before it is trained.

        Raises:
            ModelError: Its scores would not be its own, or rows of this shape cannot be run as they were to be.
        """
        raise NotImplementedError

    def models_of_run(self) -> list[nn.Module]:
        """The models of transformers that are run, without wrappers: the policy's, and those of its own beside it."""
        return [base_model(self.model)]

    # --- what is run is compared first -----------------------------------------------------------------------------

    def policy_runs(self) -> list[ScoringRun]:
        """The policy on its device, or nothing where it can be run only once training has begun."""
        if runs_only_in_training(self):
            return []
        # DeepSpeed places the policy when training begins.
        if next(self.model.parameters()).device.type != self.accelerator.device.type:
            self.model.to(self.accelerator.device)
        return [self._policy_run(self.model)]

    def compare_once_sharded(self) -> None:
        """Have a policy that :meth:`policy_runs` leaves out compared when training begins."""
        if runs_only_in_training(self):
            self.add_callback(CompareWhenTrainingBegins(self._compare_sharded))

    def _policy_run(self, model: nn.Module) -> ScoringRun:
        precision = compute_precision(self.model, self.accelerator.mixed_precision)
        return ScoringRun("the policy", model, precision, self.accelerator.autocast)

    def _compare_sharded(self) -> None:
        if self.aux_loss_enabled:
            check_aux_loss(self.model_wrapped, self.router_aux_loss_coef)
        self.compare_policy(self._policy_run(self.model_wrapped))

    # --- objective -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Loss of one micro-batch, divided by the item counts of the whole step (all ranks and accumulation steps).

        Args:
            model: The wrapped policy.
            inputs: A collated batch.
            return_outputs: Must be False; logits are never built.
            num_items_in_batch: Global counts in the order of ``item_kinds``; None when evaluating.
        """
        if return_outputs:
            raise NotImplementedError("logits are never built; use alignkit evaluate for predictions")
        return self.ruled_loss(model, inputs, num_items_in_batch)

    def batch_loss(
        self, model: nn.Module, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None, *, record: bool
    ) -> Tensor:
        """The loss of :meth:`compute_loss`, on request without counting the batch in metrics and tokens.

        Args:
            model: The policy, wrapped or not.
            inputs: A collated batch; not changed.
            num_items_in_batch: As in :meth:`compute_loss`.
            record: Whether this evaluation counts. A batch that is evaluated twice is recorded once.
        """
        if num_items_in_batch is None:
            inputs = self._without_repeated_rows(inputs)
        with self._looking_at_routers(record):
            output, result = self.evaluate_objective(model, inputs)
        counts, ranks = self.step_counts(inputs, num_items_in_batch)
        # Gradients are averaged over ranks, while the counts are already global.
        terms = [term.weight * (term.values.sum() / counts[term.item].clamp(min=1)) for term in result.terms]
        loss = sum(terms[1:], terms[0]) * ranks
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.micro_batches_of_step
            loss = loss + self.router_aux_loss_coef * output.aux_loss / steps
        if record:
            self._record(inputs, output, result)
        if num_items_in_batch is not None:
            loss = loss + self._attached_terms(record=record)
        return loss

    def _attached_terms(self, *, record: bool) -> Tensor | float:
        """This micro-batch's share of what the parametrisation adds to the loss of a step."""
        terms = self.attachment.terms()
        if not terms:
            return 0.0
        if record:
            for name, value in terms.items():
                self.record(f"loss/{name}", Metric(value.detach().reshape(1)))
        return sum(terms.values()) / self.micro_batches_of_step

    @property
    def micro_batches_of_step(self) -> int:
        """Micro-batches of the step that is being made, of each process."""
        return int(self.current_gradient_accumulation_steps)

    def step_counts(
        self, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Mapping[str, Tensor], int]:
        """Items of every kind that a micro-batch's terms are divided by, and the number of ranks they are counted over.

        Those of the whole step over all ranks; when evaluating, those of the batch.
        """
        if num_items_in_batch is None:
            return self.item_counts(inputs), 1
        return dict(zip(self.item_kinds, num_items_in_batch, strict=True)), self.accelerator.num_processes

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one step and their item counts over all ranks, in the order of ``item_kinds``."""
        batches, _ = self.next_batches(epoch_iterator, num_batches, device)
        if batches and not self.args.dataloader_drop_last:
            batches[-1] = self._without_repeated_rows(batches[-1], self.train_dataset)
        counts = torch.zeros(len(self.item_kinds), dtype=torch.long, device=device)
        for batch in batches:
            local = self.item_counts(batch)
            counts += torch.stack([local[kind] for kind in self.item_kinds]).to(device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def next_batches(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one step as the host takes them, none after the last step of the run."""
        if 0 < self.state.max_steps <= self.state.global_step:
            # Resumed after its last step. transformers would take one more before it looks.
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            num_batches = 0
        if num_batches:
            self.attachment.before_step(self.state.global_step, self.state.max_steps)
        taken: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return taken

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **how: Any) -> Any:
        """A dataloader whose rows go into whole batches of all processes where it is a stream."""
        ranks = self.accelerator.num_processes
        if isinstance(dataset, datasets.IterableDataset) and ranks > 1:
            dataset = FilledStream(dataset, batch_size * ranks)
        return super()._get_dataloader(dataset, description, batch_size, **how)

    def batch_share(self, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None) -> float:
        """What part of the step's mean loss a micro-batch is, by the first of ``item_kinds``.

        Args:
            inputs: A collated batch.
            num_items_in_batch: As in :meth:`compute_loss`; None takes the batch for the whole step.
        """
        if num_items_in_batch is None:
            return 1.0
        local, ranks = int(self.item_counts(inputs)[self.item_kinds[0]]), int(self.accelerator.num_processes)
        # Gradients are averaged over ranks, so that a rank's part is as many times as large.
        return local * ranks / max(int(num_items_in_batch[0]), 1)

    def _without_repeated_rows(self, inputs: Mapping[str, Tensor], dataset: Any = None) -> dict[str, Tensor]:
        """Mask the rows accelerate repeats to give every rank a last batch of the same size.

        Args:
            inputs: The batch that was fetched last.
            dataset: What it comes from, asked for its length where accelerate has lost the number of rows left over,
                which it does when it skips the batches before a checkpoint. A stream has filled itself up.
        """
        rows = self.num_rows(inputs)
        kept = self.rows_that_count(rows, dataset)
        return dict(inputs) if kept == rows else self.keep_rows(inputs, kept)

    def rows_that_count(self, rows: int, dataset: Any = None) -> int:
        """How many of the rows of this process, fetched last, are no repetitions; these stand behind them.

        Args:
            rows: How many were fetched.
            dataset: As in :meth:`_without_repeated_rows`.
        """
        state, ranks = self.accelerator.gradient_state, self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader:
            return rows
        left = state.remainder
        if left < 0 and isinstance(dataset, Sized):
            left = len(dataset) % (rows * ranks)
        return rows if left <= 0 else min(max(left - self.accelerator.process_index * rows, 0), rows)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, in which parameters with a learning rate of their own have groups of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        self.optimizer = optimizer = as_told(optimizer, base_model(self.model), self.args.optim_args)
        for own in self.attachment.parameter_groups(self.state.max_steps):
            move_to_own_group(optimizer, own)
        return optimizer

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save what transformers does, then all that is persistent: no callback has seen the checkpoint by then."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        for look in self.before_saving:
            look(folder)
        super()._save_checkpoint(model, trial)
        for state in self.persistent:
            state.save(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model that the optimizer results in; a collective."""
        average(self.optimizer, self.args.optim)
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights that training goes on from, and compare the model with their files.

        transformers reads a file by plain names and lets pass what does not fit: of a mixture of experts, which is
        saved expert by expert, nothing. A model is loaded the way its class loads it. FSDP's own loading is strict.
        """
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            # PEFT saves the adapter "default" in the folder itself and others, such as a frozen copy, in one of theirs.
            homes = {name: folder if name == "default" else folder / name for name in self.model.peft_config}
            files = {name: home / ADAPTER_WEIGHTS for name, home in homes.items() if home.is_dir()}
            problems = [adapter_difference(self.model, file, name) for name, file in files.items()]
        else:
            load_saved_weights(self.model, folder)
            problems = [model_difference(self.model, folder)]
        _refuse(folder, next(filter(None, problems), None))

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the weights of a checkpoint of this run, once training is over; a collective."""
        average(self.optimizer, self.args.optim)
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(
                self.model_wrapped, str(checkpoint), load_module_strict=not isinstance(self.model, PeftModel)
            )
            (problem,) = broadcast_object_list([engine_difference(self.model_wrapped, self.model, checkpoint)])
            _refuse(checkpoint, problem)
        else:
            self._load_from_checkpoint(str(checkpoint), self.model_wrapped if self.is_fsdp_enabled else None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them and all that is persistent; what DeepSpeed has loaded from shards is compared with plain files."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.is_deepspeed_enabled:
            problem = engine_difference(self.model_wrapped, self.model, folder)
            (problem,) = broadcast_object_list([problem])
            _refuse(folder, problem)
        for state in self.persistent:
            state.load(folder)

    # --- metrics ---------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """``train`` or ``eval``."""
        return "train" if self.model.training else "eval"

    def record(self, name: str, metric: Metric) -> None:
        """Add a metric to the next log; every rank must record the same names."""
        self._sums[self.mode].add(name, metric)

    def _record(self, inputs: Mapping[str, Tensor], output: Any, result: LossOutput) -> None:
        self._loss_weights = {f"loss/{term.name}": term.weight for term in result.terms}
        for term in result.terms:
            self.record(f"loss/{term.name}", ratio(term.values, term.num_items))
        for name, metric in result.metrics.items():
            self.record(name, metric)
        self.record_batch(inputs, output, result)
        if self.aux_loss_enabled:
            self._loss_weights["aux_loss"] = self.router_aux_loss_coef
            self.record("aux_loss", Metric(output.aux_loss.reshape(1)))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate, and leave the model in the mode it was in: :meth:`log` tells train from eval by it.

        The random state is left as it was, too: a data loader draws from it, and what is looked at is not changed. Of
        several sets, each is evaluated by a call of its own, with its name in the prefix.
        """
        was_training = self.model.training
        self._evaluation_prefix = metric_key_prefix
        try:
            with torch.random.fork_rng(self._generators()):
                metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return metrics
        finally:
            self.model.train(was_training)

    def _generators(self) -> list[int]:
        """Accelerators whose random state an evaluation may change: none, where nothing is drawn there."""
        return []

    def predict(self, *unused: Any, **also_unused: Any) -> Any:
        """Refused: it would return logits."""
        raise NotImplementedError("logits are never built; use alignkit evaluate for predictions")

    def _looking_at_routers(self, record: bool) -> AbstractContextManager[None]:
        """Where routers are watched, count the tokens of the first micro-batch of each step that is logged."""
        due = record and self.mode == "train" and (self.state.global_step + 1) % self.state.logging_steps == 0
        return self.router_watch.looking() if due and self.router_watch else nullcontext()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the weighted means since the last log; the evaluation loss is recomputed from its terms."""
        means = self._sums[self.mode].means(self.accelerator)
        if self.mode == "eval":
            prefix = self._evaluation_prefix
            if f"{prefix}_loss" in logs:
                logs[f"{prefix}_loss"] = sum(weight * means[name] for name, weight in self._loss_weights.items())
            logs.update({f"{prefix}_{name}": value for name, value in means.items()})
        else:
            means |= self.attachment.metrics()
            if self.router_watch:
                found, loads = self.router_watch.read(self.accelerator)
                means |= found
                if loads and self.is_world_process_zero():
                    keep_loads(Path(self.args.output_dir), self.state.global_step, loads)
            self._metrics["train"].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    def create_model_card(self, *unused: Any, **also_unused: Any) -> None:
        """Leave TRL's card out: the run writes one that names the method it really used."""


class _AfterStep(TrainerCallback):
    """Tells an attachment of every step that the optimizer has made."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Called by transformers, before it counts the step."""
        self.attachment.after_step(state.global_step)


def _refuse(folder: Path, problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(f"{folder} did not come out as it was saved, and is not resumed from: {problem}")


def batches_an_epoch(args: TrainingArguments, num_rows: int) -> int:
    """Micro-batches of each process in one pass over the rows."""
    return math.ceil(num_rows / (args.per_device_train_batch_size * args.world_size))


def ratio(numerators: Tensor, denominators: Tensor) -> Metric:
    """A metric that is one sum over another."""
    return Metric(numerators.detach().sum().float().reshape(1), denominators.sum().float().reshape(1))
