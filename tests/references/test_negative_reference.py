"""Two references: the last candidate of each row is scored by a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignkit.models._forward import add_completion_head, completion_logps, use_packed_attention
from alignkit.shapes._candidates import BridgeSettings
from tests.shapes.test_preference_trainer import LISTWISE
from tests.trainers import logged, random_rows

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
SHAPES = [(5, (3, 4, 2, 5)), (2, (6, 1)), (9, (2, 2, 2)), (4, (1, 7, 3, 3))]


@pytest.fixture
def helpful(model_path: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_negative_has_its_own_reference(
    make_trainer: Any, model_path: str, helpful: PreTrainedModel, layout: str, peft_config: Any
) -> None:
    lists = Dataset.from_list(random_rows(SHAPES, seed=5))
    settings = BridgeSettings(layout=layout, negative_reference=helpful)
    trainer = make_trainer(LISTWISE, None, settings, train_dataset=lists, peft_config=peft_config)
    inputs = trainer.data_collator(list(lists))
    found = trainer.reference.token_logps(inputs)
    start = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    add_completion_head(start)
    if layout == "packed":
        use_packed_attention(start)
    plain, other = completion_logps(start, inputs), completion_logps(helpful, inputs)
    for b, (_, lengths) in enumerate(SHAPES):
        last = len(lengths) - 1
        torch.testing.assert_close(found[b, :last], plain[b, :last], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[b, last], other[b, last], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(plain[b, last], other[b, last], atol=1e-2)


def test_precomputed_and_live_references_train_alike(
    make_trainer: Any, helpful: PreTrainedModel, tmp_path: Path
) -> None:
    lists = Dataset.from_list(random_rows(SHAPES, seed=5))
    runs = []
    for precompute in (False, True):
        settings = BridgeSettings(reference_cache=tmp_path / "cache", negative_reference=helpful)
        arguments = {"precompute_ref_log_probs": precompute, "max_steps": 3}
        trainer = make_trainer(LISTWISE, None, settings, arguments, train_dataset=lists, peft_config=LORA)
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    make_trainer(
        LISTWISE,
        None,
        BridgeSettings(reference_cache=tmp_path / "cache"),
        arguments,
        train_dataset=lists,
        peft_config=LORA,
    )
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2, "one reference more is another cache entry"
