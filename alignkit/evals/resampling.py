"""New samples for rows in training, drawn from the policy of the moment and tokenised like those of the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.conversion import BATCH_ROWS
from alignkit.data.negatives import REPLACED_COLUMNS, assemble_row
from alignkit.data.schema import detect_kind
from alignkit.data.tokenization import CANDIDATE_FEATURES, Settings, by_descending_score, convert_batch
from alignkit.evals.sampling import Prompts, SampleSettings, prepare_prompts, sample_candidates
from alignkit.evals.sampling_engines import HuggingFaceEngine
from alignkit.evals.sampling_store import MemoryStore, on_first_process


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
            tokenizer: The tokenizer of the model.
            settings: How samples are drawn.
            max_length: Limit on prompt + completion in tokens, or None.

        Raises:
            DataError: The lists cannot be sampled for.
        """
        rows = list(lists)
        converted = _tokenised(rows, tokenizer, max_length)
        kept = [_negative_of(row) for row, tokens in zip(rows, converted, strict=True) if tokens is not None]
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
        lists = [assemble_row(self.prompts.rows[row], samples, self.prompts.kind) for row, samples in texts.items()]
        # Through a table, which gives all messages the same keys, as it did before training.
        converted = _tokenised(list(Dataset.from_list(lists)), self.tokenizer, self.max_length)
        renewed = {row: tokens for row, tokens in zip(texts, converted, strict=True) if tokens is not None}
        return Resampled(_with(rows, renewed), len(renewed), sum(len(texts[row]) for row in renewed))


def _negative_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate list as a row to sample for: its samples are dropped."""
    negative = row["completions"][by_descending_score(row["scores"])[-1]]
    carried = {name: value for name, value in row.items() if name not in REPLACED_COLUMNS}
    return {"prompt": row["prompt"], "rejected": negative, **carried}


def _tokenised(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[dict[str, Any] | None]:
    """The candidate columns of every list; None for a list that cannot be trained on."""
    if not rows:
        return []
    kind = detect_kind(list(rows[0]), rows, name="train")
    settings = Settings(kind, max_length, num_candidates=None, stop_token_ids=frozenset())
    found: list[dict[str, Any] | None] = []
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        columns = convert_batch({name: [row[name] for row in batch] for name in batch[0]}, tokenizer, settings)
        found += [
            None if cause else {name: columns[name][i] for name in CANDIDATE_FEATURES}
            for i, cause in enumerate(columns["cause"])
        ]
    return found


def _with(rows: Dataset, renewed: Mapping[int, Mapping[str, Any]]) -> Dataset:
    """The rows, some of them replaced."""
    columns = {name: list(rows[name]) for name in CANDIDATE_FEATURES}
    for row, tokens in renewed.items():
        for name, values in columns.items():
            values[row] = tokens[name]
    return Dataset.from_dict(columns, features=CANDIDATE_FEATURES)
