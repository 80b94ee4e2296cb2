"""One training run on the GSM8K pairs of :mod:`gsm8k_pairs`, with the project's trainer and diagnostics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig

from alignkit.data.candidates import to_candidate_rows
from alignkit.evals.likelihood import side_sums
from alignkit.evals.preference import preference_sums
from alignkit.models._forward import score_rows
from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from alignkit.shapes._probe import DispersionProbe
from gsm8k_pairs import Split

WATCHED_ROWS = 32
"""Training pairs, and probe pairs, on which the curves are measured; always the same within a seed."""
EVAL_BATCH_SIZE = 8

OBJECTIVES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DPO": ("dpo", {"beta": 0.1}),
    "Flex .1/.08": ("flex_dpo", {"beta_pos": 0.1, "beta_neg": 0.08}),
    "Flex .1/.05": ("flex_dpo", {"beta_pos": 0.1, "beta_neg": 0.05}),
    "DPO + SFT .1": ("flex_dpo", {"beta_pos": 0.1, "beta_neg": 0.1, "eta": 0.1}),
}


@dataclass(frozen=True)
class Budget:
    """What every run has in common.

    Attributes:
        steps: Optimiser steps, in which every training pair comes twice.
        learning_rate: Peak rate of AdamW; it falls linearly to zero.
        batch_size: Pairs a step.
        max_length: Pairs with more tokens of prompt and longer solution are left out, not cut.
    """

    steps: int
    learning_rate: float = 1e-4
    batch_size: int = 4
    max_length: int = 256

    @property
    def train_rows(self) -> int:
        """Training pairs seen, for two epochs."""
        return self.steps * self.batch_size // 2

    @property
    def measure_every(self) -> int:
        """Steps from one point of a curve to the next."""
        return self.steps // 4


@dataclass(frozen=True)
class Rows:
    """Candidate rows of one seed."""

    train: Dataset
    held_out: Dataset

    @property
    def watched(self) -> Dataset:
        """The training pairs of the curves."""
        return self.train.select(range(min(WATCHED_ROWS, len(self.train))))

    @property
    def probe(self) -> Dataset:
        """The held-out pairs of the curves."""
        return self.held_out.select(range(min(WATCHED_ROWS, len(self.held_out))))


@dataclass(frozen=True)
class Run:
    """What one run has shown.

    Attributes:
        steps: Optimiser steps at which the curves were measured, the first being 0 [N].
        curves: Means over the watched training pairs and, for the two keys of the probe, over all held-out responses,
            each [N].
        before: Held-out figures of the evaluations ``preference`` and ``likelihood`` before training.
        after: The same after it.
    """

    steps: list[int]
    curves: dict[str, list[float]]
    before: dict[str, float]
    after: dict[str, float]


def tokenise(split: Split, tokenizer: PreTrainedTokenizerBase, budget: Budget, seed: int) -> Rows:
    """Candidate rows short enough, and of those to train on as many as the budget needs, drawn by the seed."""
    parts = {}
    for part, rows in vars(split).items():
        converted, _ = to_candidate_rows(rows, tokenizer, max_length=None, num_candidates=2, name=part)
        parts[part] = converted.filter(_num_tokens_up_to, fn_kwargs={"max_length": budget.max_length})
    train = parts["train"].shuffle(seed=seed)
    if len(train) < budget.train_rows:
        raise ValueError(f"{budget.steps} steps need {budget.train_rows} pairs; only {len(train)} are short enough")
    return Rows(train.select(range(budget.train_rows)), parts["held_out"].shuffle(seed=seed))


def _num_tokens_up_to(row: Mapping[str, Any], max_length: int) -> bool:
    return len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) <= max_length


def train(name: str, split: Split, *, model_path: Path, seed: int, budget: Budget, directory: Path) -> Run:
    """Train all weights of the model once; ``figures.json`` in ``directory`` keeps what was seen.

    Args:
        name: Key of ``OBJECTIVES``.
        split: Pairs in text.
        model_path: The policy at the start, and the reference.
        seed: Choice of the training pairs and order of the batches.
        budget: Length and step size of the run.
        directory: Of this run.
    """
    tokenizer = load_tokenizer(str(model_path))
    rows = tokenise(split, tokenizer, budget, seed)
    method_name, options = OBJECTIVES[name]
    method = load_method(method_name)
    trainer = PreferenceTrainer(
        load_model(ModelSource(model=str(model_path), dtype="float32")),
        training_arguments(budget, seed, directory),
        method=method,
        options=method.options(**options),
        settings=BridgeSettings(reference_cache=directory.parent / "reference"),
        train_dataset=rows.train,
        eval_dataset=rows.watched,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(DispersionProbe(trainer, rows.probe, budget.measure_every))
    before = held_out_metrics(trainer, rows.held_out)
    trainer.train()
    run = Run(*curves(trainer.state.log_history), before, held_out_metrics(trainer, rows.held_out))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "figures.json").write_text(json.dumps(vars(run), indent=1), encoding="utf-8")
    return run


def training_arguments(budget: Budget, seed: int, directory: Path) -> DPOConfig:
    """TRL's arguments: everything is measured every ``measure_every`` steps, nothing is saved."""
    return DPOConfig(
        output_dir=str(directory),
        seed=seed,
        max_steps=budget.steps,
        per_device_train_batch_size=budget.batch_size,
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        learning_rate=budget.learning_rate,
        logging_steps=budget.measure_every,
        eval_strategy="steps",
        eval_steps=budget.measure_every,
        eval_on_start=True,
        save_strategy="no",
        precompute_ref_log_probs=True,
        max_length=None,
        prediction_loss_only=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )


def held_out_metrics(trainer: PreferenceTrainer, rows: Dataset) -> dict[str, float]:
    """Preference accuracy and likelihoods on the held-out pairs."""
    trainer.model.eval()
    scores = score_rows(
        trainer.model,
        rows,
        pad_token_id=trainer.data_collator.pad_token_id,
        layout=trainer.layout.layout,
        batch_size=EVAL_BATCH_SIZE,
        device=trainer.accelerator.device,
    )
    found = preference_sums(rows, scores) | side_sums(rows, scores)
    return {key: sums.estimate().mean for key, sums in found.items()}


def curves(history: Sequence[Mapping[str, float]]) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and the curves over them, from what the trainer has logged."""
    watched = [entry for entry in history if "eval_logps/chosen" in entry]
    probes = [entry for entry in history if "dispersion" in entry]
    steps = [int(entry["step"]) for entry in watched]
    if steps[1:] != [int(entry["step"]) for entry in probes]:
        raise RuntimeError(f"pairs measured at steps {steps}, the probe at {[entry['step'] for entry in probes]}")
    found = {
        key.removeprefix("eval_"): [float(entry[key]) for entry in watched] for key in watched[0] if "eval_" in key
    }
    # Before the first step the policy is the reference, and dispersion zero by definition.
    start = np.mean([entry["mean_logps/probe"] - entry["dispersion"] for entry in probes])
    found["dispersion"] = [0.0, *(float(entry["dispersion"]) for entry in probes)]
    found["mean_logps/probe"] = [float(start), *(float(entry["mean_logps/probe"]) for entry in probes)]
    return steps, found
