"""The steps of ``alignkit prune``: what is asked for, rows, the dense model, its plan, the export and its figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.evals._completions import (
    Questions,
    batches_of,
    exact_match,
    figures,
    likelihood,
    load_questions,
    load_tokens,
)
from alignkit.models.adapter_config import is_sparse_kind
from alignkit.models.card_file import read_card
from alignkit.models.export import checkpoint_dtype, dequantized, is_tied, part_head, tie_if_equal
from alignkit.models.files import AdapterFiles
from alignkit.models.loading import (
    ModelSource,
    check_base,
    is_quantized,
    load_adapter,
    load_model,
    quantization_of,
)
from alignkit.models.vocabulary import check_token_ids
from alignkit.programs.merge import MAX_TOKENS, TEXTS, quantization_in_training
from alignkit.pruning.amounts import Kept, kept_sizes
from alignkit.pruning.export import ExportReport, export
from alignkit.pruning.families import find_family, sizes_of
from alignkit.pruning.importance import plan_by_importance
from alignkit.pruning.learnt import Learnt, learnt
from alignkit.pruning.picture import PICTURE, draw_plan
from alignkit.pruning.plan import SIZED, PruningPlan
from alignkit.pruning.report import Origin, cache_bytes, write_card, write_report
from alignkit.pruning.validate import target_config
from alignkit.reports.estimates import RowSums
from alignkit.reports.table import render_table
from alignkit.sampling.generation import Sampling


@dataclass(frozen=True)
class Task:
    """What is asked for, as far as it can be known before anything is loaded.

    Attributes:
        source: The dense model, or the base of the adapter as training saw it; float32.
        adapter: Merged into it, or None.
        dtype: Type of the weights to write.
        kept: Sizes that stay, where they are asked for.
        plan: A plan that is given, or None.
        lines: What the user should know of sizes that were rounded.
    """

    source: ModelSource
    adapter: AdapterFiles | None
    dtype: str
    kept: Kept | None
    plan: PruningPlan | None
    lines: list[str]


@dataclass(frozen=True)
class Rows:
    """The data.

    Attributes:
        scored: Rows that structures are scored on, or None.
        held_out: Rows of which the likelihood is measured, or None.
        questions: Prompts whose answers are judged, or None.
    """

    scored: Dataset | None
    held_out: Dataset | None
    questions: Questions | None


def task_of(arguments: argparse.Namespace, base: str, revision: str | None, adapter: AdapterFiles | None) -> Task:
    """Judge what is asked for by the config of the model alone.

    Args:
        arguments: The command line.
        base, revision, adapter: What its ``check_inputs`` found.

    Raises:
        ModelError: The family cannot be pruned, no stock class loads what would be left, or the adapter was trained on
            another base.
    """
    quantization = arguments.quantization or ("none" if adapter is None else quantization_in_training(adapter))
    source = ModelSource(base, arguments.revision or revision, quantization=quantization)
    quantization_of(source)
    options = {"revision": source.revision} if source.revision else {}
    config = AutoConfig.from_pretrained(base, **options)
    find_family(config)
    if adapter is not None:
        check_base(adapter, source)
    for card in _cards(source, adapter):
        read_card(card)
    amounts = {axis: value for axis in SIZED if (value := getattr(arguments, axis)) is not None}
    kept, lines, plan = None, [], None
    if amounts or arguments.drop_layers:
        kept, lines = kept_sizes(config, amounts, arguments.drop_layers)
    if arguments.plan is not None:
        plan = PruningPlan.load(arguments.plan.expanduser())
    wanted = plan if kept is None else kept.first(config)
    if wanted is not None and (adapter is None or not is_sparse_kind(adapter.kind)):
        target_config(wanted, _plain(config), keep_tied=arguments.keep_tied)
    dtype = checkpoint_dtype(source) if arguments.dtype == "auto" else arguments.dtype
    return Task(source, adapter, dtype, kept, plan, lines)


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model as it will be once it is dequantised."""
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    return type(config).from_dict(values)


