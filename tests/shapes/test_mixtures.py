"""Several methods with a weight each: TRL's sums of losses step for step, and the methods they are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from alignkit.parts.method import load_method
from alignkit.reports.card import render_card
from alignkit.shapes._candidates import METRICS as BRIDGE_METRICS
from alignkit.shapes._candidates import BridgeSettings
from tests.reports.test_card import content
from tests.trainers import dpo_arguments, flat_weights, logged

MIXTURE = "1.0*dpo+0.2*sft"


def lora(kind: str) -> LoraConfig | None:
    return None if kind == "full" else LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def losses_of_trl(rows: Dataset, model_path: str, tokenizer: Any, folder: Any, kind: str, **changes: Any) -> DPOTrainer:
    pairs = rows.map(
        lambda r: {"chosen_ids": r["completion_ids"][0], "rejected_ids": r["completion_ids"][1]},
        remove_columns=["completion_ids", "scores"],
    )
    unchanged = type("Tokenised", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})
    trainer = unchanged(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=dpo_arguments(folder, **changes),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=lora(kind),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_mixture_follows_the_weighted_losses_of_trl(
    kind: str, rows: Dataset, model_path: str, tokenizer: Any, tmp_path: Any, make_trainer: Any
) -> None:
    changes = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
    theirs = losses_of_trl(rows, model_path, tokenizer, tmp_path / "peer", kind, **changes)
    mine = make_trainer(MIXTURE, settings=BridgeSettings(layout="padded"), peft_config=lora(kind))
    mine.train()
    assert len(logged(mine, "loss")) == 6
    assert logged(mine, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-6)
    assert logged(mine, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-5)
    alone = make_trainer("dpo", settings=BridgeSettings(layout="padded"), peft_config=lora(kind))
    alone.train()
    assert logged(alone, "loss") != pytest.approx(logged(mine, "loss"), abs=1e-2), "the SFT term does nothing"


def test_dpo_with_sft_is_flex_dpo_with_equal_betas(make_trainer: Any) -> None:
    """Over micro-batches, too: each term keeps a denominator of its own."""
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    mixed = make_trainer(MIXTURE, load_method(MIXTURE).options(beta=0.3), arguments=split)
    options = load_method("flex_dpo").options(beta_pos=0.3, beta_neg=0.3, eta=0.2)
    single = make_trainer("flex_dpo", options, arguments=split)
    for trainer in (mixed, single):
        trainer.train()
    assert torch.allclose(flat_weights(mixed.model), flat_weights(single.model), atol=1e-5)
    assert logged(mixed, "loss/dpo") == pytest.approx(logged(single, "loss/preference"), abs=1e-5)
    assert logged(mixed, "loss/sft") == pytest.approx(logged(single, "loss/sft"), abs=1e-5)


def test_what_a_mixture_logs_is_documented(make_trainer: Any) -> None:
    name = "1.0*dpo+0.5*flex_dpo(eta=0.1)"
    trainer = make_trainer(name)
    trainer.train()
    found = {key for entry in trainer.state.log_history for key in entry}
    method = load_method(name)
    assert set(method.metrics) | set(BRIDGE_METRICS) <= found
    assert {"loss/dpo", "loss/flex_dpo/preference", "loss/flex_dpo/sft", "flex_dpo/rewards/margins"} <= found
    assert logged(trainer, "flex_dpo/rewards/margins") != logged(trainer, "rewards/margins")


def test_weights_of_one_method_scale_it(make_trainer: Any) -> None:
    """Two halves of a method are the whole of it, and a loss of twice the weight is twice the loss."""
    whole, twice = make_trainer("dpo"), make_trainer("2.0*dpo")
    half = make_trainer("0.5*dpo+0.5*flex_dpo(beta_pos=0.1,beta_neg=0.1)")
    for trainer in (whole, twice, half):
        trainer.train()
    assert logged(half, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert logged(twice, "loss")[0] == pytest.approx(2 * logged(whole, "loss")[0], rel=1e-5)


def test_the_card_tells_each_of_its_methods() -> None:
    text = render_card(replace(content(), method=load_method(MIXTURE)))
    for name in ("dpo", "sft"):
        part = load_method(name)
        assert f"### {name}" in text and part.paper.url in text and part.paper.citation.strip() in text
