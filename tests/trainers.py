"""A tiny saved model, a tokenizer without text and random candidate rows, shared by the bridge tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import DPOConfig

from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer

VOCABULARY = 96


def random_rows(shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> list[dict[str, Any]]:
    """Candidate rows of random tokens; a shape is (prompt length, completion lengths)."""
    draw = random.Random(seed)
    tokens = lambda n: [draw.randrange(2, VOCABULARY) for _ in range(n)]  # noqa: E731
    return [
        {
            "prompt_ids": tokens(prompt),
            "completion_ids": [tokens(n) for n in completions],
            "scores": [1.0] + [0.0] * (len(completions) - 1),
        }
        for prompt, completions in shapes
    ]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over <pad>, <eos> and w2..w95."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a saved Qwen3 of 2 layers and width 32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    path = tmp_path_factory.mktemp("tiny_qwen3")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def rows() -> Dataset:
    """Sixteen pairs of different lengths."""
    draw = random.Random(1)
    shapes = [(draw.randrange(1, 24), (draw.randrange(1, 12), draw.randrange(1, 12))) for _ in range(16)]
    return Dataset.from_list(random_rows(shapes, seed=2))


SHORT_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "seed": 1,
    "disable_tqdm": True,
    "max_length": None,
    "pad_to_multiple_of": None,
    "prediction_loss_only": True,
}
"""Arguments of a short run on the CPU, for any trainer of TRL."""


def dpo_arguments(output_dir: Path, **changes: Any) -> DPOConfig:
    """Arguments of a short run on the CPU."""
    return DPOConfig(output_dir=str(output_dir), **(SHORT_RUN | changes))


@pytest.fixture
def make_trainer(
    tmp_path: Path, model_path: str, tokenizer: PreTrainedTokenizerFast, rows: Dataset
) -> Callable[..., PreferenceTrainer]:
    """Build a trainer on the tiny model; keyword arguments change method, options, layout, rows and TRL's arguments."""

    def make(
        method: str = "dpo",
        options: Any = None,
        settings: BridgeSettings | None = None,
        arguments: dict[str, Any] | None = None,
        **inherited: Any,
    ) -> PreferenceTrainer:
        chosen = load_method(method) if isinstance(method, str) else method
        model = inherited.pop("model", None) or AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        inherited.setdefault("train_dataset", rows)
        return PreferenceTrainer(
            model,
            dpo_arguments(tmp_path / "run", **(arguments or {})),
            method=chosen,
            options=chosen.options() if options is None else options,
            settings=settings or BridgeSettings(),
            processing_class=tokenizer,
            **inherited,
        )

    return make


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def logged(trainer: Any, key: str) -> list[float]:
    """Values of one key over the logged training steps."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry and key in entry]