def _cards(source: ModelSource, adapter: AdapterFiles | None) -> list[Path]:
    """The card that the model to write inherits from, if there is one."""
    folder = Path(source.model).expanduser() if adapter is None else adapter.directory
    return [card for card in [folder / "README.md"] if card.is_file()]


def load_data(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read and tokenise everything that is to be read.

    Args:
        arguments: The command line.
        tokenizer: Of the model.
    """
    limits = {"max_length": arguments.max_length}
    scored = held_out = questions = None
    if arguments.data is not None:
        scored = load_tokens(arguments.data, tokenizer, max_rows=arguments.num_rows, name="--data", **limits)
    if arguments.evaluate is not None:
        most = arguments.evaluate_rows
        held_out = load_tokens(arguments.evaluate, tokenizer, max_rows=most, name="--evaluate", **limits)
        if (column := arguments.answer_column) is not None:
            questions = load_questions(arguments.evaluate, tokenizer, column=column, max_rows=most, name="--evaluate")
    return Rows(scored, held_out, questions)


def prune(
    arguments: argparse.Namespace,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    folder: Path,
    state: PartialState,
) -> str:
    """Prune, export, evaluate and report; returns what to print.

    Args:
        arguments: The command line.
        task: What is asked for.
        tokenizer: Of the model.
        rows: The data.
        folder: To write.
        state: This process.
    """
    measure = _Measured(arguments, tokenizer, rows, state)
    texts = [ids[:MAX_TOKENS] for ids in tokenizer(list(TEXTS))["input_ids"]]
    found = _dense(task, tokenizer, rows, measure, state)
    plan, choice = _plan(arguments, task, found, rows)
    dense = sizes_of(found.model.config)
    report = export(
        found.model,
        plan,
        folder,
        tokenizer=tokenizer,
        texts=texts,
        folds=found.folds,
        keep_tied=found.keep_tied or arguments.keep_tied,
        dtype=task.dtype,
    )
    if measure.wanted:
        del found
        measure("pruned", load_model(ModelSource(str(folder)), state.device))
    origin = _origin(task, choice)
    record = write_report(folder, report, origin, measure.record())
    draw_plan(folder / PICTURE, plan, dense, title=origin.model_name)
    write_card(folder, record, origin)
    return describe(report, record)


def _origin(task: Task, choice: Mapping[str, Any]) -> Origin:
    adapter, card = task.adapter, next(iter(_cards(task.source, task.adapter)), None)
    merged = (None, None) if adapter is None else (adapter.directory, adapter.kind)
    return Origin(task.source.model, task.source.revision, *merged, choice, card)


class _Measured:
    """Figures of models on the same rows, in the order in which they were measured."""

    def __init__(
        self, arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, rows: Rows, state: PartialState
    ) -> None:
        self.arguments, self.tokenizer, self.rows, self.state = arguments, tokenizer, rows, state
        self.wanted = rows.held_out is not None
        self.found: dict[str, dict[str, RowSums]] = {}

    def __call__(self, name: str, model: PreTrainedModel | PeftModel) -> None:
        if self.rows.held_out is None:
            return
        size = self.arguments.batch_size
        used = {"a row of --evaluate": self.rows.held_out}
        check_token_ids(model, self.tokenizer, used, name=f"the {name} model")
        figures = {"nats_per_token": likelihood(model, self.rows.held_out, batch_size=size)}
        if self.rows.questions is not None:
            sampling = Sampling(max_new_tokens=self.arguments.max_new_tokens, batch_size=size)
            figures["exact_match"] = exact_match(
                model, self.tokenizer, self.rows.questions, sampling, self.state, progress=f"{name}: answers"
            )
        self.found[name] = figures

    def record(self) -> dict[str, Any] | None:
        """For the report; None where nothing was measured."""
        if self.rows.held_out is None:
            return None
        return {
            "rows": len(self.rows.held_out),
            "max_length": self.arguments.max_length,
            "max_new_tokens": None if self.rows.questions is None else self.arguments.max_new_tokens,
            "dtype": "float32",
            "figures": figures(self.found),
        }


def _dense(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    measure: _Measured,
    state: PartialState,
) -> Learnt:
    """The dense model in float32, measured, and what an adapter has to say of it."""
    # Dequantised before any forward pass: one on the CPU makes bitsandbytes repack 4-bit weights.
    base = load_model(task.source, state.device)
    if is_quantized(base):
        base = dequantized(base)
    check_token_ids(base, tokenizer, {"a row of --data": rows.scored}, name=repr(task.source.model))
    if task.adapter is None:
        measure("dense", base)
        return Learnt(base, PruningPlan(), {})
    was_tied = is_tied(base)
    wrapped = load_adapter(base, task.adapter)
    if wrapped.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"an adapter of kind {task.adapter.kind} adds virtual tokens and no weights: it has none to prune"
        )
    with wrapped.disable_adapter():
        measure("base", wrapped)
    if was_tied:
        part_head(base)
    try:
        found = learnt(wrapped)
    except ValueError as error:
        raise ModelError(f"the adapter {str(task.adapter.directory)!r} cannot be merged: {error}") from error
    if was_tied:
        tie_if_equal(found.model)
    if not is_sparse_kind(task.adapter.kind):
        measure("tuned", found.model)
    return found


def _plan(
    arguments: argparse.Namespace, task: Task, found: Learnt, rows: Rows
) -> tuple[PruningPlan, Mapping[str, Any]]:
    """The plan, and how it came about."""
    if task.kept is None:
        plan = found.plan if task.plan is None else found.plan.merged_with(task.plan)
        if task.adapter is None or not is_sparse_kind(task.adapter.kind):
            return plan, {"by": "plan"}
        return plan, {"by": "adapter", "length_cut_off": found.cut}
    scored = rows.scored
    batches = () if scored is None else batches_of(scored, arguments.batch_size)
    plan = plan_by_importance(found.model, batches, criterion=arguments.criterion, **vars(task.kept))
    read = {} if scored is None else {"rows": len(scored), "tokens": sum(map(len, scored["input_ids"]))}
    return plan, {"by": arguments.criterion, **read}


def describe(report: ExportReport, record: Mapping[str, Any]) -> str:
    """Sizes before and after, the check, and the figures.

    Args:
        report: Of the export.
        record: What was written of it.
    """
    before, after = report.dense, report.pruned
    rows = [
        (name, getattr(before.axes, name), getattr(after.axes, name))
        for name in ("hidden", "ffn", "kv_groups", "layers")
    ]
    rows += [
        ("parameters", before.parameters, after.parameters),
        ("bytes of weights", before.bytes, after.bytes),
        ("bytes of KV cache a token", cache_bytes(before, report.dtype), cache_bytes(after, report.dtype)),
    ]
    cells = [[name, f"{old:,}", f"{new:,}", f"{new / old:.2f}"] for name, old, new in rows]
    checked = report.verification
    lines = [
        render_table(["", "before", "after", "ratio"], cells),
        f"{report.model_type}, weights {report.dtype}; a fresh process with plain transformers {checked.transformers} "
        f"loads it whole, and on {checked.positions} tokens no logit is further than {checked.max_error:.2g} from the "
        f"masked model's (tolerance {checked.tolerance:g}): ok",
        f"not checked: {', '.join(record['not_checked'])}",
        *(f"note: {note}" for note in report.notes),
        *_cut_off(record["plan"].get("length_cut_off", 0.0)),
    ]
    if (evaluation := record["evaluation"]) is not None:
        names = list(next(iter(evaluation["figures"].values())))
        cells = [
            [model, *(f"{values[name]['mean']:.4f}" for name in names)]
            for model, values in evaluation["figures"].items()
        ]
        lines += ["", render_table(["", *names], cells)]
    return "\n".join(lines)


def _cut_off(length: float) -> list[str]:
    if not length:
        return []
    return [
        f"note: weights of the adapter of length {length:.3g} belonged to what was removed and are cut off: training "
        "had not driven them to zero, so the model that trained was not quite this one"
    ]
