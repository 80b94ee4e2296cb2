"""Lines against TRL's own trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.trainers import flat_weights, logged


def test_every_step_is_bitwise_that_of_trl(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    config = config_of("spare", str(tmp_path / "model"), tmp_path, parametrization="full")
    ours = build(config, text_rows(config, 16))
    theirs = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
        args=ours.args,
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
    )
    theirs.train()
    ours.train()
    assert len(logged(ours, "loss")) == ours.args.max_steps
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert logged(ours, "grad_norm") == logged(theirs, "grad_norm")
    assert torch.equal(flat_weights(ours.model), flat_weights(theirs.model))
