"""``method: kto`` follows trl.KTOTrainer step for step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings
from tests.trainers import SHORT_RUN, flat_weights, logged, random_rows

BATCH = 4
WEIGHTS = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.8}
SHARED_METRICS = ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    """Sixteen labelled answers of different lengths: in every batch some good ones and some bad ones."""
    rows = random_rows([(1 + i % 7, (2 + i % 5,)) for i in range(16)], seed=4)
    good = [True, False, True, True, False, False, True, False] * 2
    labelled = zip(rows, good, strict=True)
    return [{"prompt_ids": r["prompt_ids"], "completion_ids": r["completion_ids"][0], "label": g} for r, g in labelled]


def rotated(answers: list[dict[str, Any]]) -> list[list[int]]:
    """The answer to another prompt that TRL puts behind each: that of the row before in its batch."""
    batches = [answers[start : start + BATCH] for start in range(0, len(answers), BATCH)]
    return [row["completion_ids"] for batch in batches for row in [batch[-1], *batch[:-1]]]


@pytest.mark.parametrize(("kind", "form"), [("full", "kto"), ("lora", "kto"), ("full", "apo_zero_unpaired")])
def test_every_step_is_that_of_trl(
    kind: str, form: str, tmp_path: Path, make_trainer: Any, model_path: str, tokenizer: Any, answers: Any
) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if kind == "lora" else None
    others = rotated(answers)
    rows = [row | {"KL_completion_ids": other} for row, other in zip(answers, others, strict=True)]
    # TRL tokenises whatever it is given; the tokens are handed to it as they are.
    unchanged = type("Tokenised", (KTOTrainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})
    peer = unchanged(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=KTOConfig(str(tmp_path / "peer"), loss_type=form, **(SHORT_RUN | WEIGHTS)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    before = flat_weights(peer.model)
    peer.train()
    ours = [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": [row["completion_ids"], other],
            "scores": [float(row["label"]), -1.0],
        }
        for row, other in zip(answers, others, strict=True)
    ]
    mine = make_trainer(
        "kto",
        load_method("kto").options(**WEIGHTS, form=form),
        BridgeSettings(layout="padded"),
        {"train_sampling_strategy": "sequential"},
        train_dataset=Dataset.from_list(ours),
        peft_config=adapter,
    )
    mine.train()
    assert len(logged(mine, "loss")) == 6 and max(logged(mine, "grad_norm")) > 0.01
    assert logged(mine, "loss") == pytest.approx(logged(peer, "loss"), rel=1e-6, abs=1e-6)
    assert logged(mine, "grad_norm") == pytest.approx(logged(peer, "grad_norm"), rel=1e-5)
    torch.testing.assert_close(flat_weights(mine.model), flat_weights(peer.model), rtol=1e-4, atol=1e-6)
    assert (flat_weights(mine.model) - before).abs().max() > 1e-3
    for key in SHARED_METRICS if form == "kto" else SHARED_METRICS[1:]:
        assert logged(mine, key) == pytest.approx(logged(peer, key), rel=1e-4, abs=1e-5), key
    assert form == "apo_zero_unpaired" or max(logged(mine, "kl")) > 1e-3, "the divergence is never above 0"
