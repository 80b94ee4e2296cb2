"""One training run on rows of :mod:`noise_rows`: our methods with the project's trainer, TRL's losses with its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer

from alignkit.data.contrast import load_contrast_prompts
from alignkit.data.convert import to_candidate_rows
from alignkit.evals.preference import preference_sums
from alignkit.evals.sampling import SampleSettings, prepare_prompts, sample_candidates
from alignkit.evals.sampling_engines import HuggingFaceEngine
from alignkit.evals.sampling_store import ChunkStore
from alignkit.evals.token_rewards import TokenRewardReport, token_reward_report
from alignkit.methods._forward import (
    add_completion_head,
    base_model,
    score_rows,
    support_packed_rows,
    use_packed_attention,
)
from alignkit.methods._preference import BridgeSettings, PreferenceTrainer
from alignkit.methods._token_rewards import scored_rows, token_rewards_of
from alignkit.methods.method import load_method
from alignkit.parametrizations.loading import ModelSource, load_model, load_tokenizer
from noise_rows import LabelledRow, list_row, negative_row, pair_row

BETA = 0.1
SAMPLES = 4
TOLD = "told"
"""In place of a rate: the share of labels that is really flipped."""

TRL_METHODS: Mapping[str, Mapping[str, Any]] = {
    "TRL sigmoid": {"loss_type": "sigmoid"},
    "TRL robust .1": {"loss_type": "robust", "label_smoothing": 0.1},
    "TRL robust, told": {"loss_type": "robust", "label_smoothing": TOLD},
    "TRL ipo": {"loss_type": "ipo"},
}
OUR_METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "treg": ("treg", {"beta": BETA}),
    "adpo listwise_zscore": ("adpo", {"beta": BETA, "target": "listwise_zscore"}),
    "adpo pairwise_hard": ("adpo", {"beta": BETA, "target": "pairwise_hard"}),
    "d2o": ("d2o", {"alpha": BETA, "beta": BETA}),
}
METHODS = (*TRL_METHODS, *OUR_METHODS)


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
    reference_logps: list[list[list[float]]]
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
        model_path: The model.
        budget: How many to train on and to hold out.
        seed: The seed.
        samples: Samples by question.
        directory: Of the runs of this seed.
    """
    if len(rows) < budget.train_rows + 2:
        raise ValueError(f"{budget.train_rows} rows to train on and some to hold out are needed, got {len(rows)}")
    disable_progress_bars()
    tokenizer = load_tokenizer(str(model_path))
    train, rest = rows[: budget.train_rows], rows[budget.train_rows :][: budget.held_out]
    held_out = _candidates(map(list_row, rest), tokenizer, num_candidates=None)
    model = load_model(ModelSource(model=str(model_path), dtype="float32"))
    add_completion_head(model)
    logps = _score(model, held_out, tokenizer)
    return Task(model_path, tokenizer, budget, seed, train, held_out, logps, samples, directory)


