"""Process layouts, and what a run in one of them leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Layout:
    """How one step of four pairs is laid out, and what run.json must say of it."""

    config: str | None
    batch_size: int
    accumulation: int
    world_size: int
    wrapper: str
    zero_stage: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = {
    "1x4": Layout(None, 4, 1, 1, ""),
    "1x2 accumulation 2": Layout(None, 2, 2, 1, ""),
    "1x1 accumulation 4": Layout(None, 1, 4, 1, ""),
    "ddp 2x2": Layout("cpu_ddp", 2, 1, 2, "DistributedDataParallel"),
    # The variable is what accelerate makes of zero_stage in its config file. Partitions tensors as small as these, too.
    "zero1 2x2": Layout("cpu_zero2", 2, 1, 2, "DeepSpeedEngine", 1, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
    "zero2 2x2": Layout("cpu_zero2", 2, 1, 2, "DeepSpeedEngine", 2),
    "zero3 2x2": Layout("cpu_zero3", 2, 1, 2, "DeepSpeedEngine", 3),
}
SHARDED = ["zero2 2x2", "zero3 2x2"]
OPTIONS = {
    "max_length": 192,
    # Adam divides a gradient by its own size, so where it is almost 0 it would compare rounding, not layouts.
    "adam_epsilon": 1e-2,
    "logging_steps": 1,
    "num_samples": 0,
    "use_cpu": "true",
}
"""What all runs here have in common."""


def record_of(run: Path) -> dict[str, Any]:
    """Content of run.json."""
    return json.loads((run / "run.json").read_text())


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics that hold a training step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def saved_weights(directory: str | Path) -> dict[str, torch.Tensor]:
    """The tensors a run saved."""
    (file,) = Path(directory).glob("*model.safetensors")
    return load_file(file)
