"""The bridge of router training: the supervised one, which looks at the routing of each prompt besides.

The router logits are those of the very forward pass whose log-probs are trained, so that the distance of the routing
from the bank's targets has a gradient and nothing runs twice. What stands behind a prompt cannot change how the prompt
is routed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alignkit.data.prefix import IGNORE_INDEX
from alignkit.data.routed import prompt_length, to_routed_rows
from alignkit.data.supervised import prompts_of
from alignkit.errors import DataError, ModelError
from alignkit.losses.types import ROUTED_ITEM_KINDS, LossOutput, RoutedBatch, count_routed_items
from alignkit.models._comparison import runs_only_in_training
from alignkit.models._layouts import LayoutChoice
from alignkit.models._routers import RouterCapture, check_capture, last_routers
from alignkit.models.choices import Choice
from alignkit.models.router_watch import RouterWatch
from alignkit.models.vocabulary import check_token_ids
from alignkit.parts.method import load_method
from alignkit.references._reference import Reference
from alignkit.routing.build import build_bank, held_out_bank, refresh
from alignkit.routing.options import BankOptions
from alignkit.routing.passes import routing_vectors, token_positions
from alignkit.routing.report import bank_report, render_report
from alignkit.routing.store import RoutingBank
from alignkit.routing.success import check_success, success_columns
from alignkit.shapes._bank_refresh import BankRefresh
from alignkit.shapes._bridge import batches_an_epoch, ratio
from alignkit.shapes._example_collators import ROW_TOKENS, SupervisedCollator
from alignkit.shapes._tokens import METRICS as SUPERVISED_METRICS
from alignkit.shapes._tokens import SupervisedTrainer

__all__ = ["batches_an_epoch"]

BANK_ROW, PROMPT_LENGTH = "bank_row", "prompt_length"
"""Keys of a batch that the model never sees, both [B]: the place of a row in the bank, and the tokens of its prompt."""
GRADIENT_RATIO = "routing/gradient_ratio"
NO_NEIGHBOURS = (
    "warning: no row has neighbours among the {candidates} that may be some, so no routing is drawn towards any: with "
    "regularizer: manifold or hellinger, {method} is cross-entropy alone. Where the model solves no row, give it "
    "easier ones, or write another bank_success, or bank_success_filter: false; where it solves some, let more be "
    "neighbours (bank_neighbours: knn, a smaller bank_epsilon, a larger bank_max_similarity)."
)
"""Printed before a run that would align nothing."""
METRICS: Mapping[str, str] = SUPERVISED_METRICS | {
    GRADIENT_RATIO: "norm of the regulariser's gradient beside that of the cross-entropy, each with its weight, with "
    "respect to the router logits of all tokens; every gradient_ratio_steps steps, and never under DeepSpeed",
}
"""What the bridge logs for every method, beside ``loss/<term>``."""


@dataclass
class RoutedCollator(SupervisedCollator):
    """The supervised collator, which says besides where a row stands in the bank and where its prompt ends."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows."""
        rows = {BANK_ROW: [row[BANK_ROW] for row in examples], PROMPT_LENGTH: list(map(prompt_length, examples))}
        return {**super().torch_call(examples), **{name: torch.tensor(values) for name, values in rows.items()}}


@dataclass(frozen=True)
class RoutingSettings:
    """What a bridge of routed rows needs beside TRL's arguments.

    Attributes:
        options: What the reference bank is made of.
        directory: Where banks are kept; None is the default one.
        batch_size: Rows a forward pass of the bank's.
        refresh_steps: Optimizer steps between two banks, each made under the routers as they are; 0 keeps the first.
        only_read: Whether what takes a pass of the model must be on disk already.
        gradient_steps: Optimizer steps between two comparisons of the gradients of the terms; 0 is never.
    """

    options: BankOptions = BankOptions()
    directory: Path | None = None
    batch_size: int = 8
    refresh_steps: int = 0
    gradient_steps: int = 100
    only_read: bool = False


