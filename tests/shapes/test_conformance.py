"""What every batch shape must do, whichever it is: a shape joins by its file in ``alignkit/shapes``.

That a shape follows TRL's trainer to the last bit depends on the trainer, and is a test of the shape's own.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.parts.method import load_method
from alignkit.parts.shape import load_bridge, load_shape, shape_names
from alignkit.shapes._bridge import ObjectiveBridge
from tests.programs.conftest import save_model
from tests.shapes.building import MODEL_SHAPES, build, config_of, layouts, text_rows
from tests.trainers import flat_weights, logged

SHAPES = shape_names()
STEPS, ROWS_OF_A_STEP = 3, 4
PARITY = {"candidates": "tests/shapes/test_parity.py", "tokens": "tests/shapes/test_supervised_parity.py"}
"""Where a shape is compared with TRL's trainer, unless that is ``tests/shapes/test_<name>.py``."""
TRAINER_KEYS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}

for_every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By shape, the folder of a tiny model whose tokenizer knows words."""
    plain = tmp_path_factory.mktemp("model")
    save_model(plain)
    folders = dict.fromkeys(SHAPES, str(plain))
    for shape, kind in MODEL_SHAPES.items():
        folders[shape] = str(tmp_path_factory.mktemp(shape))
        save_model(Path(folders[shape]), **kind)
    return folders


@pytest.fixture
def model(shape: str, models: dict[str, str]) -> str:
    """Folder of the tiny model of a shape."""
    return models[shape]


def trainer_of(shape: str, model: str, folder: Path, held_out: int = 0, **keys: Any) -> Any:
    """A trainer on sixteen rows; of full fine-tuning, unless the keys say otherwise."""
    folder.mkdir(exist_ok=True)
    config = config_of(load_shape(shape).program, model, folder, **{"parametrization": "full", **keys})
    evaluation = text_rows(config, held_out, seed=1) if held_out else None
    return build(config, text_rows(config, 16), evaluation)


@pytest.fixture(scope="module")
def finished(
    models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[list[float], ...]]:
    """Losses, gradient norms and final weights of a run of a shape in a layout, with a size of its micro-batches."""

    @cache
    def run(shape: str, layout: str | None, size: int) -> Any:
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS_OF_A_STEP // size}
        keys |= {} if layout is None else {"layout": layout}
        trainer = trainer_of(shape, models[shape], tmp_path_factory.mktemp("run"), **keys)
        trainer.train()
        return logged(trainer, "loss"), logged(trainer, "grad_norm"), flat_weights(trainer.model)

    return run


@pytest.mark.parametrize(("shape", "layout"), [(name, layout) for name in SHAPES for layout in layouts(name)])
def test_neither_layout_nor_splitting_a_step_into_micro_batches_changes_a_number(
    shape: str, layout: str | None, finished: Any
) -> None:
    loss, norm, weights = finished(shape, layouts(shape)[0], ROWS_OF_A_STEP)
    for size in (ROWS_OF_A_STEP, 1):
        ours = finished(shape, layout, size)
        assert ours[0] == pytest.approx(loss, rel=1e-5) and len(loss) == STEPS
        assert ours[1] == pytest.approx(norm, rel=1e-4) and min(norm) > 0.01
        torch.testing.assert_close(ours[2], weights, rtol=1e-3, atol=1e-5)


@for_every_shape
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(shape: str, model: str, tmp_path: Path) -> None:
    keys = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(shape, model, tmp_path, **keys)
    whole.train()
    resumed = trainer_of(shape, model, tmp_path, **keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    for key in ("loss", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key) and len(logged(whole, key)) == 4


@for_every_shape
def test_evaluation_does_not_depend_on_the_batch_size(shape: str, model: str, tmp_path: Path) -> None:
    # Of what is drawn, the likeliest: anything else depends on what is drawn beside it.
    keys = {"top_k": 1, "num_generations_eval": 1} if shape == "policy" else {}
    trainer = trainer_of(shape, model, tmp_path, held_out=7, **keys)
    found = []
    for size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        found.append({key: value for key, value in metrics.items() if not key.endswith(("_runtime", "_per_second"))})
    assert "eval_loss" in found[0]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)


@for_every_shape
def test_rows_are_learned_and_exactly_the_documented_metrics_are_logged(shape: str, model: str, tmp_path: Path) -> None:
    trainer = trainer_of(shape, model, tmp_path, max_steps=24, learning_rate=1.0e-2)
    assert isinstance(trainer, ObjectiveBridge)
    assert [base for base in type(trainer).__mro__ if base.__module__.startswith("trl.trainer.")]
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    if shape == "policy":
        # The loss of completions is relative to one another and need not fall.
        rewards = logged(trainer, "reward")
        assert sum(rewards[-4:]) > 1.5 * sum(rewards[:4])
    else:
        losses = logged(trainer, "loss")
        assert sum(losses[-4:]) < 0.7 * sum(losses[:4])

    _, output = trainer.evaluate_objective(trainer.model, trainer._prepare_inputs(batch))
    documented = {*load_bridge(load_shape(shape)).METRICS, *load_method(trainer.method.name).metrics}
    documented |= set(trainer.router_watch.metrics if trainer.router_watch else ())
    terms = {f"loss/{term.name}" for term in output.terms}
    if shape == "policy":
        terms |= {f"rewards/{name}/{what}" for name in trainer.reward_func_names for what in ("mean", "std")}
    assert set(trainer.state.log_history[0]) - TRAINER_KEYS == documented | terms
    assert {term.item for term in output.terms} <= set(trainer.item_kinds)


@for_every_shape
def test_it_is_compared_with_the_trainer_of_trl_that_it_lies_over(shape: str, repository: Path) -> None:
    source = (repository / PARITY.get(shape, f"tests/shapes/test_{shape}.py")).read_text()
    tests = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert [name for name in tests if name.startswith("test_") and name.endswith("trl")]
