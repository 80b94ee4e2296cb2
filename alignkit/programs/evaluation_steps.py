"""The steps of ``alignkit evaluate`` once its command line is known to be right: rows, models, results."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ConfigError, ModelError
from alignkit.evals import _trial as steps
from alignkit.evals._data import EvaluationData, Kind, Reading, Wanted, kind_of_rows, prepare_data, readable
from alignkit.evals._novelty import Novelty, find_novelty, novelty_record, novelty_table
from alignkit.evals._results import MODEL, Results, Table, example_text, result_record, result_table
from alignkit.models.files import AdapterFiles
from alignkit.models.loading import ModelSource, check_base
from alignkit.models.reward_model import load_for_rewards
from alignkit.parts.evaluation import OPTIONAL, Calibrated, Evaluation, evaluation_names, load_evaluation
from alignkit.plain_text import all_without_secrets
from alignkit.programs.arguments import pick
from alignkit.programs.models import load_for_scoring, tokenizer_for
from alignkit.reports.evaluation_page import evaluation_page
from alignkit.reports.reliability import reliability_diagram
from alignkit.sampling.generation import Sampling
from alignkit.storage.durability import write_whole

BASE = "base"
RESERVED = (MODEL, BASE, "prompt", "reference", "answer", "finished", "right", "confidence")
"""What no compared model can be called in a record."""
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "preference": ("preference", "likelihood", "generation"),
    "supervised": ("supervised", "generation"),
    "prompts": ("generation",),
    "rewards": ("reward",),
}
"""Evaluations made of rows of each kind, and of reward models, unless others are named; figures follow this order."""
SAMPLES = 4
"""Prompts answered unless another number is given; of prompts alone all of them."""
NOTE = "± is 1.96 standard errors over rows; likelihoods and margins in nats"


@dataclass(frozen=True)
class Named:
    """A model of the comparison.

    Attributes:
        name: What it is called in tables.
        source: The model.
        adapter: The adapter on it, or None.
    """

    name: str
    source: ModelSource
    adapter: AdapterFiles | None = None


@dataclass
class Comparison:
    """What is found of one model after the other, each loaded when the one before it is gone.

    Attributes:
        arguments: The command line.
        evaluations: Those to make.
        tokenizer: That of the model in question; all models are given the same tokens.
        data: What on.
        state: This process among the others.
        gives_rewards: Whether the models are reward models.
        results: By the name of the model.
        layouts: By the name of the model.
        records: What the figures depend on, by the name of the model that was loaded.
        reference: What the base made of the held-out rows, for the implicit rewards of models without an adapter.
    """

    arguments: argparse.Namespace
    evaluations: Sequence[Evaluation]
    tokenizer: PreTrainedTokenizerBase
    data: EvaluationData
    state: PartialState
    gives_rewards: bool
    results: dict[str, Results] = field(default_factory=dict)
    layouts: dict[str, Any] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: list[steps.TokenLogps] | None = None

    def run(self, named: Named, *, with_base: bool = False) -> None:
        """Evaluate a model, on request its base without the adapter too.

        Args:
            named: The model.
            with_base: Whether the base is compared.
        """
        gc.collect()  # A model that is wrapped holds itself.
        model = self._load(named)
        steps.check_positions(model, self.data, self.arguments.max_new_tokens)
        reference = self.reference
        if isinstance(model, PeftModel) and (with_base or self.arguments.beta is not None):
            with model.disable_adapter():
                reference = self._evaluate(model, BASE, None, is_shown=with_base)
            self.reference = self.reference or reference
        own = self._evaluate(model, named.name, reference, is_shown=True)
        if named.name == BASE:
            self.reference = own
        self.records[named.name] = steps.provenance(
            named.source, named.adapter, model, self.tokenizer, self.data, self.state
        )

    def _load(self, named: Named) -> Any:
        if self.gives_rewards:
            return load_for_rewards(named.source, named.adapter, self.tokenizer, self.state.device)
        top1 = any("supervised" in evaluation.reads for evaluation in self.evaluations)
        return load_for_scoring(named.source, named.adapter, self.state.device, top1=top1)

    def _evaluate(
        self,
        model: PreTrainedModel | PeftModel,
        name: str,
        reference: list[steps.TokenLogps] | None,
        *,
        is_shown: bool,
    ) -> list[steps.TokenLogps] | None:
        """Returns what the model made of the held-out rows where an implicit reward is asked for."""
        arguments, data = self.arguments, self.data
        sampling = Sampling(**pick(arguments, "max_new_tokens", "temperature", "top_p", "seed", "batch_size"))
        steps.check_vocabulary(model, self.tokenizer, data)
        batch_size, rewards = arguments.batch_size, self.gives_rewards
        layout = steps.prepare_scoring(
            model, data, arguments.layout, batch_size=batch_size, name=name, gives_rewards=rewards
        )
        trial = steps.Trial(model, self.tokenizer, data, sampling, layout, batch_size, self.state, name)
        if arguments.beta is not None:
            trial.beta = arguments.beta
            trial.reference = trial.token_logps("held-out") if reference is None else reference
        if is_shown:
            self.results[name] = Results({e.name: e.compute(trial) for e in self.evaluations})
            self.layouts[name] = layout
        return trial.token_logps("held-out") if arguments.beta is not None else None


def choose_evaluations(
    arguments: argparse.Namespace, prog: str, *, gives_rewards: bool
) -> tuple[Kind, list[Evaluation]]:
    """Of which kind the rows are, and what is evaluated of them.

    Args:
        gives_rewards: Whether the model is a reward model.

    Raises:
        ConfigError: Evaluations are asked for that such rows do not allow.
        DataError: The rows are of no known kind.
    """
    kind = arguments.rows
    if kind == "auto":
        kind = kind_of_rows(arguments.data, dict(arguments.column_map))
    given = readable(kind, reading_of(arguments), has_probe=bool(arguments.probe_data), gives_rewards=gives_rewards)
    if not given:
        raise ConfigError(prog, [f"--data: a reward model is evaluated on preference rows, and these are {kind} rows"])
    chosen = [load_evaluation(name) for name in arguments.metrics or DEFAULTS["rewards" if gives_rewards else kind]]
    fitting = [name for name in evaluation_names() if load_evaluation(name).applies(given)]
    problems = [
        f"--metrics: {evaluation.name} needs {' and '.join(sorted(evaluation.reads - given - OPTIONAL))}, which "
        f"{'a reward model gives' if gives_rewards else f'{kind} rows have'} "
        f"not{_way_to_answers(evaluation, kind)}; here there are {', '.join(fitting)}"
        for evaluation in chosen
        if not evaluation.applies(given)
    ]
    reads = {name for evaluation in chosen for name in evaluation.reads}
    told = {"completion_only_loss": "supervised", "assistant_only_loss": "supervised"}
    for option, part in {"probe_data": "probe", "answer_column": "answers", "beta": "reference", **told}.items():
        readers = [name for name in evaluation_names() if part in load_evaluation(name).reads]
        if getattr(arguments, option) is not None and part not in reads:
            problems.append(f"--{option}: read by none of --metrics; add {' or '.join(readers)}")
    if problems:
        raise ConfigError(prog, problems)
    return kind, chosen


def _way_to_answers(evaluation: Evaluation, kind: Kind) -> str:
    return " without --answer_column" if "answers" in evaluation.reads and kind == "prompts" else ""


def reading_of(arguments: argparse.Namespace) -> Reading:
    """How rows are read, from the command line."""
    taken = pick(arguments, "max_rows", "max_length", "apply_chat_template", "answer_column")
    return Reading(column_map=dict(arguments.column_map), **taken)


def prepare(
    arguments: argparse.Namespace,
    kind: Kind,
    evaluations: Sequence[Evaluation],
    tokenizer: PreTrainedTokenizerBase,
    state: PartialState,
) -> EvaluationData:
    """The rows, and the prompts to answer where an evaluation reads some."""
    sources = {"held-out": arguments.data} | ({"probe": arguments.probe_data} if arguments.probe_data else {})
    reads = {name for evaluation in evaluations for name in evaluation.reads}
    number = arguments.num_samples
    if number is None and kind != "prompts":
        number = SAMPLES
    reading = reading_of(arguments)
    if kind == "supervised":
        from alignkit.shapes._tokens import trained_tokens  # With all of a trainer, which other rows do not need.

        keys = {"true": True, "false": False, None: None}
        told = [keys[value] for value in (arguments.completion_only_loss, arguments.assistant_only_loss)]
        reading = replace(reading, trained=trained_tokens(*told, tokenizer))
    data = prepare_data(
        sources,
        tokenizer,
        kind=kind,
        reading=reading,
        wanted=Wanted(number if "prompts" in reads else 0, "answers" in reads, arguments.train_data is not None),
        state=state,
    )
    for evaluation in evaluations:
        evaluation.check(data)
    return data


def compared_models(arguments: argparse.Namespace, found: Sequence[tuple[str, Any, Any]], how: Any) -> list[Named]:
    """The models of ``--compare``, each by the end of its path, or by all of it where that is taken.

    Args:
        found: What :func:`alignkit.models.files.find_model` said of each.
        how: Options of :class:`~alignkit.models.loading.ModelSource`.
    """
    paths = [path.rstrip("/") for path in arguments.compare]
    ends = [Path(path).name for path in paths]
    taken = [*RESERVED, *ends]
    whole = [path if "/" in path else f"./{path}" for path in paths]
    names = [end if taken.count(end) == 1 else path for end, path in zip(ends, whole, strict=True)]
    return [
        Named(name, ModelSource(model, revision, **how), adapter)
        for name, (model, revision, adapter) in zip(names, found, strict=True)
    ]


def check_compared(others: Sequence[Named], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse models that cannot be given the same tokens, before any is loaded.

    Raises:
        ModelError: An adapter is not on its base, or a tokenizer has other tokens.
    """
    vocabulary = tokenizer.get_vocab()
    for named in others:
        if named.adapter is not None:
            check_base(named.adapter, named.source)
        if tokenizer_for(named.source, named.adapter, None).get_vocab() != vocabulary:
            raise ModelError(
                f"--compare: {named.name} has another tokenizer than the model, so what either makes of a token cannot "
                "be compared. Evaluate each by itself, and compare figures of whole answers, such as accuracy/logps or "
                "final_answer"
            )