class RoutedTrainer(SupervisedTrainer):
    """Trains on tokenised rows of prompt and completion, with the routing of each prompt.

    Args:
        model: The policy, a mixture of experts, loaded; with ``peft_config`` it is wrapped by TRL.
        args: TRL's arguments.
        train_dataset: Rows of :func:`~alignkit.data.routed.to_routed_rows`.
        eval_dataset: Held-out rows, likewise, or None.
        settings: The bank, and where it is kept.
        **inherited: As in :class:`~alignkit.shapes._tokens.SupervisedTrainer`.

    Raises:
        ModelError: The model has no routers that could be looked at, or they would be looked at in vain.
    """

    item_kinds: ClassVar[tuple[str, ...]] = ROUTED_ITEM_KINDS
    own_inputs = (ROW_TOKENS, BANK_ROW, PROMPT_LENGTH)

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        settings: RoutingSettings = RoutingSettings(),
        **inherited: Any,
    ) -> None:
        _refuse_reentrant(args)
        self.settings = settings
        rows = {"train": _numbered(train_dataset)} | ({"eval": _numbered(eval_dataset)} if eval_dataset else {})
        last_routers(model, settings.options.bank_layers)  # What there is none of is told before anything is computed.
        super().__init__(model, args, train_dataset=rows["train"], eval_dataset=rows.get("eval"), **inherited)
        if settings.refresh_steps and runs_only_in_training(self):
            raise ModelError(
                f"bank_refresh_steps: {settings.refresh_steps} cannot be used with ZeRO-3 or FSDP, where the bank is "
                "made ahead. Write bank_refresh_steps: 0, or use DDP or ZeRO-2."
            )
        self.routers = last_routers(self.model, settings.options.bank_layers)
        self.router_watch = self.router_watch or RouterWatch(self.model, self.routers)
        self.banks = self.first_banks = self._build_banks(rows)
        if settings.refresh_steps:
            renewal = BankRefresh(self, settings.refresh_steps)
            self.add_callback(renewal)
            self.persistent.append(renewal)

    def _choose_layout(self, *unused: Any, **also_unused: Any) -> LayoutChoice:
        """Rows of their own."""
        return LayoutChoice("padded", "how the tokens of a row are routed is read off a row of its own")

    def own_collator(self, collator: DataCollatorForLanguageModeling) -> SupervisedCollator:
        """One that says where rows stand in the bank."""
        return RoutedCollator(**vars(collator))

    def _build_banks(self, rows: Mapping[str, Dataset]) -> dict[str, RoutingBank]:
        """The bank of the training rows, and what it says of held-out ones, under the model without what trains."""
        if runs_only_in_training(self):
            # A second engine on the same modules would confuse the one that trains; what is on disk needs none.
            banks = build_banks(self.model, self.processing_class, rows, replace(self.settings, only_read=True))
        else:
            run = Reference(self, None, pad_token_id=self.processing_class.pad_token_id).run()
            with run.context():
                check_capture(run.model, self.routers)
                banks = build_banks(run.model, self.processing_class, rows, self.settings)
        if self.is_world_process_zero():
            report = bank_report(banks["train"])
            print(f"reference bank in {banks['train'].directory}\n{render_report(report)}\n")
            if not banks["train"].found["has_target"].any():
                print(NO_NEIGHBOURS.format(candidates=report["candidates"], method=self.method.name))
        return banks

    def refresh_banks(self) -> None:
        """Make the banks anew under the policy as it is; a collective. The embeddings are those of the first."""
        run, tokenizer, settings = self._policy_run(self.model_wrapped), self.processing_class, self.settings
        first, folder = self.first_banks["train"], self.first_banks["train"].directory / "refreshed"
        adapter = "default" if isinstance(self.model, PeftModel) else None
        rows = {"train": self.train_dataset} | ({"eval": self.eval_dataset} if "eval" in self.banks else {})
        given = {name: RowsOfBank(split, tokenizer) for name, split in rows.items()}
        how: dict[str, Any] = {"batch_size": settings.batch_size, "adapter": adapter}
        with run.scoring():
            bank = refresh(first, run.model, tokenizer, given["train"], settings.options, folder, **how)
            self.banks = {"train": bank}
            if "eval" in given:
                place = folder / "held-out"
                self.banks["eval"] = held_out_bank(
                    bank, run.model, tokenizer, given["eval"], settings.options, place, **how
                )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on the held-out rows.

        Raises:
            DataError: Other rows are given: their numbers would be looked up in a bank they are not in.
        """
        given = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
        if any(rows is not None and rows is not self.eval_dataset for rows in given):
            told = "rows other than eval_dataset have no place in the bank: give them to the trainer as eval_dataset"
            raise DataError("evaluate", [told])
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # --- objective -------------------------------------------------------------------------------------------------

    def evaluate_objective(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, LossOutput]:
        """One forward pass through TRL's fused head, in which the routers are listened to."""
        with RouterCapture(self.routers) as captured:
            output = self.forward_pass(model, inputs)
        result = self.method.objective(self._batch(output, captured.logits, inputs), self.method_options)
        if self._compares_gradients():
            self._compare_gradients(result, captured.logits)
        return output, result

    def _batch(self, output: Any, logits: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> RoutedBatch:
        options, lengths = self.settings.options, inputs[PROMPT_LENGTH]
        positions = token_positions(torch.zeros_like(lengths), lengths, options.bank_token_set)
        rows = inputs[BANK_ROW]
        bank = self.banks[self.mode].targets(rows)
        return RoutedBatch(
            policy_token_logps=output.log_probs,
            label_mask=output.label_mask,
            routing=routing_vectors(logits, self.routers, positions, options.bank_routing_score),  # type: ignore[arg-type]
            target_routing=bank.target,
            target_variance=bank.variance,
            has_target=bank.has_target,
            base_routing=self.first_banks[self.mode].routing[rows.cpu()].to(rows.device),
            num_layers=len(self.routers),
            step=self.state.global_step,
        )

    def item_counts(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local number of trained tokens, and of rows that have some; no position predicts the first token of a row."""
        return count_routed_items(inputs["labels"][..., 1:] != IGNORE_INDEX)

    # --- how strongly the terms pull -------------------------------------------------------------------------------

    def _compares_gradients(self) -> bool:
        every = 0 if self.is_deepspeed_enabled else self.settings.gradient_steps
        return bool(every and torch.is_grad_enabled() and self.mode == "train" and self.state.global_step % every == 0)

    def _compare_gradients(self, result: LossOutput, logits: Sequence[Tensor]) -> None:
        """Record how strongly the regulariser pulls at the routers, beside the cross-entropy.

        By the gradients with respect to the router logits of all tokens, which need not be gathered from any process.
        DeepSpeed takes every gradient that passes the model's output for that of a step, and so allows no comparison.
        """
        norms = []
        for term in result.terms:
            total = term.weight * term.values.sum() / term.num_items.clamp(min=1)
            gradients = torch.autograd.grad(total, logits, retain_graph=True, allow_unused=True)
            norms.append(sum(found.float().square().sum() for found in gradients if found is not None) ** 0.5)
        ce, regularizer = norms
        self.record(GRADIENT_RATIO, ratio(regularizer, ce))

    # --- data ------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = columns if BANK_ROW in columns else [*columns, BANK_ROW]


def build_banks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Dataset], settings: RoutingSettings
) -> dict[str, RoutingBank]:
    """The bank of ``train`` rows and, where there are some, of ``eval`` rows, whose neighbours are among the others.

    A collective. What is on disk already is not computed again.

    Args:
        model: As it is called, with a completion head and without what trains.
        tokenizer: Of the model.
        rows: Of :func:`~alignkit.data.routed.to_routed_rows`.
        settings: What the bank is made of.
    """
    given = {name: RowsOfBank(split, tokenizer) for name, split in rows.items()}
    how: dict[str, Any] = {"batch_size": settings.batch_size, "only_read": settings.only_read}
    bank = build_bank(model, tokenizer, given["train"], settings.options, settings.directory, **how)
    if "eval" not in given:
        return {"train": bank}
    folder = bank.directory / "held-out"
    other = held_out_bank(bank, model, tokenizer, given["eval"], settings.options, folder, **how)
    return {"train": bank, "eval": other}


class RowsOfBank(Sequence[Mapping[str, Any]]):
    """Tokenised rows as the bank reads them.

    Args:
        rows: Of :func:`~alignkit.data.routed.to_routed_rows`.
        tokenizer: Writes the prompts as text.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        """A row: ``prompt_ids``, ``completion_ids``, ``text`` of the prompt, and the columns beside the tokens."""
        row = self.rows[place]
        length = prompt_length(row)
        prompt, completion = row["input_ids"][:length], row["input_ids"][length:]
        text = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return {**row, "prompt_ids": prompt, "completion_ids": completion, "text": text}


def _numbered(rows: Dataset) -> Dataset:
    return rows.add_column(BANK_ROW, range(len(rows)))


def _refuse_reentrant(args: TrainingArguments) -> None:
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ModelError(
            "gradient_checkpointing_kwargs={'use_reentrant': True} computes the forward pass without gradients, so "
            "that the routing would have none. Write use_reentrant: False, which is transformers' default."
        )


# --- a run ------------------------------------------------------------------------------------------------------------


def training_arguments(config: Any, common: Mapping[str, Any]) -> SFTConfig:
    """TRL's arguments.

    Args:
        config: A :class:`~alignkit.shapes.routed.RouterConfig`.
        common: The arguments that all trainers share.
    """
    return SFTConfig(**common, packing=False, max_length=None)


def settings_of(config: Any) -> RoutingSettings:
    """What a configuration says of the bank."""
    directory = None if config.bank_dir is None else Path(config.bank_dir)
    return RoutingSettings(
        config, directory, config.bank_batch_size, config.bank_refresh_steps, config.gradient_ratio_steps
    )


def other_models(config: Any) -> dict[str, str]:
    """There are none beside the policy."""
    return {}


def converter(config: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """What makes rows of tokens of rows of text, and refuses training rows whose success could not be told."""
    carried = success_columns(config) if config.bank_success == "generation" else ()
    tokenise = partial(to_routed_rows, tokenizer=tokenizer, max_length=config.max_length, carried=carried)

    def convert(rows: Any, *, name: str, **how: Any) -> Any:
        converted, report = tokenise(rows, name=name, **how)
        if name == "train":  # Whether held-out rows are solved is not asked.
            check_success(RowsOfBank(converted, tokenizer), config)
        return converted, report

    return convert


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
) -> RoutedTrainer:
    """Put the trainer together.

    Args:
        config: A :class:`~alignkit.shapes.routed.RouterConfig`.
        args: TRL's arguments.
        data: ``train`` and ``evaluation``, tokenised, and ``prompts``.
        exchanges_rows: Never: no method on these rows does.
        choices: What has been chosen already; what is chosen here is added.
        **inherited: ``gradient_rule``, ``peft_config`` and ``callbacks`` of the trainer.
    """
    used = {"a training row": data.train, "a held-out row": data.evaluation, "a prompt": data.prompts}
    check_token_ids(policy, tokenizer, used, name=repr(config.model))
    trainer = RoutedTrainer(
        policy,
        args,
        method=load_method(config.method),
        options=config.method_options,
        settings=settings_of(config),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        **inherited,
    )
    trainer.fill_by_tokens(config.tokens_per_batch, choices.get("tokens_per_batch"))
    return trainer


def describe(config: Any, trainer: RoutedTrainer) -> dict[str, Any]:
    """The bank."""
    bank = trainer.banks["train"]
    about = {"directory": str(bank.directory), "layers": bank.facts["layers"]}
    return {"bank": about | bank_report(bank)}
