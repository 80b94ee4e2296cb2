"""The rows of an evaluation: of which kind they are, and what a model is given of them.

==============  ==============================================  ========================================================
kind            columns                                         what can be evaluated (``Evaluation.reads``)
==============  ==============================================  ========================================================
preference      those of :mod:`alignkit.data.schema`            ``held-out``, ``prompts``, ``reference``, and where
                                                                there are some ``probe``; of a reward model ``rewards``
supervised      those of :mod:`alignkit.data.supervised_schema` ``supervised``, and where rows have a prompt ``prompts``
                                                                and ``answers``
prompts         ``prompt`` and no answer                        ``prompts``; with an answer column ``answers``
==============  ==============================================  ========================================================
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data.candidates import SOURCE_COLUMNS, to_candidate_rows
from alignkit.data.checks import check_template
from alignkit.data.columns import RowFamily, nearest_name
from alignkit.data.load import load_rows
from alignkit.data.mapped import mapped
from alignkit.data.messages import as_messages
from alignkit.data.novelty import prompt_text
from alignkit.data.prefix import IGNORE_INDEX
from alignkit.data.problems import Problem, content_text
from alignkit.data.prompts_schema import prompt_rows
from alignkit.data.schema import describe_problems, preference_rows
from alignkit.data.split_report import SplitReport
from alignkit.data.supervised import convert_supervised
from alignkit.data.supervised_schema import supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens, encode
from alignkit.errors import DataError

Kind = Literal["preference", "supervised", "prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ANSWERS = ("chosen", "rejected", "completion", "completions", "messages")
"""Columns whose like, beside a prompt, makes it doubtful that rows are prompts alone."""
_SCORED = Features(
    {
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(List(Value("int32"))),
        "is_trained": List(Value("bool")),
    }
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """Prompts whose answers can be judged, one a row.

    Attributes:
        prompts: Token ids, ready for generation.
        references: The answer of each row.
    """

    prompts: list[list[int]]
    references: list[Any]


@dataclass(frozen=True)
class EvaluationData:
    """What a model is evaluated on.

    Attributes:
        rows: Candidate rows; of supervised ones a completion each, with ``is_trained`` of its tokens; None for prompts.
        probe: Candidate rows of which every response is a probe, or None.
        prompts: Token ids of the prompts to answer.
        reports: What happened to the rows on the way, by name.
        kind: Of which kind they are.
        questions: Prompts with references, where they were asked for.
        texts: The prompt of each of ``rows``, or of each question, in words, where they were asked for.
        num_prompt_rows: Rows of prompts alone.
    """

    rows: Dataset | None
    probe: Dataset | None
    prompts: list[list[int]]
    reports: dict[str, SplitReport]
    kind: Kind = "preference"
    questions: Questions | None = None
    texts: list[str] = field(default_factory=list)
    num_prompt_rows: int = 0

    @property
    def held_out(self) -> Dataset:
        """The rows, where they are scored."""
        assert self.rows is not None
        return self.rows

    @property
    def asked(self) -> list[list[int]]:
        """Token ids of every prompt that is answered."""
        return [*self.prompts, *(self.questions.prompts if self.questions is not None else [])]

    @property
    def scored(self) -> dict[str, Dataset]:
        """The rows that a model scores, by name."""
        sets = {"held-out": self.rows, "probe": self.probe}
        return {name: rows for name, rows in sets.items() if rows is not None}


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        column_map: Our column names to those of the data.
        max_rows: Keep at most so many rows of each, or None.
        max_length: Limit on prompt + completion, tokens.
        apply_chat_template: Turn plain prompts and answers into messages.
        answer_column: Column with the reference of each row; None takes the completion, or the last message.
        trained: Which tokens of supervised rows count.
    """

    column_map: Mapping[str, str] = field(default_factory=dict)
    max_rows: int | None = None
    max_length: int = 1024
    apply_chat_template: bool = False
    answer_column: str | None = None
    trained: TrainedTokens = field(default_factory=TrainedTokens)


@dataclass(frozen=True)
class Wanted:
    """What evaluations read of the held-out rows besides the rows themselves; nothing else is held in memory.

    Attributes:
        num_samples: Distinct prompts to answer, the first ones; None for all.
        answers: Whether the answer to every prompt is judged.
        texts: Whether the prompt of every row is needed in words.
    """

    num_samples: int | None
    answers: bool = False
    texts: bool = False


def family_of(kind: Kind, *, keeps_others: bool = False) -> RowFamily:
    """What rows of a kind may look like.

    Args:
        keeps_others: Whether they keep the columns that are not ours.
    """
    makers = {"preference": preference_rows, "supervised": supervised_rows, "prompts": prompt_rows}
    family = makers[kind]()
    return replace(family, keeps_others=True) if keeps_others else family


