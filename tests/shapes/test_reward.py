"""Reward models: parity with TRL's trainer, the head beside an adapter, where rewards are read off, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from alignkit.parts.method import load_method
from alignkit.shapes._reward import RewardModelTrainer
from tests.trainers import SHORT_RUN, flat_weights, logged

SHARED_METRICS = ("accuracy", "margin", "mean_reward", "num_tokens")
CENTER = 0.05


def lora(kind: str) -> LoraConfig | None:
    adapter = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
    return None if kind == "full" else adapter


def model_of(model_path: str) -> Any:
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)


def with_margin(rows: Dataset) -> Dataset:
    return rows.add_column("margin", [0.25 * (i % 4) for i in range(len(rows))])


@pytest.fixture(scope="module", params=["full", "lora"])
def peer(request: Any, tmp_path_factory: Any, model_path: str, tokenizer: Any, rows: Dataset) -> tuple[str, Any]:
    """A finished trl.RewardTrainer run of six steps on the same tokens."""
    pairs = with_margin(rows).map(
        lambda r: {
            "chosen_ids": r["prompt_ids"] + r["completion_ids"][0],
            "rejected_ids": r["prompt_ids"] + r["completion_ids"][1],
        },
        remove_columns=["prompt_ids", "completion_ids", "scores"],
    )
    arguments = RewardConfig(str(tmp_path_factory.mktemp("peer")), **SHORT_RUN, center_rewards_coefficient=CENTER)
    trainer = RewardTrainer(
        model_of(model_path),
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=lora(request.param),
    )
    trainer.train()
    return request.param, trainer


def make(
    folder: Path,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    *,
    method: str = "bradley_terry",
    options: Any = None,
    **inherited: Any,
) -> Any:
    chosen = load_method(method)
    return RewardModelTrainer(
        model,
        RewardConfig(str(folder / "run"), **SHORT_RUN),
        method=chosen,
        options=options or chosen.options(),
        train_dataset=rows,
        processing_class=tokenizer,
        **inherited,
    )


def test_bradley_terry_is_bitwise_trl(
    peer: Any, tmp_path: Path, model_path: str, tokenizer: Any, rows: Dataset
) -> None:
    kind, theirs = peer
    options = load_method("bradley_terry").options(center_rewards_coefficient=CENTER)
    trainer = make(
        tmp_path, model_of(model_path), tokenizer, with_margin(rows), options=options, peft_config=lora(kind)
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 6 and max(logged(trainer, "grad_norm")) > 0.01
    assert logged(trainer, "loss") == logged(theirs, "loss")
    assert logged(trainer, "grad_norm") == logged(theirs, "grad_norm")
    assert torch.equal(flat_weights(trainer.model), flat_weights(theirs.model))
    for key in SHARED_METRICS:
        assert logged(trainer, key) == pytest.approx(logged(theirs, key), rel=1e-5, abs=1e-6), key
