"""A run on streamed rows goes on where it was stopped, in whichever pass over them that was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.data.load import load_rows
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.shapes._streams import position_in_stream
from tests import supervised


def streamed(path: Path) -> Any:
    rows = load_rows(str(path), family=supervised_rows(), streaming=True).shuffle(seed=3, buffer_size=4)
    return to_supervised_rows(rows, supervised.tokenizer(), max_length=None)[0]


@pytest.mark.parametrize(("accumulation", "stops"), [(1, (5, 7)), (2, (4,))])
def test_resumed_equals_uninterrupted(tmp_path: Path, accumulation: int, stops: tuple[int, ...]) -> None:
    """Ten rows in batches of two are five steps a pass, or two and a batch that waits for the next pass."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, supervised.completions(10))))
    options = {
        "max_steps": 8,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant",
    }
    whole = supervised.make(tmp_path / "whole", streamed(path), **options, save_strategy="steps", save_steps=1)
    whole.train()
    for step in stops:
        resumed = supervised.make(tmp_path / f"resumed{step}", streamed(path), **options, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), (step, name)


@pytest.mark.parametrize("run_batches", [1, 7, 12, 10**6])
def test_position_is_read_off_the_epoch(run_batches: int) -> None:
    for passes in (0, 1, 3, 10_000):
        for done in {1, run_batches // 3, run_batches - 1} - {0, run_batches}:
            assert position_in_stream(passes + done / run_batches, run_batches) == (passes, done)
