"""What the runs of one seed on rows of :mod:`noise_rows` share: split, samples, token rewards, reference log-probs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.contrast import ContrastPrompts, load_contrast_prompts
from alignkit.models._forward import (
    add_completion_head,
    base_model,
    compute_precision,
    score_rows,
    use_packed_attention,
)
from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from alignkit.references._cache import ReferenceCache, model_fingerprint
from alignkit.references._token_rewards import choose_pass_layout, refuse_long_sequences, with_token_rewards
from alignkit.references.token_reward_report import TokenRewardReport
from alignkit.sampling.candidates import SampleSettings, prepare_prompts, sample_candidates
from alignkit.sampling.engines import HuggingFaceEngine
from alignkit.sampling.store import ChunkStore
from noise_rows import LabelledRow, list_row, pair_row

SAMPLES = 4
EVAL_BATCH_SIZE = 8

Layout = Literal["padded", "packed"]
TokenLogps = list[list[list[float]]]
"""Token log-probs by row and candidate, nats."""


@dataclass(frozen=True)
class Budget:
    """What every run on a data set has in common.

    Attributes:
        batch_size: Questions a step.
        max_length: Questions with a longer prompt and answer, tokens, are left out.
        max_new_tokens: Longest sample of the model (d2o).
        held_out: Questions for measuring, at most.
        steps: Optimiser steps; every training question comes once.
        learning_rate: Peak rate of AdamW; it falls linearly to zero.
    """

    batch_size: int
    max_length: int
    max_new_tokens: int
    held_out: int
    steps: int = 32
    learning_rate: float = 1e-4

    @property
    def train_rows(self) -> int:
        """Training questions."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Task:
    """What the runs of one seed on one data set share.

    Attributes:
        model_path: The policy at the start, and the reference.
        tokenizer: Its tokenizer.
        budget: Length and step size.
        seed: Order of the batches.
        train: Training rows with true labels.
        held_out: Candidate rows with true labels.
        reference_logps: Token log-probs of ``held_out`` under the reference.
        samples: Samples of the reference by question.
        directory: For caches and the trainers' output.
    """

    model_path: Path
    tokenizer: PreTrainedTokenizerBase
    budget: Budget
    seed: int
    train: Sequence[LabelledRow]
    held_out: Dataset
    reference_logps: TokenLogps
    samples: Mapping[str, Sequence[str]]
    directory: Path

    def load(self) -> PreTrainedModel:
        """The policy, afresh."""
        return load_model(ModelSource(model=str(self.model_path), dtype="float32"))


def prepare_task(
    rows: Sequence[LabelledRow],
    *,
    model_path: Path,
    budget: Budget,
    seed: int,
    samples: Mapping[str, Sequence[str]],
    directory: Path,
) -> Task:
    """Split rows of one seed, and score the held-out ones under the reference.

    Args:
        rows: All rows, in random order, true labels.
        budget: How many to train on and to hold out.
        samples: Samples by question.
        directory: Of the runs of this seed.
    """
    if len(rows) < budget.train_rows + 2:
        raise ValueError(f"{budget.train_rows} rows to train on and some to hold out are needed, got {len(rows)}")
    disable_progress_bars()
    tokenizer = load_tokenizer(str(model_path))
    train, rest = rows[: budget.train_rows], rows[budget.train_rows :][: budget.held_out]
    held_out = candidates(map(list_row, rest), tokenizer, num_candidates=None)
    model = load_model(ModelSource(model=str(model_path), dtype="float32"))
    add_completion_head(model)
    logps = score(model, held_out, tokenizer, "packed")
    return Task(model_path, tokenizer, budget, seed, train, held_out, logps, samples, directory)


def draw_samples(
    prompts: Sequence[str], model_path: Path, max_new_tokens: int, directory: Path
) -> dict[str, list[str]]:
    """Four samples of the model for every question, kept on disk; empty ones are drawn again.

    Args:
        prompts: The questions.
        max_new_tokens: Longest sample.
        directory: Where finished samples are found again.
    """
    tokenizer = load_tokenizer(str(model_path))
    model = load_model(ModelSource(model=str(model_path), dtype="float32")).eval()
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    prepared = prepare_prompts(rows, tokenizer, instruction=None, negatives=False)
    settings = SampleSettings(num_samples=SAMPLES, max_new_tokens=max_new_tokens, batch_size=16, chunk_size=64)
    state = PartialState()
    engine = HuggingFaceEngine(model, tokenizer, settings.drawing, state)
    store = ChunkStore(directory, {"max_new_tokens": max_new_tokens, **prepared.settings()})
    records = sample_candidates(prepared, engine, settings, store=store, state=state, progress="samples")
    return {prompts[record.row]: list(record.texts) for record in records}


def token_rewards(task: Task) -> tuple[Dataset, TokenRewardReport]:
    """The training pairs of a seed, true labels, with token rewards of the reference; the default contrast prompts."""
    rows = candidates(map(pair_row, task.train), task.tokenizer, contrast=load_contrast_prompts())
    model = task.load()
    add_completion_head(model)
    refuse_long_sequences(rows, model, "pairs")
    layout = choose_pass_layout("auto", model, rows)
    return with_token_rewards(
        rows,
        cache=ReferenceCache(task.directory / "token_rewards"),
        weights=model_fingerprint(model, None),
        precision=compute_precision(model),
        layout=layout,
        score=lambda planned, _: score(model, planned, task.tokenizer, layout.layout),
    )


def candidates(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int | None = 2,
    contrast: ContrastPrompts | None = None,
) -> Dataset:
    """Tokenised candidate rows, every row kept whole.

    Args:
        rows: Pairs or lists of messages.
        num_candidates: 2 for pairs, None for lists.
        contrast: Also tokenise the contrast prompts.
    """
    given = Dataset.from_list(list(rows))
    converted, report = to_candidate_rows(
        given, tokenizer, max_length=None, num_candidates=num_candidates, contrast=contrast
    )
    if report.num_rows != len(given):
        raise ValueError(f"{len(given) - report.num_rows} of {len(given)} rows were dropped: {report.dropped}")
    return converted


def score(model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> TokenLogps:
    """Log-probs of candidate rows without dropout and gradient.

    Args:
        model: With a completion head.
        rows: Candidate rows.
        layout: ``padded`` or ``packed``.
    """
    model.eval()
    if layout == "packed":
        use_packed_attention(base_model(model))
    pad_token_id = tokenizer.pad_token_id
    return score_rows(model, rows, pad_token_id=pad_token_id, layout=layout, batch_size=EVAL_BATCH_SIZE, device="cpu")
