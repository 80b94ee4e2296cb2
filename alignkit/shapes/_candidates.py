"""The preference bridge: TRL's DPOTrainer with the objective of a :class:`~alignkit.parts.method.Method`.

Inherited from TRL: model preparation, reference model or adapter, PEFT, dropout, saving. Replaced: the objective (on a
CandidateBatch), the batch layout, normalisation and metrics (``_bridge.py``), and all scoring under the reference,
which is a :class:`~alignkit.references._reference.Reference` that the trainer owns.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``DPOTrainer._precompute_ref_logps(dataset, name, batch_size)``, ``precompute_ref_logps`` and ``ref_model``
- trl ``DPOTrainer._prepare_dataset(dataset, processing_class, args, dataset_name)``
- trl / transformers ``_set_signature_columns_if_needed`` and ``_signature_columns``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.filling import REPEATED
from alignkit.data.lengths import RowLengths
from alignkit.data.prefix import PER_TOKEN_COLUMNS, CandidateCollator, on_device
from alignkit.data.unpaired import to_unpaired_rows
from alignkit.environment import launched_with_fsdp
from alignkit.errors import ConfigError, ModelError
from alignkit.gradients._hook import ChosenRule
from alignkit.losses.types import ITEM_KINDS, CandidateBatch, LossOutput, count_items
from alignkit.models._aux_loss import checked_aux_loss
from alignkit.models._comparison import (
    ScoringRun,
    length_dependence,
    refuse_other_scores,
)
from alignkit.models._forward import (
    CompletionOutput,
    base_model,
    completion_forward,
    completion_logps,
    support_packed_rows,
    use_packed_attention,
)
from alignkit.models._layouts import LayoutChoice, Requested, choose_layout, confirmed, packing_problem
from alignkit.models.choices import Choice
from alignkit.models.modes import evaluating, switch_off_dropout
from alignkit.models.precision import trained_values
from alignkit.models.vocabulary import check_token_ids
from alignkit.parts.method import Method, load_method
from alignkit.references._cache import COLUMN
from alignkit.references._reference import Reference
from alignkit.references.choosing import RunData, in_words, load_chosen_reference
from alignkit.references.models import other_models
from alignkit.shapes._arguments import REFUSED_FOR_PREFERENCE, must_be_told_to_score_ahead, refuse_unused
from alignkit.shapes._bridge import batches_an_epoch, ratio
from alignkit.shapes._late_rows import LateRows
from alignkit.shapes._probe import DispersionProbe
from alignkit.shapes._token_budget import TokenBudget

__all__ = ["batches_an_epoch", "other_models"]

METRICS: Mapping[str, str] = {
    "entropy": "entropy of the next-token distribution over completion tokens, nats",
    "mean_token_accuracy": "share of the first (chosen) candidate's tokens that are the most likely one",
}
"""What the bridge logs for every method, beside ``loss/<term>`` (and ``aux_loss`` for mixtures of experts)."""


@dataclass(frozen=True)
class BridgeSettings:
    """What the bridge needs beside TRL's arguments.

    Attributes:
        layout: ``auto``, ``padded`` or ``packed``.
        max_length: Longest prompt + completion there can be, tokens; None goes by the rows that are looked at.
        reference_cache: Directory of precomputed reference log-probs (used when ``args.precompute_ref_log_probs``).
        token_reward_cache: Directory of the log-probs that token rewards are made of.
        negative_reference: A model of its own to score the last candidate of each row under (D2O's helpful reference).
    """

    layout: Requested = "auto"
    max_length: int | None = None
    reference_cache: Path | None = None
    token_reward_cache: Path | None = None
    negative_reference: nn.Module | None = None


class PreferenceTrainer(TokenBudget, DPOTrainer):
    """Trains on candidate rows (``prompt_ids``, ``completion_ids`` [K], ``scores`` [K]) with any preference method.

    Args:
        model: The policy, loaded; with ``peft_config`` it is wrapped by TRL.
        args: TRL's arguments; those of ``REFUSED_FOR_PREFERENCE`` must have their defaults.
        method: The method whose objective is minimised.
        options: Instance of ``method.options``.
        settings: Layout and cache.
        gradient_rule: What is done to the gradient before the optimizer sees it; None is nothing.
        train_dataset: Candidate rows.
        **inherited: ``eval_dataset``, ``processing_class``, ``peft_config``, ``ref_model``, ``callbacks``,
            ``optimizers`` as in TRL.
    """

    item_kinds = ITEM_KINDS
    train_dataset: Any
    eval_dataset: Any
    _is_compared = False
    rows_change = False
    """Whether training rows may be exchanged for others while training."""

    def __init__(
        self,
        model: nn.Module,
        args: DPOConfig,
        *,
        method: Method,
        options: Any,
        train_dataset: Dataset | IterableDataset,
        settings: BridgeSettings = BridgeSettings(),
        gradient_rule: ChosenRule | None = None,
        **inherited: Any,
    ) -> None:
        refuse_unused(args, REFUSED_FOR_PREFERENCE, inherited, "ref_model")
        self.method, self.method_options, self.settings = method, options, settings
        self.needs = method.needs(options)
        self.data_collator: CandidateCollator
        self.layout: LayoutChoice = self._choose_layout(model, args, train_dataset, inherited)
        counts_tokens = checked_aux_loss(model, args.router_aux_loss_coef) != 0.0
        self.prepare_bridge(gradient_rule)
        tokenizer = inherited["processing_class"]
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        collator = CandidateCollator(pad_token_id, self.layout.layout, args.pad_to_multiple_of, counts_tokens)
        ahead = args.precompute_ref_log_probs and "reference" in self.needs
        live = "reference" in self.needs and not ahead
        args.precompute_ref_log_probs = must_be_told_to_score_ahead(model, inherited, wanted=live)
        start = trained_values(model)
        super().__init__(model, args=args, data_collator=collator, train_dataset=train_dataset, **inherited)
        self.hold_masters(start)
        args.precompute_ref_log_probs = self.precompute_ref_logps = ahead
        self._vocabulary_size: int = base_model(model).config.get_text_config().vocab_size
        if args.disable_dropout:
            switch_off_dropout(self.model)
        # TRL's own head also computes the mean logits, which nothing here reads.
        more = ("log_sum_sq_probs",) if "policy_log_sum_sq_probs" in self.needs else ()
        add_fused_lm_head(base_model(self.model), outputs=("log_probs", "entropy", "is_top1", *more))
        self.compare_models()
        self._complete_rows(ahead)
        if (schedule := method.anchor(options)) is not None:
            self.persistent.append(self.reference.follow(schedule))

    @cached_property
    def reference(self) -> Reference:
        """What log-ratios are taken against; made when TRL's constructor, or what follows it, first asks for it."""
        return Reference(
            self,
            self.ref_model,
            negative=self.settings.negative_reference,
            pad_token_id=self.data_collator.pad_token_id,
            cache=self.settings.reference_cache,
            token_reward_cache=self.settings.token_reward_cache,
        )

    def models_of_run(self) -> list[nn.Module]:
        """Those of the policy and of the reference."""
        return self.reference.bases()

    # --- what is run is compared first, and in which layout ---------------------------------------------------------

    def _choose_layout(
        self, model: nn.Module, args: DPOConfig, rows: Dataset | IterableDataset, inherited: Mapping[str, Any]
    ) -> LayoutChoice:
        """The layout that what is known of the models and rows speaks for; before TRL wraps anything.

        Raises:
            ModelError: It was asked for and cannot be, or these rows have no log-probs of their own under a model.
        """
        evaluation = inherited.get("eval_dataset")
        held_out = list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
        sets = [rows, *(held for held in held_out if held is not None)]
        self.lengths = RowLengths.of(*sets, max_length=self.settings.max_length, can_grow=self.rows_change)
        named = {"the reference": inherited.get("ref_model"), "the helpful reference": self.settings.negative_reference}
        others = {name: other for name, other in named.items() if isinstance(other, nn.Module)}
        together = max(args.per_device_train_batch_size, args.per_device_eval_batch_size) > 1
        for name, each in {"the policy": model, **others}.items():
            if problem := length_dependence(each, self.lengths, together=together):
                raise ModelError(f"{name}, {problem}.")
        adapter = inherited.get("peft_config")
        return choose_layout(self.settings.layout, model, self.lengths, adapter=adapter, others=others)

    def compare_models(self) -> None:
        """Compare every model of the run with itself, once, before its first use; a collective.

        Raises:
            ModelError: Scores would not be a model's own, or ``packed`` was asked for and one cannot run it.
        """
        if self._is_compared:
            return
        self._is_compared = True
        support_packed_rows(base_model(self.model))
        runs = self._scoring_runs()
        for run in runs:
            refuse_other_scores(run, self.lengths)
        self.take_layout(confirmed(self.layout, runs, self.lengths))
        self.compare_once_sharded()

    def take_layout(self, choice: LayoutChoice) -> None:
        """Run rows in a layout from now on, under every model; not between a forward pass and its backward pass."""
        self.layout = choice
        self.data_collator = replace(self.data_collator, layout=choice.layout)
        if choice.layout == "packed":
            for base in self.reference.bases():
                use_packed_attention(base)

    def _scoring_runs(self) -> list[ScoringRun]:
        """The models that can be run before training begins."""
        runs = self.policy_runs()
        if "reference" in self.needs:
            runs += self.reference.runs(ahead=self.args.precompute_ref_log_probs)
        return runs

    def compare_policy(self, run: ScoringRun) -> None:
        """Compare the policy with itself once it is sharded, when nothing but its own layout is left to decide."""
        refuse_other_scores(run, self.lengths)
        if self.layout.layout == "packed" and (problem := packing_problem(run, self.lengths)):
            # The dataloaders are there already, so this cannot be decided for the user any more.
            raise ModelError(f"packed rows cannot be used: {problem}. Write `layout: padded`.")

    # --- objective -------------------------------------------------------------------------------------------------

    def evaluate_objective(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[CompletionOutput, LossOutput]:
        """One forward pass over candidate rows, and the method's terms."""
        output = completion_forward(model, inputs, router_logits=self.aux_loss_enabled)
        return output, self.method.objective(self._candidate_batch(inputs, output), self.method_options)

    def item_counts(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local number of groups, chosen tokens and completion tokens."""
        return count_items(inputs["completion_mask"])

    def num_rows(self, inputs: Mapping[str, Tensor]) -> int:
        """Prompts of a batch."""
        return len(inputs["completion_mask"])

    def keep_rows(self, inputs: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        """Mask all prompts but the first ``kept``."""
        is_kept = torch.arange(self.num_rows(inputs), device=inputs["completion_mask"].device) < kept
        masks = ("completion_mask", "candidate_mask")
        masked = {name: inputs[name] & is_kept.view(-1, *[1] * (inputs[name].dim() - 1)) for name in masks}
        return {**inputs, **masked}

    def _candidate_batch(self, inputs: Mapping[str, Tensor], output: CompletionOutput) -> CandidateBatch:
        ref_token_logps = inputs.get("ref_token_logps")
        if ref_token_logps is None and "reference" in self.needs:
            ref_token_logps = self.once_a_batch("ref_token_logps", lambda: self.reference.token_logps(inputs))
        return CandidateBatch(
            policy_token_logps=output.token_logps,
            completion_mask=inputs["completion_mask"],
            candidate_mask=inputs["candidate_mask"],
            scores=inputs["scores"],
            ref_token_logps=ref_token_logps,
            token_rewards=inputs.get("token_rewards"),
            policy_log_sum_sq_probs=output.log_sum_sq_probs,
            vocabulary_size=self._vocabulary_size,
            first_equal=inputs["first_equal"],
            gather=self.accelerator.gather,
        )

    @property
    def has_frozen_reference(self) -> bool:
        """Whether there is a reference, and it stays what it was."""
        return "reference" in self.needs and not self.reference.moves

    # --- probe -----------------------------------------------------------------------------------------------------

    def probe_batches(self, rows: Dataset) -> list[dict[str, Tensor]]:
        """This rank's share of held-out rows, collated, on the device; as many batches on every rank.

        Rows beyond a multiple of the number of ranks are left out, so that each counts once.
        """
        ranks, size = self.accelerator.num_processes, self.args.per_device_eval_batch_size
        share = range(self.accelerator.process_index, len(rows) // ranks * ranks, ranks)
        batches = [[rows[i] for i in share[start : start + size]] for start in range(0, len(share), size)]
        device = self.accelerator.device
        return [on_device(self.data_collator(batch), device) for batch in batches]

    @torch.no_grad()
    def probe_logps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Policy token log-probs [B, K, T] in evaluation mode."""
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with evaluating(self.model), checkpointing, self.compute_loss_context_manager():
            return completion_logps(self.model, inputs)

    # --- metrics ---------------------------------------------------------------------------------------------------

    def record_batch(self, inputs: Mapping[str, Tensor], output: CompletionOutput, result: LossOutput) -> None:
        """Record ``METRICS``, and show a moving reference how far the policy has drifted."""
        anchor = self.reference.anchor
        if anchor is not None and self.model.training and anchor.schedule.drift_metric:
            anchor.observe(result.metrics[anchor.schedule.drift_metric])
        mask = inputs["completion_mask"]
        if output.entropy is not None and output.is_top1 is not None:
            self.record("entropy", ratio(output.entropy * mask, mask))
            self.record("mean_token_accuracy", ratio(output.is_top1[:, 0] & mask[:, 0], mask[:, 0]))

    # --- data ------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Dataset, *unused: Sequence[Any], **also_unused: Any) -> Dataset:
        """Candidate rows are tokenised before a model is loaded; nothing is left to do."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, *unused: int) -> Dataset:
        """Attach ``ref_token_logps`` [K][tokens] to candidate rows that have none."""
        if "reference" not in self.needs or COLUMN in dataset.column_names:
            return dataset
        self.compare_models()
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        return self.reference.precomputed(dataset, name, batch_size=size, layout=self.layout.layout)

    def _complete_rows(self, ahead: bool) -> None:
        """Give rows the token rewards and reference log-probs that can be had before training; a collective."""
        own = self.reference
        if "token_rewards" in self.needs:
            size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            self._change_rows(partial(own.token_rewarded, batch_size=size, layout=self.settings.layout))
        if ahead:
            self._change_rows(self._precompute_ref_logps)
            self.ref_model = None  # everything it is needed for is in the rows now
            own.release()

    def _change_rows(self, changed: Callable[[Any, str], Any]) -> None:
        """Exchange every set of rows for what is made of it and its name."""
        self.train_dataset = changed(self.train_dataset, "train")
        if isinstance(held_out := self.eval_dataset, dict):
            self.eval_dataset = {name: changed(rows, f"eval_{name}") for name, rows in held_out.items()}
        elif held_out is not None:
            self.eval_dataset = changed(held_out, "eval")

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "scores", *PER_TOKEN_COLUMNS, REPEATED]


class LateRowsTrainer(LateRows, PreferenceTrainer):
    """A preference trainer whose training rows may be exchanged between two steps."""


# --- a run ------------------------------------------------------------------------------------------------------------


def training_arguments(config: Any, common: Mapping[str, Any]) -> DPOConfig:
    """TRL's arguments.

    Args:
        config: A :class:`~alignkit.shapes.candidates.PreferenceConfig`.
        common: The arguments that all trainers share.

    Raises:
        ConfigError: The reference does not fit the launcher.
    """
    if config.reference == "precomputed" and launched_with_fsdp():
        why = "`reference: precomputed`: FSDP shards the weights that the cache is keyed by. Write reference: auto"
        raise ConfigError("the launcher uses FSDP", [why])
    return DPOConfig(
        **common,
        disable_dropout=config.disable_dropout,
        precompute_ref_batch_size=config.reference_batch_size,
        max_length=None,
    )


def converter(config: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """What makes candidate rows of rows of text."""
    method = load_method(config.method)
    common: dict[str, Any] = {"tokenizer": tokenizer, "max_length": config.max_length}
    if method.is_unpaired:
        options = config.method_options
        weights = (options.desirable_weight, options.undesirable_weight)
        seed = config.seed if config.data_seed is None else config.data_seed
        return partial(to_unpaired_rows, weights=weights, seed=seed, **common)
    return partial(to_candidate_rows, num_candidates=method.num_candidates, **common)


def prompts(config: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, converted: Any) -> list[tuple[int, ...]]:
    """Token ids of the first held-out prompts that differ; none of streamed rows."""
    if not isinstance(converted, Dataset):
        return []
    return list(dict.fromkeys(tuple(ids) for ids in converted["prompt_ids"]))[: config.num_samples]


def build(
    config: Any,
    args: DPOConfig,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    exchanges_rows: bool,
    choices: dict[str, Choice],
    **inherited: Any,
) -> PreferenceTrainer:
    """Choose and load the references and put the trainer together.

    Args:
        config: A :class:`~alignkit.shapes.candidates.PreferenceConfig`.
        args: TRL's arguments.
        data: ``train`` and ``evaluation``, tokenised.
        exchanges_rows: Whether training rows are exchanged for others while training.
        choices: What has been chosen already; what is chosen here is added.
        **inherited: ``gradient_rule``, ``peft_config`` and ``callbacks`` of the trainer.
    """
    rows = RunData.of(args, data.train, data.evaluation, exchanges_rows=exchanges_rows)
    loaded = load_chosen_reference(config, args, policy, rows, choices.get("reference"))
    if loaded.choice is not None:
        choices["reference"] = loaded.choice
    args.precompute_ref_log_probs = loaded.is_ahead
    used = {"a training row": data.train, "a held-out row": data.evaluation}
    for model in (policy, loaded.model, loaded.negative):
        if model is not None:
            check_token_ids(model, tokenizer, used, name=repr(model.name_or_path))
    cache = None if config.reference_cache is None else Path(config.reference_cache)
    trainer = (LateRowsTrainer if exchanges_rows else PreferenceTrainer)(
        policy,
        args,
        method=load_method(config.method),
        options=config.method_options,
        settings=BridgeSettings(config.layout, config.max_length, cache, negative_reference=loaded.negative),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        ref_model=loaded.model,
        **inherited,
    )
    trainer.fill_by_tokens(config.tokens_per_batch, choices.get("tokens_per_batch"))
    if data.evaluation is not None and config.probe_rows and config.probe_steps:
        probe = trainer.eval_dataset.select(range(min(config.probe_rows, len(data.evaluation))))
        trainer.add_callback(DispersionProbe(trainer, probe, config.probe_steps))
    return trainer


def describe(config: Any, trainer: PreferenceTrainer) -> dict[str, Any]:
    """The layout, recorded, and the reference in force, in words."""
    trainer.choices["layout"] = trainer.layout.as_choice()
    return {"reference": in_words(config, trainer.choices.get("reference")), "batch_layout": asdict(trainer.layout)}