def draw_samples(
    prompts: Sequence[str], model_path: Path, max_new_tokens: int, directory: Path
) -> dict[str, list[str]]:
    """Four samples of the model for every question, kept on disk; empty ones are drawn again.

    Args:
        prompts: The questions.
        model_path: The model.
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
    rows = _candidates(map(pair_row, task.train), task.tokenizer, contrast=load_contrast_prompts())
    model = task.load()
    add_completion_head(model)
    planned = [scored_rows(row, packed=False) for row in rows]
    flat = Dataset.from_list([scored.candidate_row() for plan in planned for scored in plan])
    scores = iter(_score(model, flat, task.tokenizer, layout="padded"))
    rewards = []
    for row in rows:
        # Chosen and rejected under the better prompt, then both under the worse one.
        better_worse = [torch.tensor(next(scores)[0]) for _ in range(2 * len(row["completion_ids"]))]
        rewards.append([token_rewards_of(better_worse[k], better_worse[2 + k]).tolist() for k in range(2)])
    plain = rows.select_columns(["prompt_ids", "completion_ids", "scores"]).add_column("token_rewards", rewards)
    return plain, token_reward_report(plain)


def swapped(rows: Dataset, flipped: Sequence[bool]) -> Dataset:
    """Candidate pairs with chosen and rejected swapped where a row is flipped; rewards stay with their tokens."""
    columns = [name for name in rows.column_names if name != "scores"]
    changed = [
        {**row, **{name: row[name][::-1] for name in columns if name != "prompt_ids"}} if is_flipped else row
        for row, is_flipped in zip(rows, flipped, strict=True)
    ]
    return Dataset.from_list(changed, features=rows.features)


def run(task: Task, name: str, rows: Sequence[LabelledRow], share: float, rewarded: Dataset | None) -> dict[str, float]:
    """Train all weights of the model once, and measure it on the held-out rows.

    Args:
        task: The seed's task.
        name: One of ``METHODS``.
        rows: Its training rows, labels flipped or not.
        share: Share of flipped rows, for a method that is told.
        rewarded: The pairs with token rewards and true labels; only for ``treg``.
    """
    if name in TRL_METHODS:
        trainer = _trl_trainer(task, TRL_METHODS[name], rows, share)
    else:
        trainer = _our_trainer(task, name, rows, rewarded)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return measure(task, trainer.model)


def measure(task: Task, model: nn.Module) -> dict[str, float]:
    """Held-out accuracies and likelihoods; ``accuracy/reward`` goes by the log-ratio to the reference, sums."""
    support_packed_rows(base_model(model))
    logps = _score(model, task.held_out, task.tokenizer)
    figures = {key: sums.estimate().mean for key, sums in preference_sums(task.held_out, logps).items()}
    figures["accuracy/reward"] = reward_accuracy(task.held_out["scores"], logps, task.reference_logps)
    return figures


def reward_accuracy(scores: Sequence[Sequence[float]], logps: Sequence[Any], reference_logps: Sequence[Any]) -> float:
    """Share of the pairs of unequal score, over all rows, that the log-ratio puts in order; a tie counts half.

    Args:
        scores: By row.
        logps: Token log-probs by row and candidate.
        reference_logps: The same under the reference.
    """
    wins = count = 0.0
    for row_scores, policy, reference in zip(scores, logps, reference_logps, strict=True):
        ratios = [math.fsum(p) - math.fsum(r) for p, r in zip(policy, reference, strict=True)]
        for i, better in enumerate(row_scores):
            for j, worse in enumerate(row_scores):
                if better > worse:
                    wins += 0.5 if ratios[i] == ratios[j] else float(ratios[i] > ratios[j])
                    count += 1
    return wins / count


def _our_trainer(task: Task, name: str, rows: Sequence[LabelledRow], rewarded: Dataset | None) -> PreferenceTrainer:
    method_name, options = OUR_METHODS[name]
    method = load_method(method_name)
    if name == "treg":
        if rewarded is None:
            raise ValueError("treg needs the pairs with token rewards")
        train = swapped(rewarded, [row.is_flipped for row in rows])
    elif name == "d2o":
        train = _candidates((negative_row(row, task.samples) for row in rows), task.tokenizer, num_candidates=None)
    else:
        train = _candidates(map(list_row, rows), task.tokenizer, num_candidates=None)
    return PreferenceTrainer(
        task.load(),
        _arguments(task),
        method=method,
        options=method.options(**options),
        settings=BridgeSettings(reference_cache=task.directory / "reference"),
        train_dataset=train,
        processing_class=task.tokenizer,
    )


def _trl_trainer(task: Task, options: Mapping[str, Any], rows: Sequence[LabelledRow], share: float) -> DPOTrainer:
    told = {name: share if value == TOLD else value for name, value in options.items()}
    dataset = Dataset.from_list(list(map(pair_row, rows)))
    arguments = _arguments(task, beta=BETA, **told)
    return DPOTrainer(task.load(), args=arguments, train_dataset=dataset, processing_class=task.tokenizer)


def _arguments(task: Task, **options: Any) -> DPOConfig:
    return DPOConfig(
        output_dir=str(task.directory / "trainer"),
        seed=task.seed,
        max_steps=task.budget.steps,
        per_device_train_batch_size=task.budget.batch_size,
        learning_rate=task.budget.learning_rate,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        precompute_ref_log_probs=True,
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )


def _candidates(
    rows: Any, tokenizer: PreTrainedTokenizerBase, num_candidates: int | None = 2, **kwargs: Any
) -> Dataset:
    given = Dataset.from_list(list(rows))
    converted, report = to_candidate_rows(given, tokenizer, max_length=None, num_candidates=num_candidates, **kwargs)
    if report.num_rows != len(given):
        raise ValueError(f"{len(given) - report.num_rows} of {len(given)} rows were dropped: {report.dropped}")
    return converted


def _score(
    model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase, layout: str = "shared_prefix"
) -> list[list[list[float]]]:
    model.eval()
    if layout == "shared_prefix":
        use_packed_attention(base_model(model))
    return score_rows(
        model,
        rows,
        pad_token_id=tokenizer.pad_token_id,
        layout=layout,  # type: ignore[arg-type]
        batch_size=8,
        device="cpu",
    )
