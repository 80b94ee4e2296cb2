"""An evaluation of prompts that do not divide by the processes, and a step of training; a program of its own.

``python -m tests.distributed.held_out_prompts FOLDER`` writes what was found to FOLDER/found.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from accelerate import PartialState

from alignkit.reports.rollouts import rollout_files
from alignkit.shapes._rollout_files import RolloutFiles
from tests.online import make, prompt_rows

COMPLETIONS = 8
"""Drawn at a time over all processes, four of each prompt."""


def run(folder: Path) -> dict[str, Any]:
    """What an evaluation of three prompts gives, and the completions of one step with the first log."""
    size = COMPLETIONS // PartialState().num_processes
    # Of what is drawn, the likeliest: anything else depends on the process.
    sizes = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, "num_generations_eval": 4}
    trainer = make(folder / "run", eval_dataset=prompt_rows(3), top_k=1, max_steps=1, success_threshold=0.1, **sizes)
    trainer.watch.consumers.append(RolloutFiles(trainer, 1))
    found = trainer.evaluate()
    trainer.train()
    PartialState().wait_for_everyone()
    (file,) = rollout_files(folder / "run").values()
    rows = pyarrow.parquet.read_table(file).to_pylist()
    return {"evaluation": found, "rows": rows, "log": trainer.state.log_history[1]}


if __name__ == "__main__":
    PartialState(cpu=True)
    target = Path(sys.argv[1])
    outcome = run(target)
    if PartialState().is_main_process:
        torch.save(outcome, target / "found.pt")
    PartialState().destroy_process_group()
