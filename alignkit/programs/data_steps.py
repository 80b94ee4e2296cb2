"""What ``alignkit data`` does with rows: recognise, take out what cannot be trained on, convert as a run does, look.

A run refuses rows as a whole where some are malformed. Here those are taken out and counted, so that the others can be
looked at; what a run would say of them is kept. The conversion is that of the run, and so are its numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignkit.config.base import ProgramConfig
from alignkit.config.keys import program_methods
from alignkit.data.checks import Limits
from alignkit.data.columns import PAIR_COLUMNS
from alignkit.data.conversion import MalformedRows, kept_rows, watched_counts
from alignkit.data.json_values import dataset_of
from alignkit.data.load import load_rows
from alignkit.data.problems import Problem
from alignkit.data.readers import first_rows
from alignkit.data.repeats import fingerprints
from alignkit.data.report import DataReport, data_report
from alignkit.data.split_report import SplitReport
from alignkit.data.survey import Survey, survey_rows
from alignkit.data.unpaired import labelled_answers
from alignkit.errors import DataError
from alignkit.parts.method import load_method
from alignkit.parts.shape import Shape, load_bridge, shapes_by_program

READERS = (("preference", "dpo"), ("preference", "kto"), ("sft", "sft"))
"""Programs and methods that rows are tried with, in this order; then come those of the programs not named here."""
LAST = (("online", "grpo"),)
"""Those that take any row with a prompt."""
OF_LISTS = "adpo"
"""The method that rows of any number of answers are read for."""
EOS = "<|end|>"
ANY_MESSAGES = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] or '' }}{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is known of the rows of a split.

    Attributes:
        name: The split.
        num_rows_in: Rows as loaded.
        num_answers_in: Where they are pairs that the method reads as two labelled answers each, how many
            these are: then ``rows`` and ``numbers`` are of answers. Otherwise None.
        malformed: Rows that cannot be trained on by their numbers, with what is wrong.
        counts: What the conversion counted of the others, a row each.
        dropped: The numbers of those that a run drops, by the cause.
        rows: Those that a run trains on, as loaded.
        numbers: Their numbers among all [N].
        converted: The same as token ids; None where no row is left.
        report: The run's report on them; None there too.
        survey: What they are as text; None there too.
        is_left_out: By what a cleaned file may do without: whether each is one of those rows [N].
        refusal: Why a run would not start with the rows as they are, or the empty text.
    """

    name: str
    num_rows_in: int
    num_answers_in: int | None
    malformed: Sequence[tuple[int, Problem]]
    counts: pd.DataFrame
    dropped: Mapping[str, Sequence[int]]
    rows: Dataset
    numbers: NDArray[np.int64]
    converted: Dataset | None
    report: SplitReport | None
    survey: Survey | None
    is_left_out: dict[str, NDArray[np.bool_]]
    refusal: str

    def cleaned(self, drop: Sequence[str]) -> Dataset:
        """The rows of a cleaned file.

        Args:
            drop: What it does without, of the keys of ``is_left_out``.
        """
        is_out = np.zeros(len(self.rows), dtype=bool)
        for what in drop:
            is_out |= self.is_left_out[what]
        return self.rows.select(np.flatnonzero(~is_out))


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that is known of the rows.

    Attributes:
        program, method: What they were read for.
        splits: By name, ``train`` first.
        report: The data report of a run; None where none of the rows can be trained on.
        problems: Why a run would not start, a line each.
    """

    program: str
    method: str
    splits: Mapping[str, Split]
    report: DataReport | None
    problems: Sequence[str]

    @property
    def kind(self) -> str:
        """The form of the rows, as far as one of them can be trained on."""
        report = self.splits["train"].report
        return "rows none of which can be trained on" if report is None else report.kind


def recognise(
    data: Sequence[str], *, split: str, column_map: Mapping[str, str], program: str | None, method: str | None
) -> tuple[Shape, str]:
    """The shape and the method that rows are read for.

    Args:
        data: Files, folders or Hub ids.
        split: Their split.
        column_map: Our column names to theirs.
        program: Launch program, or None for that of the method; without one either, it is seen by the rows.
        method: Method, or None for one that takes such rows.

    Raises:
        DataError: They are the rows of no program, or not of that one.
    """
    shapes = shapes_by_program()
    if program is None and method is not None:
        program = load_method(method).program
    if program is not None:
        known = [name for where, name in READERS + LAST if where == program]
        chosen = method or (known or program_methods(program))[0]
        return shapes[program], _method_of_lists(shapes[program], chosen, data, split, column_map, given=method)
    refused: dict[str, list[str]] = {}
    named = dict(READERS + LAST)
    others = [(name, reader) for name in shapes if name not in named for reader in program_methods(name)]
    for candidate, reader in (*READERS, *others, *LAST):
        try:
            return shapes[candidate], _method_of_lists(shapes[candidate], reader, data, split, column_map, given=None)
        except DataError as error:
            refused.setdefault("; ".join(error.problems), []).append(reader)
            last = error
    if len(refused) == 1:
        # It is not what the rows are read for that ails them.
        raise last
    advice = "Name the program with --program, and columns with --column_map OURS=THEIRS"
    problems = [f"for {', '.join(readers)}: {problem}" for problem, readers in refused.items()]
    raise DataError(f"{', '.join(data)}: the rows of no program. {advice}", problems)


def _method_of_lists(
    shape: Shape, method: str, data: Sequence[str], split: str, column_map: Mapping[str, str], *, given: str | None
) -> str:
    """The method itself, or one of lists where the rows are lists of answers and none is given."""
    family = shape.config.row_family({"method": method})
    with _without_notices():
        rows = load_rows(list(data), split=split, column_map=column_map, streaming=True, family=family)
        _, columns = first_rows(rows, ", ".join(data))
    is_list = shape.program == "preference" and "chosen" not in columns and "scores" in columns
    return OF_LISTS if is_list and given is None else method


@contextmanager
def _without_notices() -> Iterator[None]:
    """What is said of columns is said when the rows are loaded for good."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def stand_in() -> PreTrainedTokenizerFast:
    """A tokenizer that takes bytes for tokens and renders any message, to check rows where there is no model yet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate([*alphabet, EOS])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, chat_template=ANY_MESSAGES)


def examine(
    config: ProgramConfig,
    shape: Shape,
    splits: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int] = (),
) -> Examination:
    """Look at loaded rows, and convert them as a run would.

    Args:
        config: Of a run on these rows.
        shape: The shape of its batches.
        splits: Rows as loaded, ``train`` first.
        tokenizer: Of the model, or :func:`stand_in`.
        stop_token_ids: Ids at which generation stops besides the tokenizer's EOS.
    """
    convert = partial(
        load_bridge(shape).converter(config, tokenizer),
        num_proc=config.dataset_num_proc,
        stop_token_ids=stop_token_ids,
    )
    found = {name: _examine_split(rows, config, partial(convert, name=name), name) for name, rows in splits.items()}
    if "held-out" in found:
        found["train"].is_left_out["overlap"] = _held_out(found["train"], found["held-out"])
    problems = [f"{name}: {split.refusal}" for name, split in found.items() if split.refusal]
    usable = {n: (s.converted, s.report) for n, s in found.items() if s.converted is not None and s.report is not None}
    report = None
    if "train" in usable:
        report = data_report(usable, tokenizer, limits=Limits(config.max_truncated_fraction, config.allow_overlap))
        problems += [
            f"{name}: {check.name}: {check.message}"
            for name, checks in report.checks.items()
            for check in checks
            if check.status == "fail"
        ]
    return Examination(program=shape.program, method=config.method, splits=found, report=report, problems=problems)


class _Conversion(NamedTuple):
    """Rows as a run converts them: the rows of tokens, the report and the counts, and why a run would refuse them."""

    converted: Dataset | None
    report: SplitReport | None
    counts: pd.DataFrame
    refusal: str


def _examine_split(rows: Dataset, config: ProgramConfig, convert: Callable[..., Any], name: str) -> Split:
    """Convert the rows that can be, taking out those that are malformed, and look at what is left."""
    num_rows_in, numbers = len(rows), np.arange(len(rows))
    malformed: list[tuple[int, Problem]] = []
    found = _Conversion(None, None, pd.DataFrame({"cause": []}), "no row is left")
    while len(rows):
        try:
            found = _converted(rows, config, convert)
            break
        except MalformedRows as error:
            # What a method drops of pairs it refuses where it splits them.
            wrong = [(index, problem) for index, problem in error.rows if problem.fatal] or list(error.rows)
        malformed += [(int(numbers[index]), problem) for index, problem in wrong]
        is_left = np.ones(len(rows), dtype=bool)
        is_left[[index for index, _ in wrong]] = False
        rows, numbers = rows.select(np.flatnonzero(is_left)), numbers[is_left]
    said = [f"{len({row for row, _ in malformed})} of {num_rows_in} rows are malformed"] if malformed else []
    if is_pairs := len(found.counts) > len(rows):
        rows, numbers = _as_labelled(rows, name), np.repeat(numbers, 2)
    kept = kept_rows(found.counts)
    rows, repeats = rows.select(kept), np.zeros(len(kept), dtype=bool)
    survey, is_like = None, repeats
    if found.converted is not None and found.report is not None:
        repeats = _repeats_earlier(fingerprints(found.converted, found.report.contents).rows)
        survey, is_like = survey_rows(rows, repeats_earlier=repeats)
    return Split(
        name=name,
        num_rows_in=num_rows_in,
        num_answers_in=2 * num_rows_in if is_pairs else None,
        malformed=malformed,
        counts=found.counts,
        dropped=_dropped(found.counts, numbers),
        rows=rows,
        numbers=numbers[kept],
        converted=found.converted,
        report=found.report,
        survey=survey,
        is_left_out={"duplicates": repeats, "alike": is_like, "overlap": np.zeros(len(rows), dtype=bool)},
        refusal="; ".join([*said, *filter(None, [found.refusal])]),
    )


def _as_labelled(pairs: Dataset, name: str) -> Dataset:
    """Pairs as the labelled answers that a method on single answers makes of them, in its order."""
    answers, _ = labelled_answers(pairs, name)
    return dataset_of([{key: value for key, value in row.items() if key not in PAIR_COLUMNS[1:]} for row in answers])


def _held_out(train: Split, held_out: Split) -> NDArray[np.bool_]:
    """Whether each training row has an answer that a held-out row has to the same prompt."""
    is_shared = np.zeros(len(train.rows), dtype=bool)
    if train.report is not None and train.converted is not None and held_out.converted is not None:
        prints, others = (fingerprints(each.converted, train.report.contents) for each in (train, held_out))
        is_shared[prints.row_of[np.isin(prints.answers, others.answers)]] = True
    return is_shared


def _converted(rows: Dataset, config: ProgramConfig, convert: Callable[..., Any]) -> _Conversion:
    """Convert rows as a run does; where it would refuse them for those it drops, go on without these.

    Raises:
        MalformedRows: Some rows cannot be trained on.
        DataError: None of them can, whatever they hold.
    """
    refusal = ""
    for fraction in (config.max_dropped_fraction, 1.0):
        with watched_counts() as counted:
            try:
                converted, report = convert(rows, max_dropped_fraction=fraction)
            except MalformedRows:
                raise
            except DataError as error:
                if not counted:
                    raise
                refusal = refusal or error.headline
                continue
        return _Conversion(converted, report, counted[0], refusal)
    return _Conversion(None, None, counted[0], refusal)


def _dropped(counts: pd.DataFrame, numbers: NDArray[np.int64]) -> dict[str, list[int]]:
    dropped: dict[str, list[int]] = {}
    for cause, number in zip(counts["cause"], numbers, strict=True):
        if cause:
            dropped.setdefault(cause, []).append(int(number))
    return dropped


def _repeats_earlier(hashes: NDArray[np.int64]) -> NDArray[np.bool_]:
    _, first = np.unique(hashes, return_index=True)
    repeats = np.ones(len(hashes), dtype=bool)
    repeats[first] = False
    return repeats
