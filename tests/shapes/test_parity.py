"""``method: dpo`` follows trl.DPOTrainer step for step: the test that makes an upgrade of TRL safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from alignkit.shapes._candidates import BridgeSettings
from tests.trainers import dpo_arguments, flat_weights, logged

SHARED_METRICS = ("logps/chosen", "logps/rejected", "rewards/margins", "entropy", "mean_token_accuracy")


def lora(kind: str) -> LoraConfig | None:
    if kind == "full":
        return None
    saved = ["lm_head"] if kind == "lora and the head in full" else None
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=saved)


@pytest.fixture(scope="module", params=["full", "lora", "lora and the head in full"])
def peer(request: Any, tmp_path_factory: Any, model_path: str, tokenizer: Any, rows: Dataset) -> tuple[str, DPOTrainer]:
    """A finished trl.DPOTrainer run of six steps on the same tokens."""
    pairs = rows.map(
        lambda r: {"chosen_ids": r["completion_ids"][0], "rejected_ids": r["completion_ids"][1]},
        remove_columns=["completion_ids", "scores"],
    )
    # TRL tokenises whatever it is given; the tokens are handed to it as they are.
    unchanged = type("Tokenised", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})
    trainer = unchanged(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=dpo_arguments(tmp_path_factory.mktemp("peer")),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=lora(request.param),
    )
    trainer.train()
    return request.param, trainer


def ours(make_trainer: Any, kind: str, layout: str) -> Any:
    trainer = make_trainer(settings=BridgeSettings(layout=layout), peft_config=lora(kind))
    trainer.train()
    return trainer


def test_padded_layout_is_bitwise_trl(peer: tuple[str, DPOTrainer], make_trainer: Any) -> None:
    kind, theirs = peer
    trainer = ours(make_trainer, kind, "padded")
    assert trainer.layout.layout == "padded"
    assert len(logged(trainer, "loss")) == 6
    assert logged(trainer, "loss") == logged(theirs, "loss")
    assert logged(trainer, "grad_norm") == logged(theirs, "grad_norm")
    assert torch.equal(flat_weights(trainer.model), flat_weights(theirs.model))
    for key in SHARED_METRICS:
        assert logged(trainer, key) == pytest.approx(logged(theirs, key), rel=1e-5, abs=1e-6), key


def test_packed_layout_follows_trl_to_1e_5(peer: tuple[str, DPOTrainer], make_trainer: Any) -> None:
    kind, theirs = peer
    trainer = ours(make_trainer, kind, "packed")
    assert trainer.layout.layout == "packed"
    assert logged(trainer, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)
    assert not torch.equal(flat_weights(trainer.model), flat_weights(theirs.model)), "the layouts ran the same kernels?"


def test_rows_move_the_weights(model_path: str, peer: tuple[str, DPOTrainer]) -> None:
    """Guards the tests above: equal because both trained, not because neither did."""
    kind, theirs = peer
    if kind == "lora and the head in full":
        head = theirs.model.get_base_model().lm_head
        moved = (head.modules_to_save["default"].weight - head.original_module.weight).abs().max()
        assert moved > 1e-4
    assert max(logged(theirs, "grad_norm")) > 0.01
    assert logged(theirs, "loss")[0] == pytest.approx(0.693147, abs=1e-4)
    assert logged(theirs, "loss")[-1] != logged(theirs, "loss")[0]


def test_output_directory_holds_nothing_of_trl(tmp_path: Path, make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.save_model()
    assert "DPO" not in "".join(p.name for p in (tmp_path / "run").iterdir())
