"""One online run on GSM8K with the reward of its calculator annotations, and what the model writes before and after."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from alignkit.parts.method import load_method
from alignkit.parts.reward import Sample
from alignkit.rewards.arithmetic import GSM8KAnnotations, GSM8KAnswer
from alignkit.runs.python import train_online
from alignkit.shapes.policy import OnlineConfig
from gsm8k_pairs import MODEL, SHARED

TRAIN, TEST = SHARED / "data" / "gsm8k" / "train.jsonl", SHARED / "data" / "gsm8k" / "test.jsonl"
ANNOTATION = re.compile(r"<<([^<>]{1,400})>>")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
EVALUATION_SEED = 20_000
"""Of the completions that every model is measured on."""


@dataclass(frozen=True)
class Budget:
    """What every run has in common.

    Attributes:
        steps: Optimizer steps; each batch of completions is trained on ``iterations`` times.
        learning_rate: Peak rate of AdamW over all weights; it falls linearly to zero.
        prompts: Prompts a step.
        generations: Completions of each.
        longest: Tokens of the longest completion that is drawn.
        iterations: ``num_iterations``.
        questions: Held-out questions, the first of the test file.
        longest_measured: Tokens of the longest completion that is measured.
    """

    steps: int = 32
    learning_rate: float = 3e-4
    prompts: int = 4
    generations: int = 8
    longest: int = 64
    iterations: int = 2
    questions: int = 128
    longest_measured: int = 160


@dataclass(frozen=True)
class Arm:
    """A method with its options."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


ARMS: Mapping[str, Arm] = {"grpo": Arm("grpo"), "grpo_guard": Arm("grpo_guard")}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Questions as messages of the user, with the worked answers."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in lines]


def train(arm: Arm, seed: int, budget: Budget, directory: Path) -> dict[str, float]:
    """Train once through the online program's own run, and measure the model it leaves on held-out questions.

    Args:
        arm: Method and options.
        seed: Order of the questions and the completions that are drawn.
        budget: Length and step size.
        directory: Of the run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = directory.parent / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in read_rows(TRAIN)), encoding="utf-8")
    trainer = train_online(
        OnlineConfig(
            model=str(MODEL),
            data=str(data),
            method=arm.method,
            method_options=load_method(arm.method).options(**arm.options),
            rewards=["gsm8k_annotations"],
            parametrization="full",
            output_dir=str(directory),
            overwrite=True,
            seed=seed,
            max_steps=budget.steps,
            per_device_train_batch_size=budget.prompts * budget.generations,
            num_generations=budget.generations,
            num_iterations=budget.iterations,
            max_completion_length=budget.longest,
            learning_rate=budget.learning_rate,
            logging_steps=budget.iterations,
            save_strategy="no",
            num_samples=0,
            use_cpu=True,
        )
    ).trainer
    return {**measure(trainer.model, budget), **clipping(trainer.state.log_history)}


def clipping(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over training of what the trainer has logged of ratios."""
    keys = ("ratio/mean", "clip_ratio/low_mean", "clip_ratio/high_mean")
    logged = [entry for entry in history if "ratio/mean" in entry]
    return {f"train {key}": fmean(entry[key] for entry in logged) for key in keys}


def measure_start(budget: Budget) -> dict[str, float]:
    """The model before training, measured on the same questions from the same seed."""
    return measure(load_model(ModelSource(model=str(MODEL), dtype="float32")), budget)


def measure(model: torch.nn.Module, budget: Budget) -> dict[str, float]:
    """One completion of every held-out question, at temperature 1, and what is in them.

    Args:
        model: The policy.
        budget: Number of questions and length.
    """
    tokenizer = load_tokenizer(str(MODEL))
    rows = read_rows(TEST)[: budget.questions]
    written = complete(model, tokenizer, [row["prompt"] for row in rows], budget.longest_measured)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    ended = [tokenizer.eos_token_id in ids for ids in written]
    return {
        **annotation_figures(texts),
        "final answer right": fmean(
            GSM8KAnswer(marked=True)(prompts=texts, completions=texts, answer=[row["answer"] for row in rows])
        ),
        "ended": fmean(ended),
        "tokens": fmean(map(len, written)),
    }


def complete(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], longest: int
) -> list[list[int]]:
    """Tokens drawn for each prompt, up to and with the stop token, from a fixed seed that nothing else sees.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: Messages.
        longest: Most tokens drawn.
    """
    tokenizer.padding_side = "left"
    encoded = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(EVALUATION_SEED)
        drawn: Tensor = model.generate(
            **encoded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest
        )
    return [up_to_stop(ids, tokenizer.eos_token_id) for ids in drawn[:, encoded["input_ids"].shape[1] :].tolist()]


def up_to_stop(ids: list[int], stop: int) -> list[int]:
    """The tokens up to the first stop token, which is kept."""
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def annotation_figures(texts: Sequence[str]) -> dict[str, float]:
    """What is in the annotations of completions, of which the reward sees a part.

    ``right`` is the share of all annotations; the reward is the mean over completions of each one's own share, 0
    without any. ``trivial`` is the share of those right that need no arithmetic: one number alone, 0 or 1 among the
    operands, or an annotation that stood in the completion before. ``one digit`` is the share, of the right ones that
    are not trivial, of those with operands of one digit each.
    """
    reward = GSM8KAnnotations()
    found = [ANNOTATION.findall(text) for text in texts]
    right = [[reward.score(Sample("", f"<<{a}>>", (), {})) == 1.0 for a in annotations] for annotations in found]
    correct = [
        (annotation, is_trivial(annotation, annotations[:place]))
        for annotations, marks in zip(found, right, strict=True)
        for place, (annotation, is_right) in enumerate(zip(annotations, marks, strict=True))
        if is_right
    ]
    sums = [annotation for annotation, needs_nothing in correct if not needs_nothing]
    every = [mark for marks in right for mark in marks]
    return {
        "right": share(every),
        "reward": fmean(reward.score(Sample("", text, (), {})) for text in texts),
        "annotations": fmean(map(len, found)),
        "without any": share([not annotations for annotations in found]),
        "right a completion": sum(every) / len(texts),
        "trivial": share([needs_nothing for _, needs_nothing in correct]),
        "not trivial a completion": len(sums) / len(texts),
        "one digit": share([all(len(number) == 1 for number in operands(annotation)) for annotation in sums]),
    }


def share(marks: Sequence[bool]) -> float:
    """The share of what is true; 0 of nothing."""
    return fmean(marks) if marks else 0.0


def operands(annotation: str) -> list[str]:
    """The numbers before the last equals sign."""
    return NUMBER.findall(annotation.rpartition("=")[0])


def is_trivial(annotation: str, before: Sequence[str]) -> bool:
    """Whether a right annotation needs no arithmetic; see :func:`annotation_figures`.

    Args:
        annotation: What stands between the brackets.
        before: Those before it in the same completion.
    """
    numbers = operands(annotation)
    return len(numbers) < 2 or any(float(number) in (0.0, 1.0) for number in numbers) or annotation in before
