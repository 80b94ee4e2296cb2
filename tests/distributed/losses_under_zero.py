"""Every loss of the table trains for two steps in this launch; a program of its own.

``python -m tests.distributed.losses_under_zero FOLDER`` writes what was found to FOLDER/found.json.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState

from alignkit.parts.method import load_method
from tests.shapes.building import build, config_of
from tests.shapes.loss_table import UNDER_ZERO_2, cells_of
from tests.shapes.test_loss_table import rows, taught_by

ROWS = 8


def run(folder: Path, model: str) -> dict[str, Any]:
    """Losses and gradient norms by method, over steps of four rows however many processes share them."""
    found = {}
    for name in UNDER_ZERO_2:
        # Each trainer makes its own accelerator, of a launch in which nothing has been made yet.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        method = load_method(name)
        cell = next(cell for cell in cells_of(method) if cell.how == "LoRA")
        size = 4 // PartialState().num_processes
        own = folder / f"{name}{PartialState().process_index}"
        own.mkdir()
        keys = {**cell.keys, **taught_by(name, model), "per_device_train_batch_size": size, "max_grad_norm": 0.0}
        config = config_of(method.program, model, own, **keys, max_steps=2, lora_r=4, adam_epsilon=1e-2)
        trainer = build(config, rows(cell.rows, name, count=ROWS))
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        found[name] = {
            "engine": type(trainer.model_wrapped).__name__,
            "loss": [entry["loss"] for entry in logs],
            "grad_norm": [float(entry["grad_norm"]) for entry in logs],
        }
        assert all(math.isfinite(value) for value in found[name]["loss"])
    return found


if __name__ == "__main__":
    PartialState(cpu=True)
    outcome = run(Path(sys.argv[1]), sys.argv[2])
    if PartialState().is_main_process:
        Path(sys.argv[1], "found.json").write_text(json.dumps(outcome))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
