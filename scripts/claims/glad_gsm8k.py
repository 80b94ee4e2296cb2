"""Few-shot fine-tuning of the small trained model on solutions of GSM8K questions, with the project's own trainer.

The model was trained on GSM8K's training questions four times over, so that rows of those would teach it nothing. The
rows here are correct solutions by other models to *test* questions, which it has not seen and which end in another
format (``A: 18`` where it knows ``#### 18``). They are split by question and only likelihoods are reported; an accuracy
on GSM8K's test questions after this would be worthless.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig

from alignkit.data.supervised import to_supervised_rows
from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from alignkit.parts.method import load_method
from alignkit.shapes._tokens import SupervisedTrainer
from glad_adapt import WATCHED, Arm
from gsm8k_pairs import MODEL, SHARED, SOLUTIONS, read_questions, solutions

GROUND_TRUTH = SHARED / "data" / "gsm8k" / "test.jsonl"
TRUTHFULQA = SHARED / "data" / "truthfulqa" / "TruthfulQA.csv"

Rows = list[dict[str, list[dict[str, str]]]]
"""Rows in the conversational form: ``prompt`` and ``completion``, a list of one message each."""


@dataclass(frozen=True)
class RealBudget:
    """What every run has in common.

    Attributes:
        steps: AdamW steps at a constant rate.
        train_rows: Solutions trained on.
        test_rows: Rows of each set that is measured, validation included.
        learning_rate: Of an arm whose ``rate_factor`` is 1.
        batch_size: Rows a step.
        max_length: Rows with more tokens are left out, not cut.
        measure_every: Steps from one checkpoint to the next.
    """

    steps: int = 30
    train_rows: int = 32
    test_rows: int = 32
    learning_rate: float = 5e-3
    batch_size: int = 4
    max_length: int = 144
    measure_every: int = 10


class Checkpoints(TrainerCallback):
    """Measures every set before training and every few steps, beside what the trainer logs.

    Attributes:
        curve: ``step``, and the loss of each set.

    Args:
        trainer: Its ``eval_dataset`` is measured.
        every: Steps.
    """

    def __init__(self, trainer: SupervisedTrainer, every: int) -> None:
        self.trainer, self.every = trainer, every
        self.curve: dict[str, list[float]] = {"step": []} | {name: [] for name in trainer.eval_dataset}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model as it is."""
        self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every ``every`` steps."""
        if state.global_step % self.every == 0:
            # Logging a measurement would otherwise cancel the log of the training step that is due.
            is_due = control.should_log
            self.measure(state.global_step)
            control.should_log = is_due

    def measure(self, step: int) -> None:
        """Append a point."""
        found = self.trainer.evaluate()
        self.trainer.model.train()
        self.curve["step"].append(step)
        for name in self.trainer.eval_dataset:
            self.curve[name].append(found[f"eval_{name}_loss"])


def missing() -> list[Path]:
    """What the study needs and is not there."""
    return [path for path in (MODEL, SOLUTIONS, GROUND_TRUTH, TRUTHFULQA) if not path.exists()]


def row(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """One question with its answer."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def read_truthfulqa() -> Rows:
    """Every question with its best answer."""
    with TRUTHFULQA.open(encoding="utf-8") as file:
        return [row(line["Question"], line["Best Answer"]) for line in csv.DictReader(file)]


def text_rows(seed: int) -> dict[str, Rows]:
    """Rows of one seed, in random order: ``solutions`` and ``truth`` (of the same questions), and ``truthfulqa``.

    Args:
        seed: Of the order, and of the choice among several correct solutions of a question.
    """
    generator = np.random.default_rng(seed)
    with GROUND_TRUTH.open(encoding="utf-8") as file:
        truth = {line["question"]: line["answer"] for line in map(json.loads, file)}
    found: dict[str, Rows] = {"solutions": [], "truth": []}
    questions = read_questions(SOLUTIONS)
    for position in generator.permutation(len(questions)):
        question = questions[position]
        correct = solutions(question, correct=True)
        if correct:
            drawn = correct[generator.integers(len(correct))]
            found["solutions"].append(row(question["question"], drawn))
            found["truth"].append(row(question["question"], truth[question["question"]]))
    others = read_truthfulqa()
    return found | {"truthfulqa": [others[i] for i in generator.permutation(len(others))]}