def kind_of_rows(sources: Sequence[str], column_map: Mapping[str, str]) -> Kind:
    """Of which kind rows are, by their columns and first rows: the first kind that they can be read as.

    Rows with a prompt and a column that looks like an answer are no prompts alone: one of their names is wrong.

    Args:
        sources: Files or Hub ids.
        column_map: Our column names to those of the data.

    Raises:
        DataError: They are of none.
    """
    errors: dict[Kind, DataError] = {}
    for kind in KINDS:
        try:
            with _in_silence():  # What a kind has no use for says nothing of the rows.
                rows = load_rows(list(sources), column_map=column_map, streaming=True, family=family_of(kind))
        except DataError as error:
            errors[kind] = error
            continue
        others = [column for column in next(iter(rows)) if column != "prompt"]
        if kind == "prompts" and (like := [name for name in _ANSWERS if nearest_name(name, others)]):
            looks = ", ".join(f"{nearest_name(name, others)!r} (like {name})" for name in like)
            break_off = f"beside the prompt there is {looks}. Where that is no answer, write --rows prompts"
            errors[kind] = DataError("prompts", [break_off])
            continue
        return kind
    if len({str(error) for error in errors.values()}) == 1:
        raise errors["preference"]
    found = [f"not {kind} rows: {problem}" for kind, error in errors.items() for problem in error.problems[:2]]
    raise DataError(f"{', '.join(sources)}: of which kind the rows are is not clear", found)


@contextmanager
def _in_silence() -> Iterator[None]:
    reader = logging.getLogger("alignkit.data")
    level = reader.level
    reader.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reader.setLevel(level)


def readable(kind: Kind, reading: Reading, *, has_probe: bool, gives_rewards: bool) -> frozenset[str]:
    """What evaluations may read of rows of a kind; of texts, which have no prompt, that is known once they are read.

    Args:
        reading: How they are read.
        has_probe: Whether there are probe rows.
        gives_rewards: Whether the model is a reward model, which writes nothing.
    """
    if gives_rewards:
        return frozenset({"rewards"} if kind == "preference" else ())
    if kind == "preference":
        return frozenset({"held-out", "reference", "prompts", *(["probe"] if has_probe else [])})
    if kind == "supervised":
        return frozenset({"supervised", "prompts", "answers"})
    return frozenset({"prompts", *(["answers"] if reading.answer_column else [])})


def prepare_data(
    sources: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind,
    reading: Reading,
    wanted: Wanted,
    state: PartialState,
) -> EvaluationData:
    """Load, check and tokenise the rows; the first process first, so that the others read its cache.

    Args:
        sources: Files or Hub ids under ``held-out`` and, if there are probe rows, ``probe``.
        kind: Of which kind the held-out rows are; probe rows are preference rows.
        reading: How they are read.
        wanted: What is read of the held-out rows besides.
        state: This process among the others.

    Raises:
        DataError: The rows cannot be used; every kind of problem.
    """
    read = {"preference": _read_preference, "supervised": _read_supervised, "prompts": _read_prompts}[kind]
    with state.main_process_first():
        data = read(sources["held-out"], tokenizer, reading, wanted)
        if "probe" in sources:
            probe = _read_preference(sources["probe"], tokenizer, reading, Wanted(0), name="probe")
            data = replace(data, probe=probe.rows, reports=data.reports | probe.reports)
    if kind != "prompts":
        check = check_template(tokenizer, conversational=data.reports["held-out"].conversational)
        if state.is_main_process and check.status != "ok":
            logger.warning("held-out: %s: %s", check.title, check.message)
    return data


def _first_distinct(prompts: Iterable[Sequence[int]], count: int | None) -> list[list[int]]:
    """The first different prompts, without looking at more of them than it takes."""
    found: dict[tuple[int, ...], None] = {}
    remaining = iter(prompts)
    while (count is None or len(found) < count) and (ids := next(remaining, None)) is not None:
        found.setdefault(tuple(ids))
    return [list(ids) for ids in found]


def _loaded(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, reading: Reading, kind: Kind, name: str) -> Any:
    family = family_of(kind, keeps_others=name == "held-out" and reading.answer_column is not None)
    rows = load_rows(list(sources), column_map=reading.column_map, max_rows=reading.max_rows, family=family)
    if (column := reading.answer_column) is not None and name == "held-out" and column not in rows.column_names:
        near = nearest_name(column, rows.column_names)
        advice = f"did you mean {near!r}? " if near else ""
        present = ", ".join(map(repr, rows.column_names))
        raise DataError(name, [f"--answer_column: there is no column {column!r}; {advice}Columns present: {present}"])
    return as_messages(rows, tokenizer, name, family.columns) if reading.apply_chat_template else rows


