"""The preference bridge: TRL's DPOTrainer with the objective of a :class:`~alignkit.methods.method.Method`.

Inherited from TRL: model preparation, reference model or adapter, PEFT, dropout, saving. Replaced: the objective (on a
CandidateBatch), the batch layout, the normalisation (one division by the global item counts), the metrics (weighted
sums, gathered once a log) and the cache of reference log-probs (``_reference_scoring.py``).

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``DPOTrainer._prepare_dataset(dataset, processing_class, args, dataset_name)``
- trl ``DPOTrainer._metrics`` and the averaging in ``log``
- trl ``DPOTrainer.aux_loss_enabled`` and ``router_aux_loss_coef``
- trl / transformers ``_set_signature_columns_if_needed`` and ``_signature_columns``
- transformers ``Trainer.get_batch_samples``, whose second value reaches ``compute_loss`` as ``num_items_in_batch``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from alignkit.data.prefix import PER_TOKEN_COLUMNS, CandidateCollator
from alignkit.losses.types import ITEM_KINDS, CandidateBatch, LossOutput, Metric, count_items
from alignkit.methods._forward import (
    CompletionOutput,
    base_model,
    completion_forward,
    completion_logps,
    support_packed_rows,
    use_packed_attention,
)
from alignkit.methods._layouts import LayoutChoice, choose_layout
from alignkit.methods._metrics import MetricSums
from alignkit.methods._reference_scoring import ReferenceScoring
from alignkit.methods.method import Method

METRICS: Mapping[str, str] = {
    "entropy": "entropy of the next-token distribution over completion tokens, nats",
    "mean_token_accuracy": "share of the first (chosen) candidate's tokens that are the most likely one",
}
"""What the bridge logs for every method, beside ``loss/<term>`` (and ``aux_loss`` for mixtures of experts)."""


@dataclass(frozen=True)
class BridgeSettings:
    """What the bridge needs beside TRL's arguments.

    Attributes:
        layout: ``auto``, ``padded`` or ``shared_prefix``.
        max_length: Longest prompt + completion there can be, tokens; None goes by the rows that are looked at.
        reference_cache: Directory of precomputed reference log-probs (used when ``args.precompute_ref_log_probs``).
        token_reward_cache: Directory of the log-probs that token rewards are made of.
        negative_reference: A model of its own to score the last candidate of each row under (D2O's helpful reference).
    """

    layout: Literal["auto", "padded", "shared_prefix"] = "auto"
    max_length: int | None = None
    reference_cache: Path | None = None
    token_reward_cache: Path | None = None
    negative_reference: nn.Module | None = None


class PreferenceTrainer(ReferenceScoring):
    """Trains on candidate rows (``prompt_ids``, ``completion_ids`` [K], ``scores`` [K]) with any preference method.

    Args:
        model: The policy, loaded; with ``peft_config`` it is wrapped by TRL.
        args: TRL's arguments; its ``loss_type`` and ``beta`` are not used.
        method: The method whose objective is minimised.
        options: Instance of ``method.options``.
        settings: Layout and cache.
        train_dataset: Candidate rows.
        **inherited: ``eval_dataset``, ``processing_class``, ``peft_config``, ``ref_model``, ``callbacks``,
            ``optimizers`` as in TRL.
    """

    _tag_names = ["alignkit", "trl"]
    _name = "alignkit"
    # The loss is divided by the item counts of the whole accumulation window.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: DPOConfig,
        *,
        method: Method,
        options: Any,
        train_dataset: Dataset | IterableDataset,
        settings: BridgeSettings = BridgeSettings(),
        **inherited: Any,
    ) -> None:
        self.method, self.method_options, self.settings = method, options, settings
        self.needs = method.needs(options)
        self.layout: LayoutChoice = self._choose_layout(model, args, train_dataset)
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._loss_weights: dict[str, float] = {}
        tokenizer = inherited["processing_class"]
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        collator = CandidateCollator(pad_token_id, self.layout.layout, args.pad_to_multiple_of)
        if "reference" not in self.needs:
            args.precompute_ref_log_probs = True  # or TRL would load a reference for nothing
        super().__init__(model, args=args, data_collator=collator, train_dataset=train_dataset, **inherited)
        self._vocabulary_size: int = base_model(model).config.get_text_config().vocab_size
        # TRL's own head also computes the mean logits, which nothing here reads.
        add_fused_lm_head(base_model(self.model), outputs=("log_probs", "entropy", "is_top1"))
        if "token_rewards" in self.needs:
            self._add_token_rewards()
        if args.precompute_ref_log_probs:
            self.ref_model = None  # everything it is needed for is in the rows now
        self._set_up_anchor(method.anchor(options))

    def _choose_layout(self, model: nn.Module, args: DPOConfig, rows: Dataset | IterableDataset) -> LayoutChoice:
        """The layout of the run, for which the model is made ready; before TRL wraps it."""
        text_config = base_model(model).config.get_text_config().to_dict()
        coefficient = args.router_aux_loss_coef
        aux_loss = bool(text_config.get("router_aux_loss_coef", 0.0) if coefficient is None else coefficient)
        support_packed_rows(base_model(model))
        choice = choose_layout(
            self.settings.layout,
            model,
            rows,
            batch_size=args.per_device_train_batch_size,
            max_length=self.settings.max_length,
            aux_loss=aux_loss and "output_router_logits" in text_config,
            verify=not is_deepspeed_zero3_enabled(),
        )
        if choice.layout == "shared_prefix":
            use_packed_attention(base_model(model))
        return choice

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
            num_items_in_batch: Global counts in the order of ``ITEM_KINDS``; None when evaluating.
        """
        if return_outputs:
            raise NotImplementedError("logits are never built; use scripts/evaluate.py for predictions")
        if num_items_in_batch is None:
            inputs = self._without_repeated_rows(inputs)
        output = completion_forward(model, inputs, router_logits=self.aux_loss_enabled)
        batch = self._candidate_batch(inputs, output)
        result = self.method.objective(batch, self.method_options)
        if num_items_in_batch is None:
            counts, ranks = count_items(inputs["completion_mask"]), 1
        else:
            counts, ranks = dict(zip(ITEM_KINDS, num_items_in_batch, strict=True)), self.accelerator.num_processes
        # Gradients are averaged over ranks, while the counts are already global.
        terms = [term.weight * (term.values.sum() / counts[term.item].clamp(min=1)) for term in result.terms]
        loss = sum(terms[1:], terms[0]) * ranks
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * output.aux_loss / steps
        self._record(inputs, output, result)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one step and their item counts over all ranks, in the order of ``ITEM_KINDS``."""
        if 0 < self.state.max_steps <= self.state.global_step:
            # Resumed after its last step. transformers would take one more before it looks.
            self.control.should_training_stop = True
            num_batches = 0
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(len(ITEM_KINDS), dtype=torch.long, device=device)
        for batch in batches:
            local = count_items(batch["completion_mask"])
            counts += torch.stack([local[kind] for kind in ITEM_KINDS]).to(device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def _without_repeated_rows(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mask the rows accelerate repeats to give every rank a last evaluation batch of the same size."""
        state, masks = self.accelerator.gradient_state, ("completion_mask", "candidate_mask")
        if not state.end_of_dataloader or state.remainder <= 0:
            return dict(inputs)
        batch_size = len(inputs["completion_mask"])
        kept = max(state.remainder - self.accelerator.process_index * batch_size, 0)
        is_kept = torch.arange(batch_size, device=inputs["completion_mask"].device) < kept
        masked = {name: inputs[name] & is_kept.view(-1, *[1] * (inputs[name].dim() - 1)) for name in masks}
        return {**inputs, **masked}

    def _candidate_batch(self, inputs: Mapping[str, Tensor], output: CompletionOutput) -> CandidateBatch:
        ref_token_logps = inputs.get("ref_token_logps")
        if ref_token_logps is None and "reference" in self.needs:
            ref_token_logps = self.reference_logps(inputs)
        return CandidateBatch(
            policy_token_logps=output.token_logps,
            completion_mask=inputs["completion_mask"],
            candidate_mask=inputs["candidate_mask"],
            scores=inputs["scores"],
            ref_token_logps=ref_token_logps,
            token_rewards=inputs.get("token_rewards"),
            vocabulary_size=self._vocabulary_size,
        )

    @property
    def has_frozen_reference(self) -> bool:
        """Whether there is a reference, and it stays what it was."""
        return "reference" in self.needs and self.anchor is None

    # --- probe -----------------------------------------------------------------------------------------------------

    def probe_batches(self, rows: Dataset) -> list[dict[str, Tensor]]:
        """This rank's share of held-out rows, collated, on the device; as many batches on every rank.

        Rows beyond a multiple of the number of ranks are left out, so that each counts once.
        """
        ranks, size = self.accelerator.num_processes, self.args.per_device_eval_batch_size
        share = range(self.accelerator.process_index, len(rows) // ranks * ranks, ranks)
        batches = [[rows[i] for i in share[start : start + size]] for start in range(0, len(share), size)]
        device = self.accelerator.device
        return [{k: v.to(device) for k, v in self.data_collator(batch).items()} for batch in batches]

    @torch.no_grad()
    def probe_logps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Policy token log-probs [B, K, T] in evaluation mode."""
        self.model.eval()
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            with self.compute_loss_context_manager():
                logps = completion_logps(self.model, inputs)
        self.model.train()
        return logps

    # --- metrics ---------------------------------------------------------------------------------------------------

    def record(self, name: str, metric: Metric) -> None:
        """Add a metric to the next log; every rank must record the same names."""
        self._sums["train" if self.model.training else "eval"].add(name, metric)

    def _record(self, inputs: Mapping[str, Tensor], output: CompletionOutput, result: LossOutput) -> None:
        self._loss_weights = {f"loss/{term.name}": term.weight for term in result.terms}
        for term in result.terms:
            self.record(f"loss/{term.name}", _ratio(term.values, term.num_items))
        for name, metric in result.metrics.items():
            self.record(name, metric)
        if self.anchor is not None and self.model.training and self.anchor.schedule.drift_metric:
            self.anchor.observe(result.metrics[self.anchor.schedule.drift_metric])
        mask = inputs["completion_mask"]
        if output.entropy is not None and output.is_top1 is not None:
            self.record("entropy", _ratio(output.entropy * mask, mask))
            self.record("mean_token_accuracy", _ratio(output.is_top1[:, 0] & mask[:, 0], mask[:, 0]))
        if self.aux_loss_enabled:
            self._loss_weights["aux_loss"] = self.router_aux_loss_coef
            self.record("aux_loss", Metric(output.aux_loss.reshape(1)))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and leave the model in the mode it was in: :meth:`log` tells train from eval by it."""
        was_training = self.model.training
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.model.train(was_training)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the weighted means since the last log; the evaluation loss is recomputed from its terms."""
        mode = "train" if self.model.training else "eval"
        means = self._sums[mode].means(self.accelerator)
        if "eval_loss" in logs:
            logs["eval_loss"] = sum(weight * means[name] for name, weight in self._loss_weights.items())
        self._metrics[mode].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    # --- data and card ---------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Dataset, *unused: Sequence[Any], **also_unused: Any) -> Dataset:
        """Candidate rows are tokenised before a model is loaded; nothing is left to do."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "scores", *PER_TOKEN_COLUMNS]

    def create_model_card(self, *unused: Any, **also_unused: Any) -> None:
        """Leave TRL's card out: the run writes one that names the method it really used."""


def _ratio(numerators: Tensor, denominators: Tensor) -> Metric:
    return Metric(numerators.detach().sum().float().reshape(1), denominators.sum().float().reshape(1))
