"""New samples for rows in training, drawn from the policy of the moment and tokenised like those of the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.conversion import BATCH_ROWS, rows_of
from alignkit.data.json_values import dataset_of
from alignkit.data.negatives import REPLACED_COLUMNS, assemble_row
from alignkit.data.schema import detect_kind
from alignkit.data.tokenization import CANDIDATE_FEATURES, Settings, by_descending_score, convert_batch
from alignkit.sampling.candidates import Prompts, SampleSettings, prepare_prompts, sample_candidates
from alignkit.sampling.engines import HuggingFaceEngine
from alignkit.sampling.store import MemoryStore, on_first_process


@dataclass(frozen=True)
class Resampled:
    """Training rows with new samples.

    Attributes:
        rows: As many as before, in the same order.
        num_renewed: Rows that got new samples; the others keep what they had.
        num_samples: New samples in the rows.
    """

    rows: Dataset
    num_renewed: int
    num_samples: int


@dataclass(frozen=True)
class Resampler:
    """Draws the samples of all training rows anew.

    Attributes:
        prompts: What is sampled for, one entry a training row.
        tokenizer: The tokenizer of the model.
        settings: How the first samples were drawn.
        max_length: Limit on prompt + completion in tokens, or None.
    """

    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    settings: SampleSettings
    max_length: int | None

    @classmethod
    def of_lists(
        cls, lists: Dataset, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings, max_length: int | None
    ) -> Resampler:
        """For the candidate lists that the training rows were made of.

        They are tokenised once more, to learn which of them became a row.

        Args:
            lists: Samples and one negative, which has the lowest score; as loaded, or as sampled before training.
            settings: How samples are drawn.
            max_length: Limit on prompt + completion in tokens, or None.

        Raises:
            DataError: The lists cannot be sampled for.
        """
        conversion = _settings(lists, max_length)
        kept: list[dict[str, Any]] = []
        for start in range(0, len(lists), BATCH_ROWS):
            batch = lists[start : start + BATCH_ROWS]
            causes = convert_batch(batch, tokenizer, conversion)["cause"]
            kept += [_negative_of(row) for row, cause in zip(rows_of(batch), causes, strict=True) if not cause]
        prompts = prepare_prompts(kept, tokenizer, instruction=settings.instruction, name="train")
        return cls(prompts, tokenizer, settings, max_length)

    def __call__(self, model: PreTrainedModel | PeftModel, rows: Dataset, *, step: int) -> Resampled:
        """The training rows with new samples; a row that would get none to train on stays as it is. A collective.

        The draws follow from the seed and the step; no global random state is read or changed.

        Args:
            model: Draws the samples; unwrapped, whole and on its device.
            rows: The training rows as they are.
            step: Optimizer steps taken.
        """
        state = PartialState()
        seed = int(np.random.SeedSequence([self.settings.seed, step]).generate_state(1)[0])
        settings = replace(self.settings, seed=seed)
        engine = HuggingFaceEngine(model, self.tokenizer, settings.drawing, state)
        limit = settings.prompt_limit(model.config)
        records = sample_candidates(
            self.prompts, engine, settings, store=MemoryStore(), prompt_limit=limit, state=state
        )
        texts = on_first_process(lambda: {record.row: record.texts for record in records if record.texts}, state)
        if not texts:
            return Resampled(rows, 0, 0)
        renewed, numbers = _with(rows, self._lists(texts), sorted(texts), self.tokenizer, self.max_length)
        return Resampled(renewed, len(numbers), sum(len(texts[row]) for row in numbers))

    def _lists(self, texts: Mapping[int, list[str]]) -> Dataset:
        """The candidate lists of new samples by row, in the order of the rows."""
        prompts = self.prompts
        return dataset_of([assemble_row(prompts.rows[row], texts[row], prompts.kind) for row in sorted(texts)])


def _negative_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate list as a row to sample for: its samples are dropped."""
    negative = row["completions"][by_descending_score(row["scores"])[-1]]
    carried = {name: value for name, value in row.items() if name not in REPLACED_COLUMNS}
    return {"prompt": row["prompt"], "rejected": negative, **carried}


def _settings(lists: Dataset, max_length: int | None) -> Settings:
    """How candidate lists are tokenised."""
    kind = detect_kind(lists.column_names, lists, name="train")
    return Settings(kind, max_length, num_candidates=None, stop_token_ids=frozenset())


def _with(
    rows: Dataset, lists: Dataset, numbers: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, list[int]]:
    """The rows, some of them replaced, as tables that share no memory with the old ones.

    Token ids are Python objects, which take many times the memory of a table, for one block of rows at a time.

    Args:
        rows: The rows as they are.
        lists: Candidate lists to replace rows by.
        numbers: The row that each list replaces, ascending.
        max_length: Limit on prompt + completion in tokens, or None.

    Returns:
        The new rows, and the numbers of those replaced: a list that cannot be trained on replaces none.
    """
    settings, schema = _settings(lists, max_length), CANDIDATE_FEATURES.arrow_schema
    old, blocks, replaced = rows.with_format("arrow"), [], []
    for start in range(0, len(rows), BATCH_ROWS):
        block = old[start : start + BATCH_ROWS].select(schema.names).cast(schema)
        source = np.arange(len(block))
        first, last = np.searchsorted(numbers, [start, start + len(block)])
        if first < last:
            columns = convert_batch(lists[first:last], tokenizer, settings)
            kept = [i for i, cause in enumerate(columns["cause"]) if not cause]
            tokens = {name: [columns[name][i] for i in kept] for name in schema.names}
            found = [numbers[first + i] for i in kept]
            source[np.array(found, dtype=int) - start] = len(block) + np.arange(len(found))
            block = pa.concat_tables([block, pa.table(tokens, schema=schema)])
            replaced += found
        blocks.append(Dataset(block.take(source)))
    return concatenate_datasets(blocks), replaced
