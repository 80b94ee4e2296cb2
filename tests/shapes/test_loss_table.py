"""Every entry of the table in docs/concepts/losses.md, from its config and rows of text to weights that have moved."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from alignkit.config.keys import method_keys
from alignkit.gradients._hook import chosen_rule
from alignkit.parts.method import load_method
from alignkit.parts.rule import load_rule
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of
from tests.shapes.loss_table import CELLS, METHODS, Cell
from tests.trainers import logged

WORDS = 61


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model of a width that bitsandbytes takes on a CPU."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, hidden=64)
    return str(folder)


def rows(kind: str, method: str, seed: int = 0, count: int = 8) -> Dataset:
    """Rows of random words, of one kind."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(f"w{draw.randrange(WORDS)} " for _ in range(draw.randint(2, 8)))

    def row(index: int) -> dict[str, Any]:
        if kind == "pairs":
            return {"prompt": text(), "chosen": text(), "rejected": text()}
        if kind == "lists":
            return {"prompt": text(), "completions": [text() for _ in range(3)], "scores": [2.0, 1.0, 0.0]}
        if kind == "unpaired":
            return {"prompt": text(), "completion": text(), "label": index % 2 == 0}
        if kind == "steps":
            return {
                "prompt": text(),
                "completions": [text() for _ in range(3)],
                "labels": [True, index % 2 == 0, False],
            }
        return {"prompt": text(), "completion": text()}

    return Dataset.from_list([row(index) for index in range(count)])


def taught_by(method: str, model: str) -> dict[str, str]:
    """The teacher of a method that has one: the model that it starts from."""
    return {"teacher": model} if "teacher" in method_keys(method) else {}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_loss_trains(cell: Cell, model: str, tmp_path: Path) -> None:
    if "QLoRA" in cell.how:
        pytest.importorskip("bitsandbytes")
    program = load_method(cell.method).program
    config = config_of(
        program, model, tmp_path, **cell.keys, **taught_by(cell.method, model), max_steps=2, learning_rate=1e-2
    )
    rule = None
    if config.gradient_rule is not None:
        rule = chosen_rule(config.gradient_rule, load_rule(config.gradient_rule).options())
    trainer = build(config, rows(cell.rows, cell.method), rule=rule)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert moved and set(moved) <= set(trained)
    if cell.layout is not None:
        assert trainer.layout.layout == cell.layout, "the layout asked for is the one that ran"


def test_every_loss_is_in_the_table() -> None:
    tried = {(cell.method, cell.how) for cell in CELLS}
    assert tried == {(name, how) for name in METHODS for how in ("full", "LoRA", "QLoRA with glad")}
