"""``tokens_per_batch: auto`` where memory is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from alignkit.memory.shape import ModelShape
from alignkit.models._layouts import LayoutChoice
from alignkit.models.choices import Choice
from alignkit.runs import token_budget
from alignkit.runs.memory import GIB, Launch, Plan
from alignkit.runs.token_budget import MARGIN, MOST_TIMES, filled, largest_budget
from tests.runs.test_checkpointing import BILLIONS
from tests.shapes.building import config_of
from tests.trainers import random_rows


@pytest.fixture
def plan(tmp_path: Path, model_path: str) -> Plan:
    """An 8B model with LoRA on pairs of 384 and 128 tokens, packed."""
    config = config_of("preference", model_path, tmp_path, per_device_train_batch_size=2, tokens_per_batch="auto")
    rows = Dataset.from_list(random_rows([(384, (128, 128))] * 64))
    tiny = Plan.of(replace(config, dtype="bfloat16", reference="precomputed"), Launch(), rows, packed=True)
    return replace(tiny, shape=ModelShape.of(BILLIONS))


def test_what_is_taken_fits_and_twice_as_much_would_not(plan: Plan) -> None:
    least = 2 * (383 + 256)
    needed = lambda tokens: plan.estimate(checkpointing=False, tokens_per_batch=tokens).peak  # noqa: E731
    small, large = (largest_budget(plan, gib * GIB, least, checkpointing=False)[0] for gib in (60, 120))
    assert least < small < large < MOST_TIMES * least
    assert needed(large) * MARGIN <= 120 * GIB < needed(2 * large) * MARGIN
    # What would not fit either is taken all the same, as rows are.
    assert largest_budget(plan, GIB, least, checkpointing=False)[0] == least
    assert largest_budget(plan, 10**6 * GIB, least, checkpointing=False)[0] == MOST_TIMES * least
    assert largest_budget(plan, 120 * GIB, least, checkpointing=True)[0] > large


def test_only_an_open_budget_is_filled(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(plan: Plan | None, free: int | None = 120 * GIB) -> list[tuple[str, Choice]]:
        found: list[tuple[str, Choice]] = []
        monkeypatch.setattr(token_budget, "least_free", lambda device: free)
        trainer = SimpleNamespace(
            tokens_per_batch=1278,
            fill_by_tokens=lambda *how: found.append(how),
            choices={},
            layout=LayoutChoice("packed", "as it can be"),
            args=SimpleNamespace(gradient_checkpointing=False),
            accelerator=SimpleNamespace(device=None),
        )
        filled(trainer, plan)
        return found

    ((asked, choice),) = taken(plan)
    assert asked == "auto" and choice.value == largest_budget(plan, 120 * GIB, 1278, checkpointing=False)[0] > 1278
    assert "of 120.0 GiB" in choice.reason
    assert taken(plan, None) == taken(None) == []
    assert taken(replace(plan, config=replace(plan.config, tokens_per_batch=700))) == []
