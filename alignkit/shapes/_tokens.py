"""The supervised bridge: TRL's SFTTrainer with the objective of a :class:`~alignkit.parts.method.Method`.

Inherited from TRL: model preparation, PEFT, packing, collation, saving. Replaced: the objective (on a TokenBatch),
normalisation and metrics (``_bridge.py``).

Rows come tokenised (``input_ids``, ``labels``), which TRL packs up to a length where it is asked to and never touches
otherwise. In the layout ``packed`` all examples of a micro-batch stand behind one another in a single row, attention
computes each by itself, and the head scores trained tokens alone.

Where a model cannot run that, rows are padded, and those that TRL has packed have restarting ``position_ids`` and no
attention mask. From these transformers 5.23 derives a block-diagonal mask for eager, sdpa and flex attention, and flash
attention takes the collator's lengths. An attention function without a mask function of its own gets no mask at all and
would let rows see each other, hence ``packing_difference``.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``SFTTrainer._prepare_dataset`` leaves rows with ``input_ids`` and ``labels`` as they are, but for packing
- trl ``SFTTrainer.padding_free``, ``_set_signature_columns_if_needed`` and ``_signature_columns``
- trl ``DataCollatorForLanguageModeling.torch_call(examples)``, of rows with ``input_ids`` and ``labels``
- trl ``FusedCausalLMOutput`` of the head ``SFTTrainer`` adds: ``log_probs entropy is_top1 label_mask aux_loss``
- the names in ``_bridge.py``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate, islice
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alignkit.data.filling import REPEATED
from alignkit.data.lengths import SAMPLED_ROWS, RowLengths
from alignkit.data.prefix import IGNORE_INDEX
from alignkit.data.supervised import prompts_of, to_supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.errors import ModelError
from alignkit.gradients._hook import ChosenRule
from alignkit.losses.types import LossOutput, TokenBatch
from alignkit.models._aux_loss import checked_aux_loss
from alignkit.models._comparison import (
    ScoringRun,
    agreed,
    disagreement,
    length_dependence,
    refuse_other_scores,
    runs_only_in_training,
)
from alignkit.models._distillation import head_difference
from alignkit.models._forward import LOGP_TOLERANCE, base_model, support_packed_rows, use_packed_attention
from alignkit.models._layouts import ASKED_FOR, LayoutChoice, Requested, choose_layout, confirmed, refusal
from alignkit.models.choices import Choice
from alignkit.models.precision import trained_values
from alignkit.models.vocabulary import check_token_ids
from alignkit.parts.method import Method, load_method
from alignkit.references._teacher import Teacher
from alignkit.references.teachers import load_teacher, teacher_models
from alignkit.shapes._arguments import REFUSED_FOR_SUPERVISED, refuse_unused
from alignkit.shapes._bridge import batches_an_epoch, ratio
from alignkit.shapes._example_collators import ROW_SCORED, ROW_TOKENS, PackedCollator, SupervisedCollator
from alignkit.shapes._token_budget import TokenBudget

__all__ = ["batches_an_epoch"]

TEACHER = "the method compares the policy with a teacher position by position, in rows of their own"
METRICS: Mapping[str, str] = {
    "entropy": "entropy of the next-token distribution over trained tokens, nats",
    "mean_token_accuracy": "share of the trained tokens that are the most likely one",
    "num_tokens": "tokens seen since the beginning, prompts included, padding not",
}
"""What the bridge logs for every method, beside ``loss/<term>`` (and ``aux_loss`` for mixtures of experts)."""

CHECKED_TOKENS = 16


class SupervisedTrainer(TokenBudget, SFTTrainer):
    """Trains on tokenised rows (``input_ids``, ``labels`` with -100 where nothing is trained).

    Args:
        model: The policy, loaded; with ``peft_config`` it is wrapped by TRL.
        args: TRL's arguments; those of ``REFUSED_FOR_SUPERVISED`` must have their defaults.
        method: The method whose objective is minimised.
        options: Instance of ``method.options``.
        train_dataset: Tokenised rows.
        layout: ``auto``, ``padded`` or ``packed``.
        teacher: The model the method compares the policy with, where it is not the policy with its adapter off.
        gradient_rule: What is done to the gradient before the optimizer sees it; None is nothing.
        **inherited: ``eval_dataset``, ``processing_class``, ``peft_config``, ``callbacks``, ``optimizers`` as in TRL.

    Raises:
        ModelError: The model's scores would not be its own, ``args.packing`` and packed rows see each other, or the
            layout was asked for and cannot be.
    """

    item_kinds: ClassVar[tuple[str, ...]] = ("token",)
    own_inputs: ClassVar[tuple[str, ...]] = (ROW_TOKENS, ROW_SCORED)
    """What a batch holds that is not the model's."""
    _signature_columns: list[str] | None
    data_collator: Any

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        *,
        method: Method,
        options: Any,
        train_dataset: Dataset | IterableDataset,
        layout: Requested = "auto",
        teacher: nn.Module | None = None,
        gradient_rule: ChosenRule | None = None,
        **inherited: Any,
    ) -> None:
        refuse_unused(args, REFUSED_FOR_SUPERVISED, inherited, "optimizer_cls_and_kwargs")
        self.method, self.method_options = method, options
        self.prepare_bridge(gradient_rule)
        self._new_tokens = torch.zeros((), dtype=torch.long, device=args.device)
        checked_aux_loss(model, args.router_aux_loss_coef)
        models = {"the policy": model} | ({} if teacher is None else {"the teacher": teacher})
        self.lengths = self._look_at_rows(models, args, train_dataset, inherited.get("eval_dataset"))
        choice = method.teacher(options)
        self.layout = self._choose_layout(layout, model, inherited.get("peft_config"), has_teacher=choice is not None)
        start = trained_values(model)
        super().__init__(model, args=args, train_dataset=train_dataset, **inherited)
        self.hold_masters(start)
        support_packed_rows(base_model(self.model))
        self.take_layout(self.layout)
        self.teacher = None if choice is None else Teacher(self, teacher, choice.temperature)
        for run in self.policy_runs() + ([] if self.teacher is None else self.teacher.runs()):
            self.compare_policy(run)
        self.compare_once_sharded()

    def models_of_run(self) -> list[nn.Module]:
        """Those of the policy and of its teacher."""
        return super().models_of_run() if self.teacher is None else self.teacher.bases()

    def own_collator(self, collator: DataCollatorForLanguageModeling) -> SupervisedCollator:
        """The collator of this bridge, set as TRL has set its own."""
        made = PackedCollator if self.layout.layout == "packed" else SupervisedCollator
        return made(**vars(collator))

    def _choose_layout(
        self, requested: Requested, model: nn.Module, adapter: Any, *, has_teacher: bool
    ) -> LayoutChoice:
        """The layout that what is known of the model speaks for; before TRL wraps anything."""
        if not has_teacher:
            return choose_layout(requested, model, self.lengths, adapter=adapter)
        if requested == "packed":
            raise ModelError(refusal(TEACHER))
        return LayoutChoice("padded", ASKED_FOR if requested == "padded" else TEACHER)

    def take_layout(self, choice: LayoutChoice) -> None:
        """Run rows in a layout from now on; not between a forward pass and its backward pass."""
        self.layout = choice
        self.data_collator = self.own_collator(self.data_collator)
        if choice.layout == "packed":
            use_packed_attention(base_model(self.model))

    def _look_at_rows(self, models: Mapping[str, nn.Module], args: SFTConfig, rows: Any, held_out: Any) -> RowLengths:
        """Lengths of all rows, of which each must have log-probs of its own under the models.

        Raises:
            ModelError: The position encoding makes them depend on the rows beside.
        """
        evaluation = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
        sets = [rows, *(each for each in evaluation if each is not None)]
        lengths = RowLengths.of(*sets, max_length=args.max_length)
        together = args.packing or max(args.per_device_train_batch_size, args.per_device_eval_batch_size) > 1
        for name, model in models.items():
            if problem := length_dependence(model, lengths, together=together):
                raise ModelError(f"{name}, {problem}.")
        return lengths

    def compare_policy(self, run: ScoringRun) -> None:
        """Compare a model's scores with its own logits, and rows packed together with the same rows apart.

        The policy's, and those of its teacher.

        Raises:
            ModelError: They differ.
        """
        refuse_other_scores(run, self.lengths)
        if self.teacher is not None:
            self._compare_head(run)
        choice = confirmed(self.layout, [run], self.lengths)
        if choice != self.layout and runs_only_in_training(self):
            # The dataloaders are there already, so this cannot be decided for the user any more.
            raise ModelError(refusal(choice.reason))
        if choice != self.layout:
            self.take_layout(choice)
        if self.layout.layout == "packed":
            return
        implementation = run.base.config.get_text_config()._attn_implementation
        # Flash attention takes row boundaries as such.
        if not self.padding_free or "flash" in implementation:
            return
        difference = packing_difference(run, self._packed_together())
        tolerance = LOGP_TOLERANCE[run.precision]
        found = f"rows packed together differ by {difference:.2g} nats a token from the same rows apart"
        if problem := agreed(None if difference <= tolerance else found):
            other = "" if implementation == "sdpa" else "attn_implementation: sdpa, or "
            raise ModelError(
                f"packing: true cannot be used: on {type(run.base).__name__} with attn_implementation: "
                f"{implementation} {problem} (tolerance {tolerance}), so they see each other. "
                f"Write {other}packing: false."
            )

    def _compare_head(self, run: ScoringRun) -> None:
        difference = head_difference(run, self.lengths.longest_row)
        tolerance = LOGP_TOLERANCE[run.precision]
        found = f"differ by {difference:.2g} nats a token from its own (tolerance {tolerance})"
        if problem := agreed(None if difference <= tolerance else found):
            raise ModelError(
                f"{run.label}: the log-probs that its distance from a teacher is made of {problem}: its head does more "
                "than its config says. Take a model of another architecture, or a method without a teacher (sft)."
            )

    def _packed_together(self) -> list[list[int]] | None:
        """Rows that stand behind one another in one of the first packed rows; None where each stands alone."""
        for row in islice(self.train_dataset, SAMPLED_ROWS):
            if len(lengths := row["seq_lengths"]) > 1:
                ends = list(accumulate(lengths))
                return [row["input_ids"][end - length : end] for end, length in zip(ends, lengths, strict=True)]
        return None

    # --- objective -------------------------------------------------------------------------------------------------

    def evaluate_objective(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, LossOutput]:
        """One forward pass through TRL's fused head, and the method's terms."""
        if self.teacher is None:
            output, distances = self.forward_pass(model, inputs), {}
        else:
            output = self.forward_pass(model, inputs, teacher=self.teacher.states(self._known_to_models(inputs)))
            distances = {"teacher_kl": output.teacher_kl, "teacher_agrees": output.teacher_agrees}
        batch = TokenBatch(policy_token_logps=output.log_probs, label_mask=output.label_mask, **distances)
        return output, self.method.objective(batch, self.method_options)

    def forward_pass(self, model: nn.Module, inputs: Mapping[str, Tensor], **more: Any) -> Any:
        """What TRL's fused head puts out for a batch.

        Args:
            **more: Inputs beside those of the batch.
        """
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return model(**self._known_to_models(inputs), use_cache=False, fused_lm_head=True, **extra, **more)

    def _known_to_models(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in inputs.items() if name not in self.own_inputs}

    def item_counts(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local number of trained tokens; no position predicts the first token of a row."""
        labels = inputs["shift_labels"] if "segments" in inputs else inputs["labels"][..., 1:]
        return {"token": (labels != IGNORE_INDEX).sum()}

    def num_rows(self, inputs: Mapping[str, Tensor]) -> int:
        """Rows of a batch; what packing has put together is one."""
        return len(inputs[ROW_TOKENS])

    @property
    def pads_rows(self) -> bool:
        """Whether rows are; those that TRL has packed are not."""
        return super().pads_rows and not self.padding_free

    def keep_rows(self, inputs: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        """Train and count no token of a row behind the first ``kept``."""
        lengths = inputs[ROW_TOKENS]
        counted = lengths.masked_fill(torch.arange(len(lengths), device=lengths.device) >= kept, 0)
        if "segments" in inputs:
            labels = inputs["shift_labels"]
            is_kept = torch.arange(labels.shape[1], device=labels.device) < inputs[ROW_SCORED][:kept].sum()
            return {**inputs, "shift_labels": labels.masked_fill(~is_kept, IGNORE_INDEX), ROW_TOKENS: counted}
        labels = inputs["labels"]
        positions = torch.arange(labels.shape[-1] if self.padding_free else len(labels), device=labels.device)
        is_kept = positions < (lengths[:kept].sum() if self.padding_free else kept)
        if not self.padding_free:
            is_kept = is_kept[:, None]
        return {**inputs, "labels": labels.masked_fill(~is_kept, IGNORE_INDEX), ROW_TOKENS: counted}

    # --- metrics ---------------------------------------------------------------------------------------------------

    def record_batch(self, inputs: Mapping[str, Tensor], output: Any, result: LossOutput) -> None:
        """Record ``METRICS``."""
        mask = output.label_mask
        self.record("entropy", ratio(output.entropy * mask, mask))
        self.record("mean_token_accuracy", ratio(output.is_top1 & mask, mask))
        if self.mode == "train":
            self._new_tokens += inputs[ROW_TOKENS].sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log; tokens are counted on from the last log, before a resumption or not."""
        if self.mode == "train" and "loss" in logs:
            before = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
            new = int(self.accelerator.reduce(self._new_tokens, reduction="sum"))
            self._new_tokens.zero_()
            logs["num_tokens"] = (before[-1] if before else 0) + new
        super().log(logs, start_time)

    # --- data ------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = columns if REPEATED in columns else [*columns, REPEATED]


def template_with_marks(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template that marks the assistant's turns, in place of the tokenizer's; None where that does or is none.

    TRL ships such templates for the model families it knows.

    Raises:
        ModelError: The template has no marks and its family is not known.
    """
    template = tokenizer.chat_template
    if template is None or has_generation_markers(template):
        return None
    try:
        marked: str = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ModelError(
            "assistant_only_loss: true needs a chat template that marks the assistant's turns, and this one does not. "
            "Leave the key out, so that they are told apart turn by turn; or put {% generation %} before and "
            "{% endgeneration %} behind what the assistant writes, its stop token included, save that as a file and "
            "write chat_template: FILE; or write assistant_only_loss: false for whole conversations."
        ) from error
    return marked


def trained_tokens(
    completion_only_loss: bool | None, assistant_only_loss: bool | None, tokenizer: PreTrainedTokenizerBase
) -> TrainedTokens:
    """Which tokens are trained, with the template that marks them where the tokenizer's own does not.

    Args:
        completion_only_loss, assistant_only_loss: The keys of the config.

    Raises:
        ModelError: The assistant's turns are asked for, and no template marks them.
    """
    template = None
    if assistant_only_loss is not False:
        try:
            template = template_with_marks(tokenizer)
        except ModelError:
            if assistant_only_loss:
                raise
    return TrainedTokens(completion_only_loss, assistant_only_loss, template)


def packing_difference(run: ScoringRun, rows: Sequence[Sequence[int]] | None = None) -> float:
    """How far apart the log-probs of rows packed together are from those of the same rows apart, nats.

    Of the row that differs most: one that sees another may be short beside it.

    Args:
        run: The model, as it will be run.
        rows: Token ids of two rows or more; None takes the first ids of the vocabulary.
    """
    short = (range(CHECKED_TOKENS), range(CHECKED_TOKENS, 2 * CHECKED_TOKENS))
    device = next(run.model.parameters()).device
    ids = [torch.tensor([list(row)], device=device) for row in rows or short]
    positions = torch.cat([torch.arange(row.shape[1], device=device) for row in ids])[None]

    def logps(tokens: Tensor, **extra: Tensor) -> Tensor:
        # No logits: those of a packed row of a large vocabulary take more memory than training does.
        output = run.model(input_ids=tokens, labels=tokens, use_cache=False, fused_lm_head=True, **extra)
        found: Tensor = output.log_probs[0]
        # Behind the virtual tokens that prompt-learning adapters put before it.
        return found[len(found) - tokens.shape[1] + 1 :]

    differences = []
    with run.scoring():
        packed = logps(torch.cat(ids, 1), position_ids=positions)
        for row, end in zip(ids, accumulate(row.shape[1] for row in ids), strict=True):
            # The last token of a row predicts nothing of its own.
            together = packed[end - row.shape[1] : end - 1]
            differences.append(disagreement(together, logps(row), run.precision))
    # Not Python's max, which passes over NaN.
    return float(torch.tensor(differences).max())


# --- a run ------------------------------------------------------------------------------------------------------------


def training_arguments(config: Any, common: Mapping[str, Any]) -> SFTConfig:
    """TRL's arguments.

    Args:
        config: A :class:`~alignkit.shapes.tokens.SupervisedConfig`.
        common: The arguments that all trainers share.
    """
    return SFTConfig(
        **common,
        packing=config.packing,
        packing_strategy=config.packing_strategy,
        # Held-out rows stay apart, so that every process count evaluates each of them once.
        eval_packing=False,
        # Rows are cut before they get here; packing fills rows up to this length.
        max_length=config.max_length if config.packing else None,
    )


def other_models(config: Any) -> dict[str, str]:
    """The teacher, where the method has one that is a model of its own."""
    return teacher_models(config)


def converter(config: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """What makes rows of tokens of rows of text."""
    splits_rows = config.packing and config.packing_strategy == "bfd_split"
    return partial(
        to_supervised_rows,
        tokenizer=tokenizer,
        max_length=None if splits_rows else config.max_length,
        trained=trained_tokens(config.completion_only_loss, config.assistant_only_loss, tokenizer),
    )


def prompts(config: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, converted: Any) -> list[Any]:
    """Token ids of the first held-out prompts."""
    return prompts_of(rows, tokenizer, config.num_samples)


def build(
    config: Any,
    args: SFTConfig,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    exchanges_rows: bool,
    choices: dict[str, Choice],
    **inherited: Any,
) -> SupervisedTrainer:
    """Put the trainer together.

    Args:
        config: A :class:`~alignkit.shapes.tokens.SupervisedConfig`.
        args: TRL's arguments.
        data: ``train`` and ``evaluation``, tokenised, and ``prompts``.
        exchanges_rows: Never: no method on these rows does.
        choices: What has been chosen already; what is chosen here is added.
        **inherited: ``gradient_rule``, ``peft_config`` and ``callbacks`` of the trainer.
    """
    used = {"a training row": data.train, "a held-out row": data.evaluation, "a prompt": data.prompts}
    check_token_ids(policy, tokenizer, used, name=repr(config.model))
    if (teacher := load_teacher(config)) is not None:
        check_token_ids(teacher, tokenizer, used, name=repr(teacher.name_or_path))
    trainer = SupervisedTrainer(
        policy,
        args,
        method=load_method(config.method),
        options=config.method_options,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        teacher=teacher,
        layout=config.layout,
        **inherited,
    )
    trainer.fill_by_tokens(config.tokens_per_batch, choices.get("tokens_per_batch"))
    return trainer


def describe(config: Any, trainer: SupervisedTrainer) -> dict[str, Any]:
    """The layout, and the teacher in words."""
    trainer.choices["layout"] = trainer.layout.as_choice()
    found: dict[str, Any] = {"batch_layout": asdict(trainer.layout)}
    if trainer.teacher is None:
        return found
    own = teacher_models(config).get("teacher")
    return found | {"teacher": "the policy with its adapter off" if own is None else f"{own}, a second model in memory"}
