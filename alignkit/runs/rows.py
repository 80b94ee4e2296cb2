"""The rows of a run: loaded, given what the method needs, tokenised, looked at and reported on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from alignkit.config.base import ProgramConfig
from alignkit.data.checks import Limits
from alignkit.data.load import load_rows, split_held_out
from alignkit.data.messages import as_messages
from alignkit.data.report import data_report
from alignkit.data.split_report import SplitReport
from alignkit.models import loading
from alignkit.models.vocabulary import unused_tokens
from alignkit.parametrizations._policy import load_tokenizer as load_tokenizer
from alignkit.parts.method import Preparation
from alignkit.runs.directory import RunDirectory

STREAM_BUFFER = 1000  # rows a stream is shuffled within; rows at hand are shuffled by the trainer, anew each epoch

Rows = Dataset | IterableDataset


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run.

    Attributes:
        train: Training rows, tokenised.
        evaluation: Held-out rows, tokenised; None where there are none.
        prompts: Token ids of held-out prompts to answer in the report.
        source: The training rows as text, with what they were given.
    """

    train: Rows
    evaluation: Rows | None
    prompts: list[tuple[int, ...]]
    source: Rows


def prepare_rows(
    config: ProgramConfig,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    bridge: ModuleType,
    preparation: Preparation,
    directory: RunDirectory,
) -> PreparedData:
    """Load, complete, tokenise, check and report on the rows; rank 0 first, so that the others read its cache.

    Args:
        args: The trainer's arguments.
        bridge: That of the batch shape.
        preparation: What the method does with rows of its own.
        directory: Where the report goes.

    Raises:
        DataError: The rows cannot be trained on; all kinds of problem together.
        ModelError: A model that draws answers for the rows will not do.
    """
    with args.main_process_first(desc="data"):
        splits = load_splits(config, tokenizer)
    splits = preparation.complete(splits, tokenizer, args.device)
    if sections := preparation.sections():
        directory.record(**sections)
    convert = bridge.converter(config, tokenizer)
    with args.main_process_first(desc="tokens"):
        converted = convert_splits(config, splits, convert, preparation)
    report_data(config, converted, tokenizer, args, directory)
    held_out = converted["held-out"][0] if "held-out" in converted else None
    prompts = [] if held_out is None else bridge.prompts(config, tokenizer, splits["held-out"], held_out)
    return PreparedData(converted["train"][0], held_out, prompts, splits["train"])


def load_splits(config: ProgramConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """The rows as loaded, plain ones as messages if so asked: ``train``, and ``held-out`` where some are.

    Raises:
        DataError: They cannot be read.
    """
    seed = config.seed if config.data_seed is None else config.data_seed
    family = config.row_family(vars(config))
    common = {"column_map": config.column_map, "seed": seed, "family": family, "name_sources": True}
    limits = {"streaming": config.streaming, "max_rows": config.max_rows}
    rows = load_rows(config.data, split=config.data_split, **limits, **common)
    splits = {"train": rows.shuffle(seed=seed, buffer_size=STREAM_BUFFER) if config.streaming else rows}
    if config.eval_data is not None:
        limit = config.max_eval_rows
        splits["held-out"] = load_rows(config.eval_data, split=config.eval_split, max_rows=limit, **common)
    elif config.eval_fraction > 0:
        splits["train"], splits["held-out"] = split_held_out(rows, config.eval_fraction, seed, family)
    if config.apply_chat_template:
        splits = {name: as_messages(split, tokenizer, name, family.columns) for name, split in splits.items()}
    return splits


def convert_splits(
    config: ProgramConfig,
    splits: Mapping[str, Rows],
    convert: Callable[..., tuple[Rows, SplitReport]],
    preparation: Preparation,
) -> dict[str, tuple[Rows, SplitReport]]:
    """Every split converted by ``convert(rows, name=..., ...)``, with its report."""
    stops = loading.generation_stop_ids(config.model, config.model_revision)
    shared = {
        "max_dropped_fraction": config.max_dropped_fraction,
        "num_proc": config.dataset_num_proc,
        "stop_token_ids": stops,
    }
    return {
        name: convert(split, name=name, **preparation.for_conversion(name), **shared) for name, split in splits.items()
    }


def held_out_rows(
    config: Any, data: Any, tokenizer: PreTrainedTokenizerBase, bridge: ModuleType, preparation: Preparation
) -> Rows:
    """Other rows than those of the run, tokenised as its held-out ones are.

    Args:
        data: A value of the key of that name.
        bridge: That of the batch shape.
        preparation: What the method does with rows of its own.

    Raises:
        DataError: They cannot be read, or are not what the method takes.
    """
    wanted = {"data": data, "eval_data": None, "eval_fraction": 0.0, "streaming": False, "max_rows": None}
    splits = load_splits(replace(config, **wanted), tokenizer)
    converted = convert_splits(config, {"held-out": splits["train"]}, bridge.converter(config, tokenizer), preparation)
    return converted["held-out"][0]


def report_data(
    config: ProgramConfig,
    converted: Mapping[str, tuple[Rows, SplitReport]],
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    directory: RunDirectory,
) -> None:
    """Print and record what the rows are, and refuse those that would not do what was asked.

    Raises:
        DataError: A check fails.
    """
    limits = Limits(config.max_truncated_fraction, config.allow_overlap)
    report = data_report(converted, tokenizer, limits=limits)
    if args.process_index == 0:
        report.print_to(sys.stdout)
        _warn_of_unused(config, converted["train"][0], tokenizer)
    directory.record(data=report.to_dict())
    report.raise_for_failures()


def _warn_of_unused(config: Any, train: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which new tokens the training rows do not hold; of streamed rows that is not known."""
    if isinstance(train, Dataset) and (unused := unused_tokens(tokenizer, config.new_tokens, train)):
        found = f"no training row holds {', '.join(map(repr, unused))}: nothing is learnt of what is not there"
        print(f"warning: `new_tokens`: {found}. See how it is spelt, or remove it", file=sys.stderr)
