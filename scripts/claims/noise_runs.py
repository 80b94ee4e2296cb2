"""One training run on rows of :mod:`noise_rows`: our methods with the project's trainer, TRL's losses with its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from alignkit.evals.likelihood import side_sums
from alignkit.evals.preference import preference_sums
from alignkit.models._forward import base_model, support_packed_rows
from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from noise_rows import LabelledRow, list_row, negative_row, pair_row
from noise_task import Task, candidates, score

BETA = 0.1
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
    logps = score(model, task.held_out, task.tokenizer, "packed")
    found = preference_sums(task.held_out, logps) | side_sums(task.held_out, logps)
    figures = {key: sums.estimate().mean for key, sums in found.items()}
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
        train = candidates((negative_row(row, task.samples) for row in rows), task.tokenizer, num_candidates=None)
    else:
        train = candidates(map(list_row, rows), task.tokenizer, num_candidates=None)
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
