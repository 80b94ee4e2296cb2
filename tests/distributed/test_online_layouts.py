"""An online step is one step in every process layout, completions drawn from gathered weights included.

Through ``accelerate launch`` and the shipped configs; every run first shows which layout ran. Two prompts a step with
two completions each, trained on twice, so that importance ratios are not 1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import online_program
from tests.distributed.conftest import Launch
from tests.distributed.layouts import LAYOUTS, SHARDED, logged_steps, record_of, saved_weights
from tests.shapes.building import REWARD

pytestmark = pytest.mark.xdist_group("distributed")

STEPS = 3
COMMON: dict[str, Any] = {
    "max_length": None, "rewards": f"['{REWARD}']", "num_generations": 2, "num_iterations": 2, "top_k": 1,
    "max_completion_length": online_program.LONGEST, "max_steps": STEPS, "learning_rate": 1e-3,
}  # fmt: skip
PROMPT = 128
"""Longest prompt of the runs whose passes are held to the tokens of one row."""
GUARD = {"method": "grpo_guard", "num_steps": 2, "min_count": 1, "ema": 0.5, "epsilon": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    # The reference is the policy with its adapter off.
    "grpo lora": {"method": "grpo", "beta": 0.1, "parametrization": "lora"},
    "grpo full": {"method": "grpo", "beta": 0.1, "parametrization": "full", "learning_rate": 1e-4},
    "grpo_guard lora": {**GUARD, "parametrization": "lora"},
    "grpo rows": {
        "method": "grpo", "parametrization": "full", "learning_rate": 1e-4, "dynamic_sampling": 1,
        "max_prompt_length": PROMPT, "max_tokens_per_micro_batch": PROMPT + online_program.LONGEST,
        "rewards": f"['{Path(online_program.__file__)}:half_without_spread']",
    },
}  # fmt: skip
# The guard's statistics are those of one micro-batch over all processes.
BASES = {"grpo lora": "1x2 accumulation 2", "grpo full": "1x2 accumulation 2", "grpo_guard lora": "1x4"}
BASES["grpo rows"] = "1x2 accumulation 2"
SLOW = [
    ("grpo rows", "ddp 2x2"),
    ("grpo lora", "ddp 2x2"),
    ("grpo full", "zero2 2x2"),
    ("grpo full", "zero3 2x2"),
    ("grpo_guard lora", "ddp 2x2"),
]
CASES = [
    *(("grpo lora", name) for name in SHARDED),
    ("grpo_guard lora", "zero2 2x2"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
]
COMPARED = ("kl", "entropy", "ratio/mean", "reward", "completions/mean_length", "dead_rows")
COMPARED += ("dynamic_sampling/redrawn", "dynamic_sampling/still_dead", "dynamic_sampling/first_reward")


@pytest.fixture(scope="session")
def run(launch: Launch, inputs: dict[str, str]) -> Callable[[str, str], Path]:
    """Train in a layout once; returns the run directory."""

    @functools.cache
    def train(name: str, layout: str) -> Path:
        options = {"model": inputs["model"], "data": inputs["prompts"], **COMMON, **RUNS[name]}
        return launch(LAYOUTS[layout], options, Path(online_program.__file__))

    return train


def processes(run: Path) -> list[dict[str, Any]]:
    """What every process wrote down."""
    return [json.loads(file.read_text()) for file in sorted(run.parent.glob("process_*.json"))]


@pytest.mark.parametrize(("what", "name"), CASES)
def test_layouts_agree(run: Callable[[str, str], Path], what: str, name: str) -> None:
    layout = LAYOUTS[name]
    ours, theirs = run(what, name), run(what, BASES[what])
    ran = record_of(ours)["process_layout"]
    assert (ran["world_size"], ran["zero_stage"], ran["wrapper"]) == (2, layout.zero_stage, layout.wrapper)
    whole = record_of(theirs)["process_layout"]["local_parameters"]
    assert ran["local_parameters"] < 0.6 * whole if layout.zero_stage == 3 else ran["local_parameters"] == whole

    (alone,), (first, second) = processes(theirs), processes(ours)
    # What each process draws from weights that are shared out is what one draws from its own.
    if what == "grpo rows":  # where prompts are drawn again, a process draws as many as the other
        together, each = (sorted(set(map(str, drawn))) for drawn in (first["drawn"] + second["drawn"], alone["drawn"]))
        assert together == each and len(alone["drawn"]) > 8
        assert len(first["drawn"]) == len(second["drawn"])
    else:
        assert sorted(first["drawn"] + second["drawn"]) == sorted(alone["drawn"]) and len(alone["drawn"]) == 8
    assert min(len(completion) for *_, completion in alone["drawn"]) > 1
    assert first["drawn"] != second["drawn"]
    for ours_then, theirs_then in zip(first["logged"], second["logged"], strict=True):
        assert {k: v for k, v in ours_then.items() if k != "step_time"} == pytest.approx(
            {k: v for k, v in theirs_then.items() if k != "step_time"}
        )
    assert first["memory"] == second["memory"] and bool(first["memory"]) == ("guard" in what)
    for key, value in alone["memory"].items():
        torch.testing.assert_close(torch.tensor(first["memory"][key]), torch.tensor(value), rtol=1e-4, atol=1e-6)

    steps, base = logged_steps(ours), logged_steps(theirs)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step, expected in zip(steps, base, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], abs=2e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-5, rel=1e-5)
        for key in {*COMPARED, "grpo_guard/raw_clip_low"} & set(expected):
            assert step[key] == pytest.approx(expected[key], abs=2e-5, rel=1e-5), key
        # One spread of log-ratios over another: these are hundredths of a nat, good to about 1e-6 nats in float32.
        if "guard" in what:
            assert step["grpo_guard/kappa"] == pytest.approx(expected["grpo_guard/kappa"], rel=1e-4)
    assert base[0]["grad_norm"] > 0.1 and base[0]["reward_std"] > 0
    ours_saved, theirs_saved = saved_weights(ours), saved_weights(theirs)
    assert set(ours_saved) - {"lm_head.weight"} == set(theirs_saved)
    for key, tensor in theirs_saved.items():
        torch.testing.assert_close(ours_saved[key], tensor, atol=2e-6, rtol=1e-4, msg=key)


def test_ratios_have_moved(run: Callable[[str, str], Path]) -> None:
    """Otherwise nothing above would depend on the old policy, or on what the guard makes of ratios."""
    second = logged_steps(run("grpo_guard lora", "1x4"))[1]
    assert second["grpo_guard/raw_clip_low"] + second["grpo_guard/raw_clip_high"] > 0
