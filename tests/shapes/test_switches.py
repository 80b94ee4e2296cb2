"""Switches of training, each by what it changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import SchedulerType

from alignkit.config.schedules import SETTINGS
from tests import supervised
from tests.trainers import flat_weights

STEPS, RATE = 12, 1e-3


def wave(progress: float, cycles: float = 0.5) -> float:
    return 0.5 * (1 + math.cos(2 * math.pi * cycles * progress))


SCHEDULES: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({}, lambda t: 1 - t),
    "cosine": ({"num_cycles": 1.5}, lambda t: wave(t, 1.5)),
    "cosine_with_restarts": ({"num_cycles": 3}, lambda t: wave(3 * t % 1)),
    "cosine_with_min_lr": ({"min_lr": 1e-4}, lambda t: 0.1 + 0.9 * wave(t)),
    "cosine_warmup_with_min_lr": ({"min_lr_rate": 0.2}, lambda t: 0.2 + 0.8 * wave(t + 1 / STEPS)),
    "constant": ({}, lambda t: 1.0),
    "constant_with_warmup": ({}, lambda t: 1.0),
    "polynomial": ({"power": 2, "lr_end": 1e-5}, lambda t: 0.01 + 0.99 * (1 - t) ** 2),
    "inverse_sqrt": ({"timescale": 4}, lambda t: 1 / math.sqrt((STEPS * t + 4) / 4)),
    "warmup_stable_decay": (
        {"num_decay_steps": 4, "min_lr_ratio": 0.5, "decay_type": "linear"},
        lambda t: 1.0 - max(0.0, STEPS * t - 8) / 4 * 0.5,
    ),
}


@pytest.fixture
def rows() -> Any:
    return supervised.token_rows(supervised.completions(8))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return supervised.make(tmp_path_factory.mktemp("run"), supervised.token_rows(supervised.completions(4)))


@pytest.mark.parametrize("schedule", SETTINGS)
def test_the_rate_follows_the_schedule(schedule: str, trainer: Any) -> None:
    given, factor = SCHEDULES[schedule]
    trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs = SchedulerType(schedule), given or None
    trainer.lr_scheduler = None
    scheduler = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    follows = trainer.create_scheduler(STEPS, scheduler)
    rates = []
    for _ in range(STEPS):
        rates.append(follows.get_last_lr()[0])
        scheduler.step()
        follows.step()
    assert rates == pytest.approx([RATE * factor(step / STEPS) for step in range(STEPS)], rel=1e-9)


def test_shares_of_all_steps(tmp_path: Path, rows: Any) -> None:
    """Of twelve steps: a line every three, an evaluation every four, a checkpoint every six."""
    intervals = {"logging_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.33, "save_steps": 0.5}
    trainer = supervised.make(
        tmp_path, rows, eval_dataset=rows.select(range(2)), max_steps=STEPS, save_strategy="steps", **intervals
    )
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [3, 6, 9, 12]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [4, 8, 12]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]


def test_rows_of_similar_length_are_together_and_a_resumed_run_keeps_the_order(tmp_path: Path) -> None:
    """Three passes over eleven rows, resumed in the second, in the order that transformers would make of the seed."""
    rows = supervised.token_rows(supervised.completions(11))
    lengths = [len(row["input_ids"]) for row in rows]
    how = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "data_seed": 5}
    how |= {"max_steps": 14, "save_strategy": "steps", "save_steps": 8}
    seen: list[list[int]] = []
    whole = supervised.make(tmp_path, rows, **how)
    collate = whole.data_collator

    def watched(batch: list[Any]) -> Any:
        seen.append([len(row["input_ids"]) for row in batch])
        return collate(batch)

    whole.data_collator = watched
    whole.train()
    for epoch in range(2):
        order = get_length_grouped_indices(lengths, 2, generator=torch.Generator().manual_seed(5 + epoch))
        given = [length for batch in seen[6 * epoch : 6 * epoch + 6] for length in batch]
        assert given == [lengths[i] for i in order]
    resumed = supervised.make(tmp_path, rows, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert torch.equal(flat_weights(whole.model), flat_weights(resumed.model))


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_weights_of_a_checkpoint_are_taken_back(peft: bool, tmp_path: Path, rows: Any) -> None:
    trainer = supervised.make(tmp_path, rows, peft, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    found = {}
    for step in (2, 4, 2):
        trainer.load_weights(tmp_path / f"checkpoint-{step}")
        found[step] = flat_weights(trainer.model)
        name = "adapter_model" if peft else "model"
        saved = load_file(tmp_path / f"checkpoint-{step}" / f"{name}.safetensors")
        have = {key.replace(".default", ""): value for key, value in trainer.model.state_dict().items()}
        assert all(torch.equal(have[key], value) for key, value in saved.items())
    assert not torch.equal(found[2], found[4])


def test_every_tracker_is_told_the_name_of_the_run(tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, tuple[str, list[float]]] = {}

    class Tracker(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
            if "loss" in logs:
                told.setdefault(type(self).__name__, (args.run_name, []))[1].append(logs["loss"])

    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, type(name, (Tracker,), {}))
    supervised.make(tmp_path, rows, max_steps=2, report_to=["wandb", "mlflow"], run_name="second try").train()
    assert set(told) == {"wandb", "mlflow"} and told["wandb"] == told["mlflow"]
    name, losses = told["wandb"]
    assert name == "second try" and len(losses) == 2
