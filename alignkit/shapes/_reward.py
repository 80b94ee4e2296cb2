"""The bridge of reward models: TRL's RewardTrainer with the objective of a :class:`~alignkit.parts.method.Method`.

Inherited from TRL: model preparation, PEFT, dropout, the padding token of the model, saving. Replaced: the objective
(on a RewardBatch), collation, normalisation and metrics (``_bridge.py``).

Rows come tokenised, as candidate rows. Every sequence is a padded row of its own, and its reward is read off where
transformers reads it off.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``RewardTrainer._prepare_dataset(dataset, processing_class, args, dataset_name)``
- trl / transformers ``_set_signature_columns_if_needed`` and ``_signature_columns``
- the names in ``_bridge.py``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.columns import MARGIN_COLUMN
from alignkit.data.filling import REPEATED
from alignkit.data.lengths import RowLengths
from alignkit.data.reward_batch import RewardCollator, StepCollator
from alignkit.data.step_rows import SEPARATORS, Steps, to_step_rows
from alignkit.errors import ModelError
from alignkit.gradients._hook import ChosenRule
from alignkit.losses.types import REWARD_ITEM_KINDS, LossOutput, RewardBatch, count_reward_items
from alignkit.models._comparison import ScoringRun, length_dependence
from alignkit.models._layouts import LayoutChoice
from alignkit.models.choices import Choice
from alignkit.models.precision import trained_values
from alignkit.models.reward_model import OVERALL, check_head, head_outputs, refuse_other_rewards
from alignkit.models.vocabulary import check_token_ids
from alignkit.models.wrapping import base_model
from alignkit.parts.method import Method, load_method
from alignkit.shapes._arguments import REFUSED_FOR_REWARDS, refuse_unused
from alignkit.shapes._bridge import batches_an_epoch
from alignkit.shapes._token_budget import TokenBudget

__all__ = ["batches_an_epoch"]

METRICS: Mapping[str, str] = {"num_tokens": "tokens seen since the beginning, padding not"}
"""What the bridge logs for every method, beside ``loss/<term>``."""


class RewardModelTrainer(TokenBudget, RewardTrainer):
    """Trains a reward model on candidate rows (``prompt_ids``, ``completion_ids`` [K], ``scores`` [K]).

    Args:
        model: A decoder with a head of numbers, loaded; with ``peft_config`` it is wrapped by TRL.
        args: TRL's arguments; those of ``REFUSED_FOR_REWARDS`` must have their defaults.
        method: The method whose objective is minimised.
        options: Instance of ``method.options``.
        train_dataset: Candidate rows, with ``margin`` where they have one.
        gradient_rule: What is done to the gradient before the optimizer sees it; None is nothing.
        **inherited: ``eval_dataset``, ``processing_class``, ``peft_config``, ``callbacks``, ``optimizers`` as in TRL.

    Raises:
        ModelError: The model has no such head, or its rewards would not be its own.
    """

    item_kinds = REWARD_ITEM_KINDS
    # No loss of a mixture of experts is computed beside a head of numbers.
    aux_loss_enabled = False
    router_aux_loss_coef = 0.0
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: RewardConfig,
        *,
        method: Method,
        options: Any,
        train_dataset: Dataset | IterableDataset,
        gradient_rule: ChosenRule | None = None,
        **inherited: Any,
    ) -> None:
        refuse_unused(args, REFUSED_FOR_REWARDS, inherited)
        self.method, self.method_options = method, options
        self.dimensions = method.dimensions(options)
        self.prepare_bridge(gradient_rule)
        self._new_tokens = torch.zeros((), dtype=torch.long, device=args.device)
        check_head(model)
        self.lengths = self._look_at_rows(model, args, train_dataset, inherited.get("eval_dataset"))
        self.layout = LayoutChoice("padded", "a reward is read off a row of its own")
        tokenizer = inherited["processing_class"]
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        made = StepCollator if method.row_family is not None else RewardCollator
        collator = made(self.pad_token_id, args.pad_to_multiple_of)
        start = trained_values(model)
        with _taken_for_one_number(model):
            super().__init__(model, args=args, data_collator=collator, train_dataset=train_dataset, **inherited)
        self.hold_masters(start)
        if self.dimensions is not None:
            # Saved with the model: whoever loads it must know which of its numbers are rewards.
            base_model(self.model).config.reward_dimensions = list(self.dimensions.names) or [OVERALL]
        for run in self.policy_runs():
            self.compare_policy(run)
        self.compare_once_sharded()

    def _look_at_rows(self, model: nn.Module, args: RewardConfig, rows: Any, held_out: Any) -> RowLengths:
        """Lengths of all rows, of which each must have a reward of its own under the model.

        Raises:
            ModelError: The position encoding makes it depend on the rows beside.
        """
        evaluation = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
        lengths = RowLengths.of(rows, *(each for each in evaluation if each is not None))
        together = max(args.per_device_train_batch_size, args.per_device_eval_batch_size) > 1
        if problem := length_dependence(model, lengths, together=together):
            raise ModelError(f"the model, {problem}.")
        return lengths

    def compare_policy(self, run: ScoringRun) -> None:
        """Compare the rewards of the model with those it gives elsewhere, before it is trained."""
        refuse_other_rewards(run, self.lengths, self.pad_token_id)

    # --- objective -------------------------------------------------------------------------------------------------

    def evaluate_objective(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, LossOutput]:
        """One forward pass over every candidate, and the method's terms."""
        with head_outputs(self.model) as outputs:
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return output, self.method.objective(self._reward_batch(inputs, outputs[0]), self.method_options)

    def _reward_batch(self, inputs: Mapping[str, Tensor], given: Tensor) -> RewardBatch:
        """What the head gave for every token [R, L, E], as the candidates of rows."""
        found = given[inputs["sequence"], inputs["position"]]
        displacements, rewards = None, found[..., 0]
        if self.dimensions is not None:
            displacements = found - given[inputs["sequence"], inputs["prompt_position"]]
            rewards = displacements[..., : inputs["labels"].shape[1]].mean(-1)
        return RewardBatch(
            rewards=rewards,
            candidate_mask=inputs["candidate_mask"],
            scores=inputs["scores"],
            margin=inputs.get(MARGIN_COLUMN),
            displacements=displacements,
            labels=inputs.get("labels"),
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch of held-out rows; TRL's other trainers have such a step, this one has not."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def item_counts(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local number of rows and of candidates."""
        return count_reward_items(inputs["candidate_mask"], inputs.get("labels"))

    def num_rows(self, inputs: Mapping[str, Tensor]) -> int:
        """Prompts of a batch."""
        return len(inputs["candidate_mask"])

    def keep_rows(self, inputs: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        """Mask all prompts but the first ``kept``."""
        mask = inputs["candidate_mask"]
        is_kept = torch.arange(len(mask), device=mask.device) < kept
        return {**inputs, "candidate_mask": mask & is_kept[:, None]}

    # --- metrics ---------------------------------------------------------------------------------------------------

    def record_batch(self, inputs: Mapping[str, Tensor], output: Any, result: LossOutput) -> None:
        """Count the tokens of training."""
        if self.mode == "train":
            self._new_tokens += inputs["attention_mask"].sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log; tokens are counted on from the last log, before a resumption or not."""
        if self.mode == "train" and "loss" in logs:
            before = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
            new = int(self.accelerator.reduce(self._new_tokens, reduction="sum"))
            self._new_tokens.zero_()
            logs["num_tokens"] = (before[-1] if before else 0) + new
        super().log(logs, start_time)

    # --- data ------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Dataset, *unused: Any, **also_unused: Any) -> Dataset:
        """Rows are tokenised before a model is loaded; nothing is left to do."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        columns = ("prompt_ids", "completion_ids", "scores", MARGIN_COLUMN, "input_ids", "labels", REPEATED)
        self._signature_columns = list(columns)


@contextmanager
def _taken_for_one_number(model: Any) -> Iterator[None]:
    """TRL's constructor takes models with one number alone; nothing in it looks at the head."""
    config = model.config
    names = config.id2label
    config.num_labels = 1
    try:
        yield
    finally:
        config.num_labels = len(names)


# --- a run ------------------------------------------------------------------------------------------------------------


def training_arguments(config: Any, common: Mapping[str, Any]) -> RewardConfig:
    """TRL's arguments.

    Args:
        config: A :class:`~alignkit.shapes.reward.RewardConfig`.
        common: The arguments that all trainers share.
    """
    return RewardConfig(**common, disable_dropout=config.disable_dropout, max_length=None)


def other_models(config: Any) -> dict[str, str]:
    """None."""
    return {}


def converter(config: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """What makes candidate rows of rows of text."""
    method = load_method(config.method)
    if method.row_family is not None:
        options = config.method_options
        return partial(
            to_step_rows,
            tokenizer=tokenizer,
            max_length=config.max_length,
            steps=Steps(
                SEPARATORS.get(options.step_separator, options.step_separator), options.train_on_last_step_only
            ),
        )
    judged = method.dimensions(config.method_options)
    return partial(
        to_candidate_rows,
        tokenizer=tokenizer,
        max_length=config.max_length,
        num_candidates=method.num_candidates,
        with_margin=method.num_candidates == 2 and judged is None,
        dimensions=None if judged is None else judged.names,
    )


def prompts(config: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, converted: Any) -> list[tuple[int, ...]]:
    """None: a reward model answers nothing."""
    return []


def build(
    config: Any,
    args: RewardConfig,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    exchanges_rows: bool,
    choices: dict[str, Choice],
    **inherited: Any,
) -> RewardModelTrainer:
    """Put the trainer together.

    Args:
        config: A :class:`~alignkit.shapes.reward.RewardConfig`.
        args: TRL's arguments.
        policy: The reward model.
        data: ``train`` and ``evaluation``, tokenised.
        exchanges_rows: Never: no method on these rows does.
        choices: What has been chosen already; what is chosen here is added.
        **inherited: ``gradient_rule``, ``peft_config`` and ``callbacks`` of the trainer.
    """
    used = {"a training row": data.train, "a held-out row": data.evaluation}
    check_token_ids(policy, tokenizer, used, name=repr(config.model))
    trainer = RewardModelTrainer(
        policy,
        args,
        method=load_method(config.method),
        options=config.method_options,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        **inherited,
    )
    trainer.fill_by_tokens(config.tokens_per_batch, choices.get("tokens_per_batch"))
    return trainer


def describe(config: Any, trainer: RewardModelTrainer) -> dict[str, Any]:
    """The layout."""
    trainer.choices["layout"] = trainer.layout.as_choice()
    return {"batch_layout": asdict(trainer.layout)}