def tokenised(rows: Rows, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[dict[str, list[int]] | None]:
    """``input_ids`` and ``labels``, the completion's alone; None in place of a row that is too long."""
    converted, _ = to_supervised_rows(Dataset.from_list(rows), tokenizer, max_length=None, name="rows")
    if len(converted) != len(rows):
        raise RuntimeError(f"{len(rows) - len(converted)} rows were dropped, so that questions cannot be told apart")
    return [dict(r) if len(r["input_ids"]) <= limit else None for r in converted]


def token_sets(seed: int, tokenizer: PreTrainedTokenizerBase, budget: RealBudget) -> dict[str, Dataset]:
    """``train``, ``validation``, ``id``, ``old`` and ``ood``: the first three are of different questions.

    Args:
        seed: Of the draw.
        budget: Says how many rows, and how long.
    """
    needed = budget.train_rows + 2 * budget.test_rows
    text = {name: rows[: 10 * needed] for name, rows in text_rows(seed).items()}
    tokens = {name: tokenised(rows, tokenizer, budget.max_length) for name, rows in text.items()}
    pairs = [(new, old) for new, old in zip(tokens["solutions"], tokens["truth"], strict=True) if new and old]
    others = [r for r in tokens["truthfulqa"] if r]
    if len(pairs) < needed or len(others) < budget.test_rows:
        raise ValueError(f"{needed} questions of at most {budget.max_length} tokens are needed; found {len(pairs)}")
    first, second = budget.train_rows, budget.train_rows + budget.test_rows
    sets = {
        "train": [new for new, _ in pairs[:first]],
        "validation": [new for new, _ in pairs[first:second]],
        "id": [new for new, _ in pairs[second:needed]],
        "old": [old for _, old in pairs[second:needed]],
        "ood": others[: budget.test_rows],
    }
    return {name: Dataset.from_list(rows) for name, rows in sets.items()}


def train(arm: Arm, seed: int, budget: RealBudget, directory: Path) -> dict[str, Any]:
    """Fine-tune once with LoRA on every linear layer.

    Args:
        arm: How.
        seed: Of the rows, the adapters and the batches; the same for all arms.
        budget: How long.
        directory: Of the run; nothing is saved there.

    Returns:
        As :func:`glad_adapt.train`, without the sharpness gap.
    """
    started = time.process_time()
    tokenizer = load_tokenizer(str(MODEL))
    sets = token_sets(seed, tokenizer, budget)
    method = load_method("sft")
    trainer = SupervisedTrainer(
        load_model(ModelSource(model=str(MODEL), dtype="float32")),
        arguments(arm, seed, budget, directory),
        method=method,
        options=method.options(),
        train_dataset=sets.pop("train"),
        eval_dataset=sets,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
        gradient_rule=arm.chosen(),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoints = Checkpoints(trainer, budget.measure_every)
    trainer.add_callback(checkpoints)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    keys = WATCHED if arm.rule else ()
    return {
        "seconds": time.process_time() - started,
        "curve": checkpoints.curve | {"train": [float("nan"), *(entry["loss"] for entry in logged)]},
        "metrics": {key: float(np.mean([entry[key] for entry in logged])) for key in keys},
    }


def arguments(arm: Arm, seed: int, budget: RealBudget, directory: Path) -> SFTConfig:
    """TRL's arguments: metrics are logged every ``measure_every`` steps, nothing is saved."""
    return SFTConfig(
        output_dir=str(directory),
        seed=seed,
        max_steps=budget.steps,
        per_device_train_batch_size=budget.batch_size,
        per_device_eval_batch_size=16,
        learning_rate=budget.learning_rate * arm.rate_factor,
        lr_scheduler_type="constant",
        logging_steps=budget.measure_every,
        save_strategy="no",
        max_length=None,
        prediction_loss_only=True,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
