"""A gradient rule in every process layout: the same micro-batches give the same step, by ``accelerate launch``.

With ``direction: local`` a rule sees one micro-batch at a time, so layouts agree that cut a step alike; with
``direction: global`` it sees the mean over processes, so a step of four pairs may be shared in any way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_process_layouts import LAYOUTS, Layout, environment, inputs, saved_weights

__all__ = ["environment", "inputs"]

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]

STEPS = 3
LAYOUTS = LAYOUTS | {
    "1x2 accumulation 2": Layout(None, 2, 2, 1, ""),
    "zero1 2x2": Layout("cpu_zero1", 2, 1, 2, "DeepSpeedEngine", 1),
}
SHARED = ["ddp 2x2", "zero1 2x2", "zero2 2x2", "zero3 2x2"]
CASES = [("glad", "global", "1x4", name) for name in SHARED]
CASES += [("glad", "local", "1x2 accumulation 2", name) for name in ("ddp 2x2", "zero3 2x2")]
CASES += [("decay_to_init", None, "1x4", name) for name in ("zero2 2x2", "zero3 2x2")]


def accelerate_config(name: str, folder: Path, repository: Path) -> Path:
    """The shipped config; ZeRO-1 is ZeRO-2 with another stage, and partitions even tensors as small as these."""
    source = repository / "configs" / "accelerate" / f"{name.replace('zero1', 'zero2')}.yaml"
    if name != "cpu_zero1":
        return source
    target = folder / "cpu_zero1.yaml"
    target.write_text(source.read_text().replace("zero_stage: 2", "zero_stage: 1"))
    return target


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], inputs: dict[str, str], repository: Path
) -> Any:
    """Launch a rule in a layout once; returns run.json, the logged steps and the saved tensors."""
    finished: dict[tuple[str, ...], Any] = {}

    def launch(rule: str, direction: str | None, name: str) -> Any:
        key = (rule, str(direction), name)
        if key not in finished:
            output = tmp_path_factory.mktemp("run") / "out"
            launch_program(LAYOUTS[name], rule, direction, output)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            record = json.loads((output / "run.json").read_text())
            finished[key] = record, [line for line in lines if "loss" in line], saved_weights(str(output))
        return finished[key]

    def launch_program(layout: Layout, rule: str, direction: str | None, output: Path) -> None:
        config = ["--num_processes", "1"]
        if layout.config is not None:
            config = ["--config_file", str(accelerate_config(layout.config, output.parent, repository))]
        options = {
            "model": inputs["model"],
            "data": inputs["pairs"],
            "output_dir": output,
            "method": "flex_dpo",
            "eta": 0.2,
            "gradient_rule": rule,
            "max_length": 192,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            # Adam divides a gradient by its own size, so where it is almost 0 it would compare rounding, not layouts.
            "adam_epsilon": 1e-3,
            "logging_steps": 1,
            "num_samples": 0,
            "per_device_train_batch_size": layout.batch_size,
            "gradient_accumulation_steps": layout.accumulation,
            "use_cpu": "true",
        }
        options |= {"decay_coef": 10.0} if direction is None else {"rho": 0.3, "direction": direction}
        arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        program = str(repository / "trainers" / "preference.py")
        command = [sys.executable, "-m", "accelerate.commands.launch", *config, program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420, cwd=output.parent)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    return launch


@pytest.mark.parametrize(("rule", "direction", "base", "name"), CASES)
def test_layouts_agree(run: Any, rule: str, direction: str | None, base: str, name: str) -> None:
    layout = LAYOUTS[name]
    _, expected, expected_weights = run(rule, direction, base)
    record, steps, weights = run(rule, direction, name)

    ran = record["process_layout"]
    assert (ran["world_size"], ran["zero_stage"], ran["wrapper"]) == (
        layout.world_size,
        layout.zero_stage,
        layout.wrapper,
    )
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for ours, theirs in zip(steps, expected, strict=True):
        # Steps a hundred times as long as in test_process_layouts.py, so rounding shows a little earlier.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-5, rel=1e-4)
        for key in theirs.keys() & {"gradient/cosine", "gradient/sharpness_gap", "gradient/weight_norm"}:
            assert ours[key] == pytest.approx(theirs[key], abs=2e-5, rel=1e-4), key
    assert weights.keys() == expected_weights.keys()
    for key, tensor in expected_weights.items():
        torch.testing.assert_close(weights[key], tensor, atol=5e-6, rtol=1e-3, msg=key)


def test_the_rule_made_a_difference(run: Any) -> None:
    """Local and global directions differ, or the comparisons above would hold without either."""
    _, local, _ = run("glad", "local", "1x2 accumulation 2")
    _, whole, _ = run("glad", "global", "1x4")
    assert 0 < whole[0]["gradient/cosine"] < 0.999
    assert whole[0]["gradient/displacement_norm"] == pytest.approx(0.3, rel=1e-5)
    assert abs(local[0]["grad_norm"] / whole[0]["grad_norm"] - 1) > 1e-3
