"""The same rows in every form, and TRL's own conversion to compare with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

QUESTIONS = [
    "What is 2 + 2?",
    "Name a colour. Any colour will do, but please explain in a few words why you chose it.\n",
    "Mia has 3 apples and buys 4 more. How many now? ",
    "Écris « bonjour » en japonais: ",
    "Say nothing",
]
CHOSEN = ["4.", "Blue, because the sky is.", "3 + 4 = 7. Mia has 7.", "こんにちは", " ... <|endoftext|>"]
REJECTED = ["5. I am sure of it.", "Blue, because I say so!", "3 + 4 = 8.", "bonjour 😀", " something"]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def forms() -> dict[str, Dataset]:
    """The same pairs as standard and conversational rows, with the prompt in its own column and in the completions."""
    prompts = [[message("system", "Be brief."), message("user", question)] for question in QUESTIONS]
    chosen = [[message("assistant", text)] for text in CHOSEN]
    rejected = [[message("assistant", text)] for text in REJECTED]
    glue = lambda heads, tails: [head + tail for head, tail in zip(heads, tails, strict=True)]  # noqa: E731
    return {
        "standard": Dataset.from_dict({"prompt": QUESTIONS, "chosen": CHOSEN, "rejected": REJECTED}),
        "standard_implicit": Dataset.from_dict(
            {"chosen": glue(QUESTIONS, CHOSEN), "rejected": glue(QUESTIONS, REJECTED)}
        ),
        "conversational": Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected}),
        "conversational_implicit": Dataset.from_dict(
            {"chosen": glue(prompts, chosen), "rejected": glue(prompts, rejected)}
        ),
    }


def trl_rows(dataset: Dataset, tokenizer: Any, max_length: int | None) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt ids, [chosen ids, rejected ids]) as TRL trains on them: its preparation, then its collator unpadded."""
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    prepared = list(
        DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, arguments, "train")
    )
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)
    found = []
    for row in prepared:
        batch = collator([row])
        sides = []
        columns = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
        for ids, attended, trained in zip(*columns, strict=True):
            length = int(attended.sum())
            start = length - int(trained.sum())
            sides.append((ids[:start].tolist(), ids[start:length].tolist()))
        assert sides[0][0] == sides[1][0]
        found.append((sides[0][0], [sides[0][1], sides[1][1]]))
    return found


def pair(prompt: str = "q", chosen: str = "good", rejected: str = "bad", **extra: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}
