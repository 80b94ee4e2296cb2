"""K answers of a model to every prompt, filtered, scored, and written as candidate lists that any method can train on.

D2O (arXiv 2403.03419, Eq. 3) takes its positive side from such samples: they are drawn from the reference, with or
without an instruction, and their log-probs are computed under the plain prompt. The rows written hold the plain prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from alignkit.data.negatives import (
    PromptKind,
    assemble_row,
    check_prompts,
    ignored_note,
    negative_text,
    prompt_token_ids,
)
from alignkit.data.schema import is_blank
from alignkit.errors import DataError
from alignkit.models.positions import positions_of
from alignkit.reports.bars import hidden_unless
from alignkit.sampling.engines import Drawing, Engine, Request
from alignkit.sampling.generation import Sample
from alignkit.sampling.report import SamplingReport, SettingNames, make_report
from alignkit.sampling.scorer import Scorer, score_samples
from alignkit.sampling.store import ChunkStore, MemoryStore, RowSamples, fingerprint, on_first_process

EMPTY, NEGATIVE, DUPLICATE, UNFINISHED = "empty", "identical to the negative", "duplicate", "did not stop"
TOO_LONG, NO_SAMPLES = "the prompt leaves no room for a sample", "no sample is left"
ONE_SAMPLE = "fewer than 2 samples"
ALIKE, EQUAL_SCORES = "all samples are identical", "the scorer gave all completions the same score"


@dataclass(frozen=True)
class SampleSettings:
    """How many samples are drawn, how, and which are kept. The defaults are ours, except where stated.

    Attributes:
        num_samples: K, samples a prompt (the D2O paper uses 11).
        max_new_tokens: Longest sample.
        temperature: 1 draws from the model's own distribution, as the loss's expectation asks; 0 is greedy, for K = 1.
        top_p: Nucleus sampling; 1 for none.
        seed: Seed of the draws.
        batch_size: Prompts generated for at once, each with K samples.
        chunk_size: Prompts between two writes to disk.
        instruction: Put before the prompt while sampling, or None.
        unique: Discard samples equal to an earlier one of the row.
        drop_unfinished: Discard samples cut at ``max_new_tokens``.
        max_resamples: How often a discarded sample is drawn anew.
        max_prompt_length: Rows with a longer prompt, tokens, are left out; None for the model's limit alone.
    """

    num_samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8
    chunk_size: int = 256
    instruction: str | None = None
    unique: bool = False
    drop_unfinished: bool = False
    max_resamples: int = 3
    max_prompt_length: int | None = None

    @property
    def drawing(self) -> Drawing:
        """What the engine needs to know."""
        sequences = self.batch_size * self.num_samples
        return Drawing(self.max_new_tokens, self.temperature, self.top_p, self.seed, sequences)

    def prompt_limit(self, config: Any) -> int | None:
        """Longest prompt that leaves room for an answer, or None where there is no limit.

        Args:
            config: The configuration of the model.
        """
        positions = positions_of(config)
        limits = [self.max_prompt_length, None if positions is None else max(0, positions - self.max_new_tokens)]
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class Prompts:
    """What is sampled for.

    Attributes:
        rows: Valid rows.
        kind: Their form.
        token_ids: What the model continues, one entry a row.
    """

    rows: Sequence[Mapping[str, Any]]
    kind: PromptKind
    token_ids: list[list[int]]

    def settings(self) -> dict[str, Any]:
        """What the samples depend on here, as hashes."""
        return {"data": fingerprint(list(self.rows)), "prompt_token_ids": fingerprint(self.token_ids)}


@dataclass(frozen=True)
class Sampled:
    """The candidate lists and the account of their making."""

    rows: list[dict[str, Any]]
    report: SamplingReport


def prepare_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    instruction: str | None,
    negatives: bool = True,
    name: str = "data",
) -> Prompts:
    """Check the rows and tokenise what the model is to continue.

    Args:
        instruction: Put before the prompt while sampling, or None.
        negatives: Whether rows have, and need, a rejected answer.
        name: What the rows are called in an error.

    Raises:
        DataError: They cannot be sampled for.
    """
    kind = check_prompts(rows, name=name, negatives=negatives)
    ids = prompt_token_ids(rows, tokenizer, kind, instruction=instruction, name=name)
    return Prompts(rows, kind, ids)


def sample_candidates(
    prompts: Prompts,
    engine: Engine,
    settings: SampleSettings,
    *,
    store: ChunkStore | MemoryStore,
    prompt_limit: int | None = None,
    scorer: Scorer | None = None,
    state: PartialState,
    progress: str | None = None,
) -> list[RowSamples]:
    """Draw, filter and score the samples of all prompts, on all processes together, continuing where a store stopped.

    Prompts are taken longest first: memory runs out in the first batch or never. Chunks and batches follow from the
    data and the settings alone, so any number of processes and of interruptions gives the same samples.

    Args:
        prompts: What is sampled for.
        engine: Draws samples.
        settings: How many, and which are kept.
        store: Keeps finished chunks; used by the first process.
        prompt_limit: Rows with longer prompts, tokens, are left out; None for no limit.
        scorer: Gives scores, or None.
        state: This process among the others.
        progress: Title of the progress bar of the first process, or None for none.

    Returns:
        The samples of each row that was sampled for, on the first process; nothing on the others.

    Raises:
        ConfigError: The store was begun with other settings.
        DataError: The scorer does not give one finite number a completion.
    """
    lengths = [len(ids) for ids in prompts.token_ids]
    fitting = [row for row, length in enumerate(lengths) if prompt_limit is None or length <= prompt_limit]
    order = sorted(fitting, key=lengths.__getitem__, reverse=True)
    chunks = [order[start : start + settings.chunk_size] for start in range(0, len(order), settings.chunk_size)]
    done = on_first_process(store.done, state)
    with tqdm(total=len(order), desc=progress, **hidden_unless(progress is not None and state.is_main_process)) as bar:
        for number, chunk in enumerate(chunks):
            if number not in done:
                records = _sample_chunk(prompts, chunk, engine, settings)
                if scorer is not None:
                    score_samples(records, prompts.rows, prompts.kind, scorer, state)
                on_first_process(partial(store.write, number, records), state)
            bar.update(len(chunk))
    return store.read() if state.is_main_process else []


def candidate_lists(prompts: Prompts, records: Sequence[RowSamples], names: SettingNames) -> Sampled:
    """The rows to train on, in the order of the prompts, and the report.

    Args:
        prompts: What was sampled for.
        records: What :func:`sample_candidates` returned on the first process.
        names: What the settings are called.

    Raises:
        DataError: No row is left.
    """
    causes = Counter({TOO_LONG: len(prompts.rows) - len(records)})
    written = []
    for record in records:
        cause = _row_cause(record, prompts.kind)
        causes[cause] += 1
        if not cause:
            written.append(record)
    dropped = {cause: count for cause, count in causes.items() if cause and count}
    if not written:
        counted = [f"{cause}: {count} of {len(prompts.rows)} rows" for cause, count in dropped.items()]
        raise DataError("no row is left to train on", counted)
    note = ignored_note(prompts.rows)
    notes = [note] if note else []
    report = make_report(
        written, records, num_prompts=len(prompts.rows), dropped_rows=dropped, notes=notes, names=names
    )
    rows = [assemble_row(prompts.rows[r.row], r.texts, prompts.kind, r.scores) for r in written]
    return Sampled(rows, report)


def _sample_chunk(prompts: Prompts, chunk: Sequence[int], engine: Engine, settings: SampleSettings) -> list[RowSamples]:
    """Rounds of draws: what is discarded in one round is asked for again in the next."""
    kept: dict[int, dict[int, Sample]] = {row: {} for row in chunk}
    dropped: dict[int, Counter[str]] = {row: Counter() for row in chunk}
    wanted = [(row, candidate) for row in chunk for candidate in range(settings.num_samples)]
    # A greedy answer would be the same again.
    for attempt in range(1 + (settings.max_resamples if settings.temperature > 0 else 0)):
        requests = [Request(row, candidate, attempt, prompts.token_ids[row]) for row, candidate in wanted]
        for request, sample in zip(requests, engine(requests) if requests else [], strict=True):
            row = request.row
            earlier = kept[row].values() if settings.unique else ()
            cause = _sample_cause(sample, negative_text(prompts.rows[row], prompts.kind), earlier, settings)
            if cause:
                dropped[row][cause] += 1
            else:
                kept[row][request.candidate] = sample
        wanted = [(row, candidate) for row, candidate in wanted if candidate not in kept[row]]
    return [_record(row, [kept[row][i] for i in sorted(kept[row])], dropped[row]) for row in chunk]


def _sample_cause(sample: Sample, negative: str | None, earlier: Any, settings: SampleSettings) -> str:
    """Why a sample is discarded; empty when it is kept."""
    text = sample.text.strip()
    if is_blank(text):
        return EMPTY
    if negative is not None and text == negative.strip():
        return NEGATIVE
    if settings.drop_unfinished and not sample.finished:
        return UNFINISHED
    return DUPLICATE if any(text == other.text.strip() for other in earlier) else ""


def _record(row: int, samples: Sequence[Sample], dropped: Counter[str]) -> RowSamples:
    columns = (
        [s.text for s in samples],
        [s.num_tokens for s in samples],
        [s.finished for s in samples],
        [s.repetition for s in samples],
    )
    return RowSamples(row, *columns, dict(dropped))


def _row_cause(record: RowSamples, kind: PromptKind) -> str:
    """Why a row is left out; empty when it is written."""
    if not record.texts:
        return NO_SAMPLES
    if not kind.negatives and len(record.texts) < 2:
        return ONE_SAMPLE
    if not kind.negatives and len(set(record.texts)) == 1:
        return ALIKE
    return EQUAL_SCORES if record.scores is not None and len(set(record.scores)) == 1 else ""


def check_room(
    prompts: Prompts,
    settings: SampleSettings,
    config: Any,
    names: SettingNames,
    *,
    max_dropped_fraction: float = 1.0,
    name: str = "data",
) -> int | None:
    """The longest prompt that leaves room for a sample, or None for no limit; asked before any sample is drawn.

    Args:
        prompts: What is sampled for.
        settings: How.
        config: The configuration of the model.
        names: What the settings are called.
        max_dropped_fraction: Highest share of prompts that may be longer.
        name: What the rows are called in an error.

    Raises:
        DataError: No prompt leaves room, or too few of them do.
    """
    limit, lengths = settings.prompt_limit(config), sorted(map(len, prompts.token_ids))
    count = 0 if limit is None else sum(length > limit for length in lengths)
    if count < len(lengths) and count <= max_dropped_fraction * len(lengths):
        return limit
    found, problems = f"prompts have {lengths[0]} to {lengths[-1]} tokens", []
    positions = positions_of(config)
    if positions is not None and lengths[-1] + settings.max_new_tokens > positions:
        left = positions - lengths[-1]
        every = f"set {names.max_new_tokens} to {left} or less to keep every row"
        advice = every if left > 0 else f"leave out the longest rows, and lower {names.max_new_tokens}"
        taken = f"{names.max_new_tokens} takes {settings.max_new_tokens} of the model's {positions} positions"
        problems.append(f"{taken}, {found}: {advice}")
    if settings.max_prompt_length is not None and lengths[-1] > settings.max_prompt_length:
        problems.append(f"{names.max_prompt_length} is {settings.max_prompt_length}, {found}: raise it")
    raise DataError(f"{name}: {count} of {len(lengths)} prompts are too long to sample for", problems)