def _read_preference(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    wanted: Wanted,
    name: str = "held-out",
) -> EvaluationData:
    loaded = _loaded(sources, tokenizer, replace(reading, answer_column=None), "preference", name)
    rows, report = to_candidate_rows(
        loaded, tokenizer, max_length=reading.max_length, num_candidates=None, name=name, numbered=True
    )
    assert isinstance(rows, Dataset)
    prompt_of = preference_rows().prompt_of
    texts = [prompt_text(prompt_of(loaded[i])) for i in rows[SOURCE_COLUMNS[0]]] if wanted.texts else []
    rows = rows.remove_columns(SOURCE_COLUMNS[0])
    prompts = _first_distinct((row["prompt_ids"] for row in rows), wanted.num_samples)
    return EvaluationData(rows, None, prompts, {name: report}, texts=texts)


def _read_supervised(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, reading: Reading, wanted: Wanted
) -> EvaluationData:
    loaded = _loaded(sources, tokenizer, reading, "supervised", "held-out")
    tokens, kept, report = convert_supervised(
        loaded,
        tokenizer,
        max_length=reading.max_length,
        trained=reading.trained,
        max_dropped_fraction=0.1,
        num_proc="auto",
        name="held-out",
        stop_token_ids=(),
    )
    assert isinstance(tokens, Dataset)
    rows = mapped(tokens, _scored_batch, batched=True, remove_columns=tokens.column_names, features=_SCORED)
    numbers = kept.tolist()
    prompt_of = supervised_rows().prompt_of
    texts = [prompt_text(prompt_of(loaded[i])) for i in numbers] if wanted.texts else []
    data = EvaluationData(rows, None, [], {"held-out": report}, "supervised", texts=texts)
    if "text" in loaded.column_names and not {"prompt", "messages"} & set(loaded.column_names):
        if wanted.answers:
            raise DataError("held-out", ["rows of text have no prompt, so that nothing can be answered and judged"])
        return data
    if wanted.answers:
        raw = [loaded[i] for i in numbers]
        asked = [_question(row, reading.answer_column) for row in raw]
        ids = _prompt_ids([prompt for prompt, _ in asked], raw, tokenizer)
        data = replace(data, questions=Questions(ids, [answer for _, answer in asked]))
    prompts = _first_distinct(_prompts_one_by_one(loaded, numbers, tokenizer), wanted.num_samples)
    return replace(data, prompts=prompts)


def _prompts_one_by_one(
    loaded: Dataset, numbers: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    for i in numbers:
        row = loaded[i]
        yield from _prompt_ids([_question(row, None)[0]], [row], tokenizer)


def _read_prompts(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, reading: Reading, wanted: Wanted
) -> EvaluationData:
    raw = list(_loaded(sources, tokenizer, reading, "prompts", "held-out"))
    prompts = _prompt_ids([row["prompt"] for row in raw], raw, tokenizer)
    column = reading.answer_column
    references = Questions(prompts, [row[column] for row in raw]) if column and wanted.answers else None
    texts = [prompt_text(row["prompt"]) for row in raw] if wanted.texts else []
    return EvaluationData(
        None, None, _first_distinct(prompts, wanted.num_samples), {}, "prompts", references, texts, len(raw)
    )


def _question(row: Mapping[str, Any], column: str | None) -> tuple[Any, Any]:
    """What is asked, and the answer: the completion, or of a conversation the last message of the assistant."""
    if "prompt" in row:
        prompt, answer = row["prompt"], row["completion"]
    else:
        messages = row["messages"]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        prompt, answer = messages[:last], messages[last:]
    if column is not None:
        return prompt, row[column]
    return prompt, answer if isinstance(answer, str) else "".join(content_text(m.get("content")) for m in answer[-1:])


def _prompt_ids(
    prompts: Sequence[Any], rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    found = encode(prompts, rows, tokenizer, TrainedTokens(), part="prompt", is_prompt=True)
    if refused := [(number, each) for number, each in enumerate(found) if isinstance(each, Problem)]:
        raise DataError("prompts to answer (the first row is row 0)", describe_problems(refused))
    return [list(each[0]) for each in found if not isinstance(each, Problem)]


def _scored_batch(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows of tokens as a prompt, up to the first trained token, and one completion."""
    rows: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "is_trained": []}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        start = next(index for index in range(1, len(ids)) if labels[index] != IGNORE_INDEX)
        rows["prompt_ids"].append(ids[:start])
        rows["completion_ids"].append([ids[start:]])
        rows["is_trained"].append([label != IGNORE_INDEX for label in labels[start:]])
    return rows
