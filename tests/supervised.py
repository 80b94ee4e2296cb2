"""Supervised rows and trainers on a tiny model with a real tokenizer, for the tests of the supervised bridge."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.data.synthetic import make_corpus, train_tokenizer
from alignkit.parts.method import load_method
from alignkit.shapes._tokens import SupervisedTrainer
from tests.trainers import SHORT_RUN


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template that marks the assistant's turns."""
    return train_tokenizer(make_corpus(100, seed=0), vocab_size=300)


def model(**changes: Any) -> Qwen3ForCausalLM:
    """A Qwen3 of 2 layers and width 32 with fresh weights, always the same."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer().pad_token_id,
        "eos_token_id": tokenizer().eos_token_id,
    }
    return Qwen3ForCausalLM(Qwen3Config(**(config | changes)))


def lora() -> LoraConfig:
    """Small adapters on every linear layer."""
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def completions(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Prompt and completion as text, of different lengths."""
    draw = random.Random(seed)
    conversations = make_corpus(count, seed)
    return [
        {"prompt": f"{' so' * draw.randrange(6)}{talk[1]['content']}", "completion": f" {talk[2]['content']}"}
        for talk in conversations
    ]


def conversations(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Messages; every other conversation has two answers."""
    talks = make_corpus(2 * count, seed)
    return [{"messages": talks[i] + (talks[count + i][1:] if i % 2 else [])} for i in range(count)]


def arguments(output_dir: Path, **changes: Any) -> SFTConfig:
    """Arguments of a short run on the CPU."""
    return SFTConfig(output_dir=str(output_dir), **(SHORT_RUN | {"eval_packing": False} | changes))


def token_rows(rows: list[dict[str, Any]], max_length: int | None = None, **trained: Any) -> Dataset:
    """Rows converted as a run does it."""
    chosen = TrainedTokens(**trained)
    return to_supervised_rows(
        Dataset.from_list(rows), tokenizer(), max_length=max_length, trained=chosen, max_dropped_fraction=0.9
    )[0]


def make(output_dir: Path, rows: Dataset, peft: bool = False, **changes: Any) -> SupervisedTrainer:
    """Our trainer; padded, as TRL's, where no layout is given."""
    inherited = {key: changes.pop(key) for key in ("eval_dataset", "model", "peft_config", "layout") if key in changes}
    method = load_method(changes.pop("method", "sft"))
    return SupervisedTrainer(
        inherited.pop("model", None) or model(),
        arguments(output_dir, **changes),
        method=method,
        options=method.options(),
        train_dataset=rows,
        processing_class=tokenizer(),
        **{"peft_config": lora() if peft else None, "layout": "padded"} | inherited,
    )


def make_peer(output_dir: Path, rows: list[dict[str, Any]], peft: bool, **changes: Any) -> SFTTrainer:
    """TRL's trainer, on the rows as they are."""
    return SFTTrainer(
        model(),
        args=arguments(output_dir, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora() if peft else None,
    )