def novelty_of(arguments: argparse.Namespace, data: EvaluationData, state: PartialState) -> Novelty | None:
    """How near the rows are to the training rows that are named, or None."""
    if arguments.train_data is None:
        return None
    if not data.texts or (data.rows is None and data.questions is None):
        raise ConfigError("no rows to put into thirds", ["--train_data: no figure is one of rows; see --metrics"])
    column_map = arguments.column_map if arguments.train_column_map is None else arguments.train_column_map
    return find_novelty(data.texts, arguments.train_data, dict(column_map), state)


@dataclass
class Report:
    """What was found, as it is shown and written.

    Attributes:
        arguments: The command line.
        evaluations: Those that were made.
        prompts: Decoded prompts that were answered.
        results: Of the model.
        before: Of the models it is compared with, by name.
        novelty: How near the rows are to training rows, or None.
        also_possible: Evaluations that these rows allow as well, where none were named.
    """

    arguments: argparse.Namespace
    evaluations: Sequence[Evaluation]
    prompts: Sequence[str]
    results: Results
    before: Mapping[str, Results]
    novelty: Novelty | None
    also_possible: Sequence[str]

    @property
    def tables(self) -> dict[str, Table]:
        """By title."""
        tables = {"figures": result_table(self.results, self.before)}
        if self.novelty is not None:
            tables["far from and near to training prompts"] = novelty_table(self.novelty, self.results, self.before)
        return tables

    def show(self) -> None:
        """Print the tables and what stands below them."""
        figures, *others = self.tables.items()
        print(figures[1])
        print(NOTE)
        if self.also_possible:
            print(f"--metrics can also name {', '.join(self.also_possible)}")
        for title, table in others:
            print(f"\n{title}:\n{table}")
        before = {name: self._shown(results) for name, results in self.before.items()}
        if text := example_text(self.evaluations, self.prompts, self._shown(self.results), before):
            print(f"\n{text}")

    def _shown(self, results: Results) -> Results:
        """With as many examples as are asked for; of questions all are answered."""
        number = self.arguments.num_samples
        if number is None:
            return results
        found = {name: replace(each, examples=each.examples[:number]) for name, each in results.found.items()}
        return Results(found)

    def diagram(self) -> bytes | None:
        """The reliability diagram of the first evaluation that says how sure a model is; None without one."""
        for evaluation in self.evaluations:
            by_model = {name: of.found[evaluation.name].calibrated for name, of in self.before.items()}
            by_model[MODEL] = self.results.found[evaluation.name].calibrated
            items = {name: (np.array(c.confidence), np.array(c.right)) for name, c in by_model.items() if c is not None}
            if items and (meaning := _meaning(by_model[MODEL])):
                return reliability_diagram(items, title=f"{evaluation.name}: {meaning}")
        return None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write what was asked for.

        Args:
            record: What the figures depend on.
        """
        arguments = self.arguments
        if arguments.reliability is not None:
            diagram = self.diagram()
            assert diagram is not None  # A command line without confidences was refused.
            write_whole(arguments.reliability, diagram)
            print(f"reliability diagram written to {arguments.reliability}")
        if arguments.output is None:
            return
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        content = {**record, "options": all_without_secrets(options)}
        if arguments.output.suffix == ".html":
            texts = example_text(self.evaluations, self.prompts, self.results, self.before)
            tables = {title: (table.header, table.rows) for title, table in self.tables.items()}
            title = str(arguments.adapter or arguments.model)
            page = evaluation_page(title, tables, note=NOTE, diagram=self.diagram(), examples=texts, record=content)
            write_whole(arguments.output, page)
        else:
            content |= result_record(self.evaluations, self.prompts, self.results, self.before)
            if self.novelty is not None:
                content["novelty"] = novelty_record(self.novelty, self.results, self.before)
            write_whole(arguments.output, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        print(f"written to {arguments.output}")


def _meaning(calibrated: Calibrated | None) -> str:
    return "" if calibrated is None else f"confidence is {calibrated.meaning}"


def report(comparison: Comparison, novelty: Novelty | None) -> None:
    """Print what was found and write it.

    Args:
        comparison: After all models were evaluated.
        novelty: How near the rows are to training rows, or None.
    """
    results, layouts = comparison.results, comparison.layouts
    before = {name: results[name] for name in sorted(results, key=lambda name: name != BASE) if name != MODEL}
    records = dict(comparison.records)
    record = records.pop(MODEL) | {"kind": comparison.data.kind, "layout": layouts[MODEL]}
    record["compared_models"] = {name: other["model"] for name, other in records.items()}
    if BASE in layouts:
        record["base_layout"] = layouts[BASE]
    prompts = [comparison.tokenizer.decode(ids) for ids in comparison.data.prompts]
    given = readable(
        comparison.data.kind, reading_of(comparison.arguments), has_probe=False, gives_rewards=comparison.gives_rewards
    )
    made = {evaluation.name for evaluation in comparison.evaluations}
    others = [name for name in evaluation_names() if name not in made and load_evaluation(name).applies(given)]
    also = [] if comparison.arguments.metrics else others
    found = Report(comparison.arguments, comparison.evaluations, prompts, results[MODEL], before, novelty, also)
    found.show()
    found.write(record)
