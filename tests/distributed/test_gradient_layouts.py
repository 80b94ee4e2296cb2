"""A gradient rule in every process layout: the same micro-batches give the same step, by ``accelerate launch``.

With ``direction: local`` a rule sees one micro-batch at a time, so layouts agree that cut a step alike; with
``direction: global`` it sees the mean over processes, so a step of four pairs may be shared in any way.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Launch
from tests.distributed.layouts import LAYOUTS, logged_steps, record_of, saved_weights

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]

STEPS = 3
SHARED = ["ddp 2x2", "zero1 2x2", "zero2 2x2", "zero3 2x2"]
CASES = [("glad", "global", "1x4", name) for name in SHARED]
CASES += [("glad", "local", "1x2 accumulation 2", name) for name in ("ddp 2x2", "zero3 2x2")]
CASES += [("decay_to_init", None, "1x4", name) for name in ("zero2 2x2", "zero3 2x2")]


@pytest.fixture(scope="session")
def run(launch: Launch, inputs: dict[str, str]) -> Any:
    """Train with a rule in a layout once; returns run.json, the logged steps and the saved tensors."""

    @functools.cache
    def train(rule: str, direction: str | None, name: str) -> Any:
        options = {
            "model": inputs["model"],
            "data": inputs["pairs"],
            "method": "flex_dpo",
            "eta": 0.2,
            "gradient_rule": rule,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            **({"decay_coef": 10.0} if direction is None else {"rho": 0.3, "direction": direction}),
        }
        output = launch(LAYOUTS[name], options)
        return record_of(output), logged_steps(output), saved_weights(output)

    return train


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
