"""Runs of every program whose routers train log what these do, at no other cost than looking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.parts.shape import load_shape, shape_names
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, layouts, text_rows
from tests.trainers import flat_weights, logged


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixture")
    save_model(folder, num_experts=4)
    return str(folder)


def trainer_of(shape: str, model: str, folder: Path, **keys: Any) -> Any:
    config = config_of(load_shape(shape).program, model, folder, parametrization="routers", **keys)
    return build(config, text_rows(config, 16))


WITH_ROUTERS = [name for name in shape_names() if name != "reward"]  # which is refused: its head trains in full


@pytest.mark.parametrize(("shape", "layout"), [(name, layout) for name in WITH_ROUTERS for layout in layouts(name)])
def test_every_program_logs_what_its_routers_do(shape: str, layout: str | None, mixture: str, tmp_path: Path) -> None:
    keys = {} if layout is None else {"layout": layout, "router_aux_loss_coef": 0.0}
    trainer = trainer_of(shape, mixture, tmp_path, max_steps=3, learning_rate=0.3, **keys)
    trainer.train()
    watch = trainer.router_watch
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {name for name in first if name.startswith("routing/")} >= set(watch.metrics)
    assert first["routing/churn"] == 0, "the first step is taken from the routers as they were"
    if shape != "policy" or first["reward_std"] > 0:
        assert last["routing/churn"] > 0
    kept = json.loads((tmp_path / "run" / "router_loads.json").read_text())
    assert (kept["first"]["step"], kept["last"]["step"]) == (1, 3)
    for when, log in (("first", first), ("last", last)):
        shares = list(kept[when]["loads"].values())
        assert max(map(max, shares)) == pytest.approx(log["routing/busiest_expert"])
        assert list(map(len, shares)) == [4, 4] and list(map(sum, shares)) == pytest.approx([2, 2])
    assert 0 < first["routing/entropy"] < torch.tensor(4.0).log() and 1 <= first["routing/imbalance"] <= 2


def test_one_micro_batch_of_a_logged_step_is_looked_at_and_training_is_the_same(mixture: str, tmp_path: Path) -> None:
    keys = {"max_steps": 4, "learning_rate": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    runs = {}
    for every in (1, 2):
        trainer = trainer_of("tokens", mixture, tmp_path, logging_steps=every, **keys)
        trainer.train()
        runs[every] = logged(trainer, "routing/entropy"), logged(trainer, "routing/churn")
    assert runs[2] == tuple(values[1::2] for values in runs[1]), "of steps 2 and 4"
    weights = flat_weights(trainer.model)
    plain = trainer_of("tokens", mixture, tmp_path, logging_steps=2, **keys)
    plain.router_watch = None
    plain.train()
    assert torch.equal(flat_weights(plain.model), weights) and not logged(plain, "routing/churn")
