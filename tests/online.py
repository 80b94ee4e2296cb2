"""Prompts, rewards and trainers of online RL on a tiny model, for the tests of the online bridge."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from alignkit.objectives.grpo import GRPOOptions
from alignkit.parts.method import load_method
from alignkit.shapes._policy_trainer import OnlineTrainer, UpdateSettings
from tests.supervised import lora, model, tokenizer
from tests.trainers import SHORT_RUN

INHERITED = ("eval_dataset", "model", "train_dataset", "reward_funcs", "gradient_rule", "callbacks", "tools") + (
    "environment_factory",
    "processing_class",
)
UPDATE_KEYS = tuple(field.name for field in fields(UpdateSettings))


def share_of_vowels(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs between almost any two texts."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(c in "aeiou1" for c in text) / (len(text) + 1) for text in texts]


def prompt_rows(count: int = 12) -> Dataset:
    """Prompts of different lengths, with a column for rewards."""
    words = ("one", "the river", "why does it rain in", "a", "seven small birds sat on")
    return Dataset.from_list([{"prompt": f"{words[i % 5]} {i}", "answer": str(i)} for i in range(count)])


def arguments(output_dir: Path, **changes: Any) -> GRPOConfig:
    """Arguments of a short run on the CPU: four completions of two prompts a step."""
    short = {key: value for key, value in SHORT_RUN.items() if key != "max_length"}
    # Adam divides a gradient by its own size: where it is almost 0, what is compared would be rounding.
    own = {
        "adam_epsilon": 1e-3,
        "num_generations": 4,
        "max_completion_length": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
    }
    return GRPOConfig(output_dir=str(output_dir), **(short | own | changes))


def make(output_dir: Path, peft: bool = False, **changes: Any) -> OnlineTrainer:
    """Our trainer; changes are arguments of the trainer, of TRL's config or options of the method."""
    method = load_method(changes.pop("method", "grpo"))
    inherited = {key: changes.pop(key) for key in INHERITED if key in changes}
    update = {key: changes.pop(key) for key in UPDATE_KEYS if key in changes}
    options = {key: changes.pop(key) for key in list(changes) if key in method.options.__dataclass_fields__}
    chosen = method.options(**options)
    wants_model = "reference" in method.needs(chosen) and not peft
    return OnlineTrainer(
        inherited.pop("model", None) or model(),
        arguments(output_dir, **changes),
        method=method,
        options=chosen,
        reward_funcs=inherited.pop("reward_funcs", share_of_vowels),
        train_dataset=inherited.pop("train_dataset", None) or prompt_rows(),
        processing_class=inherited.pop("processing_class", None) or tokenizer(),
        settings=UpdateSettings(**update),
        peft_config=lora() if peft else None,
        ref_model=model() if wants_model else None,
        **inherited,
    )


def make_peer(output_dir: Path, peft: bool = False, **changes: Any) -> GRPOTrainer:
    """TRL's trainer, told the same in its own words."""
    changes.setdefault("loss_type", GRPOOptions().loss_type)
    rewards = changes.pop("reward_funcs", share_of_vowels)
    start = model()
    if changes.get("beta") and not peft:
        # TRL loads its reference from where the policy came from.
        start.save_pretrained(output_dir / "start")
        start = type(start).from_pretrained(output_dir / "start", dtype=torch.float32)
    return GRPOTrainer(
        start,
        args=arguments(output_dir, **changes),
        reward_funcs=rewards,
        train_dataset=prompt_rows(),
        processing_class=tokenizer(),
        peft_config=lora() if peft else None,
    )
