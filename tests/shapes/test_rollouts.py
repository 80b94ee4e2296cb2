"""Completions that are drawn and not used up, and what an objective remembers: what becomes of them in a checkpoint."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from alignkit.errors import CheckpointError
from alignkit.losses.types import LossOutput, PolicyBatch
from tests.chaos.test_pickles import Trap
from tests.gradients.conftest import chosen
from tests.online import make, prompt_rows
from tests.trainers import flat_weights, logged

CUT: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
}
"""Two prompts a draw, whose completions make eight micro-batches: four steps."""
GUARD: dict[str, Any] = {"method": "grpo_guard", "ema": 0.5, "min_count": 1, "num_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of two passes over four prompts with a checkpoint after every step, and where these are."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder, train_dataset=prompt_rows(4), max_steps=16, peft=True, **CUT, **GUARD, **SAVING)
    trainer.train()
    return trainer, folder


def resumed(whole: tuple[Any, Path], folder: Path, step: int, **changes: Any) -> Any:
    """A trainer that has gone on from a copy of a checkpoint."""
    shutil.copytree(whole[1] / f"checkpoint-{step}", folder / f"checkpoint-{step}", dirs_exist_ok=True)
    trainer = make(folder, train_dataset=prompt_rows(4), max_steps=16, peft=True, **{**CUT, **GUARD, **changes})
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return trainer


@pytest.mark.parametrize("step", [5, 8, 11])
def test_a_run_goes_on_with_its_completions_in_any_pass(step: int, whole: tuple[Any, Path], tmp_path: Path) -> None:
    """The last two draws are of the second pass, whose prompts come in an order of their own."""
    trainer, folder = whole
    kept = torch.load(folder / f"checkpoint-{step}" / "rollouts_0.pt", weights_only=True)
    assert (kept["buffer"] is None) == (step % 4 == 0) and kept["step"] == 2 * step
    ours = resumed(whole, tmp_path, step)
    assert torch.equal(flat_weights(ours.model), flat_weights(trainer.model))
    for key in ("loss", "grad_norm", "grpo_guard/kappa"):
        assert logged(ours, key) == logged(trainer, key) and len(logged(ours, key)) == 16
    for key, value in trainer.rollouts.memory.items():
        assert torch.equal(ours.rollouts.memory[key], value)


def test_the_order_of_a_pass_is_the_one_that_trl_would_take(tmp_path: Path) -> None:
    """Passes differ, or the test above would hold with the first order in all of them."""
    trainer = make(tmp_path, train_dataset=prompt_rows(8))
    theirs = GRPOTrainer._get_train_sampler(trainer)
    expected = [list(theirs) for _ in range(3)]
    found = []
    for epoch in (0.0, 1.0, 2.5):
        trainer.state.epoch = epoch
        found.append(list(trainer._get_train_sampler()))
    assert found == expected and len({tuple(order) for order in expected}) == 3


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def of_other_content(file: Path) -> None:
    torch.save({"step": 1}, file)


def without_completions(file: Path) -> None:
    kept = torch.load(file, weights_only=True)
    torch.save({**kept, "buffer": None}, file)


@pytest.mark.parametrize("damage", [truncated, of_other_content, without_completions, Path.unlink])
def test_what_cannot_be_gone_on_with_is_refused_by_name(
    damage: Callable[[Path], None], whole: tuple[Any, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole[1] / "checkpoint-5", tmp_path / "checkpoint-5")
    file = tmp_path / "checkpoint-5" / "rollouts_0.pt"
    damage(file)
    trainer = make(tmp_path, peft=True, **CUT, **GUARD)
    with pytest.raises(CheckpointError, match=r"rollouts_0\.pt"):
        trainer.rollouts.load(file.parent)


def test_a_pickle_of_code_is_not_opened(whole: tuple[Any, Path], tmp_path: Path) -> None:
    torch.save({"step": 1, "trap": Trap(tmp_path / "sprung")}, tmp_path / "rollouts_0.pt")
    with pytest.raises(pickle.UnpicklingError):
        make(tmp_path, peft=True, **CUT).rollouts.load(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_completions_that_were_cut_otherwise_are_refused(whole: tuple[Any, Path], tmp_path: Path) -> None:
    trainer = make(tmp_path, peft=True, **{**CUT, "steps_per_generation": 2, "num_generations": 2})
    with pytest.raises(CheckpointError, match="num_generations 4, now 2; steps_per_generation 4, now 2"):
        trainer.rollouts.load(whole[1] / "checkpoint-5")


def counting(trainer: Any) -> list[int]:
    """Have the objective count its batches in its memory; returns what it finds there, call by call."""
    objective, seen = trainer.method.objective, []

    def count(batch: PolicyBatch, options: Any) -> LossOutput:
        before = batch.memory.get("batches", torch.tensor(0))
        seen.append(int(before))
        batch.memory["batches"] = before + 1
        return objective(batch, options)  # type: ignore[no-any-return]

    trainer.method = dataclasses.replace(trainer.method, objective=count)
    return seen


def test_a_batch_is_remembered_once_where_a_rule_evaluates_it_twice(tmp_path: Path) -> None:
    trainer = make(tmp_path, **CUT, max_steps=2, gradient_rule=chosen("sam", rho=0.1))
    seen = counting(trainer)
    trainer.train()
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3] and int(trainer.rollouts.memory["batches"]) == 4


def test_an_evaluation_leaves_what_is_remembered_and_drawn(whole: tuple[Any, Path], tmp_path: Path) -> None:
    evaluated = {"eval_dataset": prompt_rows(3), "eval_strategy": "steps", "eval_steps": 5}
    evaluated |= {"per_device_eval_batch_size": 4}
    trainer = make(tmp_path, train_dataset=prompt_rows(4), max_steps=16, peft=True, **CUT, **GUARD, **evaluated)
    trainer.train()
    assert logged(trainer, "loss") == logged(whole[0], "loss")
    assert torch.equal(flat_weights(trainer.model), flat_weights(whole[0].model))
