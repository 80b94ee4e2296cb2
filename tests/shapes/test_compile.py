"""``torch_compile: true`` changes no number: the models are wrapped, their attention and hooks are traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from alignkit.shapes._candidates import BridgeSettings
from tests.references.test_anchor import anchored
from tests.trainers import flat_weights, logged, random_rows

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "peft_config"),
    [("packed", None), ("padded", LORA)],
    ids=["packed-full", "padded-lora"],
)
def test_a_compiled_run_is_the_run(make_trainer: Any, layout: Any, peft_config: Any) -> None:
    # A reference that moves is its own compiled model in full fine-tuning; rows of one size are compiled once.
    method = anchored(kind="ema", decay=0.5) if peft_config is None else "dpo"
    rows = Dataset.from_list(random_rows([(6, (5, 5))] * 4, seed=3))
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        # The whole of tracing, without minutes of a C++ compiler.
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = make_trainer(
            method,
            None,
            BridgeSettings(layout=layout),
            {"max_steps": 2, **backend},
            train_dataset=rows,
            peft_config=peft_config,
        )
        trainer.train()
        # The plain attention of a compiled run adds up in another order than the one that skips.
        runs.append((logged(trainer, "loss"), flat_weights(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], atol=1e-4, rtol=1e-3)
