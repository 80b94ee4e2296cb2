"""An adapter that online training continues: its copy is the reference, and it alone moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.online import make
from tests.supervised import lora, model
from tests.trainers import logged


def trained_adapter() -> PeftModel:
    """An adapter that does something: its second factors are not zero."""
    wrapped = get_peft_model(model(), lora())
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return wrapped


@pytest.mark.parametrize("method", ["grpo", "grpo_guard"])
def test_a_continued_adapter_starts_at_its_reference_and_moves_away(method: str, tmp_path: Path) -> None:
    policy = trained_adapter()
    start = {name: value.clone() for name, value in policy.named_parameters()}
    trainer = make(tmp_path / "run", method=method, model=policy, beta=0.1, num_iterations=2, learning_rate=1e-2)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and max(kl[1:]) > 1e-4
    for name, value in trainer.model.named_parameters():
        if ".ref." in name:
            assert torch.equal(value, start[name.replace(".ref.", ".default.")]), name
        elif "lora_" in name:
            assert value.requires_grad and not torch.equal(value, start[name]), name
        else:
            assert torch.equal(value, start[name]), name
