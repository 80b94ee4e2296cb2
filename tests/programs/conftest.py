"""A workplace as a user has one: tiny models, a data file, and a launcher that runs the real programs quickly."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.programs.launching import Imported, Launcher, program_environment

WORDS = ("<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61)))

CONFIG: dict[str, Any] = {
    "model": "model",
    "data": "rows.jsonl",
    "method": "flex_dpo",
    "output_dir": "run",
    "use_cpu": True,
    "max_steps": 8,
    "save_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-3,
}
"""A config that works in the workplace."""


def save_model(
    path: Path, *, words: Sequence[str] = WORDS, hidden: int = 32, eos: str | None = "<eos>", **shape: int
) -> None:
    """Save a tiny Qwen3, of another ``shape`` if one is given, and its word-level tokenizer; with ``num_experts`` one
    that is a mixture of these.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>"} | ({"eos_token": eos} if eos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    usual: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": hidden,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if "num_experts" in shape:
        mixture = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": False}
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**usual | mixture | shape)).save_pretrained(path)
        return
    Qwen3ForCausalLM(Qwen3Config(**usual | shape)).save_pretrained(path)


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Preference pairs of random words, of different lengths."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return "".join(f"w{draw.randrange(61)} " for _ in range(draw.randint(least, most)))

    return [{"prompt": text(2, 8), "chosen": text(2, 6), "rejected": text(2, 6)} for _ in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a JSON Lines file."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of the programs: nothing of theirs goes to the user's home, one thread, no token."""
    return program_environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def launcher(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], imported: Imported
) -> Iterator[Launcher]:
    """Starts programs without paying for their imports."""
    started = Launcher(tmp_path_factory.mktemp("output"), [environment], imported)
    yield started
    started.close()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``rows.jsonl``, in which programs run. Tests add files and never change these two."""
    path = tmp_path_factory.mktemp("workplace")
    save_model(path / "model")
    write_rows(path / "rows.jsonl", pairs(40))
    return path
