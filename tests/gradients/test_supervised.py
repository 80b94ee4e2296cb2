"""Gradient rules under the supervised objective: the same hook, packed rows and token counts included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import supervised
from tests.gradients.conftest import chosen
from tests.gradients.steps import expected_gradients, micro_batches, step_gradients
from tests.trainers import flat_weights

RHO = 0.3


def trainer_with(tmp_path: Path, rule: Any, **changes: Any) -> Any:
    rows = supervised.token_rows(supervised.completions(), max_length=64)
    trainer = supervised.make(tmp_path / "run", rows, **changes)
    trainer.gradient_rule = rule
    return trainer


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_strength_zero_is_bitwise_no_rule(tmp_path: Path, peft: bool, packing: bool) -> None:
    runs = []
    for rule in (None, chosen("glad", rho=0.0)):
        changes = {"gradient_accumulation_steps": 2, "max_steps": 3, "packing": packing, "max_length": 64}
        trainer = trainer_with(tmp_path, rule, peft=peft, **changes)
        trainer.train()
        runs.append((flat_weights(trainer.model), trainer.state.log_history[:3]))
    (expected, history), (weights, ours) = runs
    assert torch.equal(weights, expected)
    for entry, theirs in zip(ours, history, strict=True):
        assert "num_tokens" in theirs
        assert {key: entry[key] for key in theirs} == theirs


@pytest.mark.parametrize("name", ["glad", "sam", "perpgrad"])
@pytest.mark.parametrize("peft", [False, True])
def test_gradient_equals_the_one_computed_by_writing_weights(tmp_path: Path, name: str, peft: bool) -> None:
    rule = chosen(name, **({} if name == "perpgrad" else {"rho": RHO}))
    trainer = trainer_with(tmp_path, rule, peft=peft)
    batches, counts = micro_batches(trainer, 2)
    ours = step_gradients(trainer, batches, counts)
    parts = [expected_gradients(trainer, rule, batch, counts) for batch in batches]
    for x, y in zip(ours, [a + b for a, b in zip(*parts, strict=True)], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=5e-6)


def test_a_share_is_counted_in_tokens(tmp_path: Path) -> None:
    """Micro-batches of as many rows and other numbers of tokens: what each adds to the mean loss goes by the tokens."""
    trainer = trainer_with(tmp_path, None, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    batches, counts = micro_batches(trainer, 2)
    parts = [trainer.batch_loss(trainer.model, batch, counts, record=False).item() for batch in batches]
    alone = [trainer.batch_loss(trainer.model, batch, None, record=False).item() for batch in batches]
    shares = [trainer.batch_share(batch, counts) for batch in batches]
    assert [part / whole for part, whole in zip(parts, alone, strict=True)] == pytest.approx(shares, rel=1e-5)
    assert sum(shares) == pytest.approx(1.0, rel=1e-12) and shares[0] != shares[1]
