"""What belongs in a checkpoint is saved and loaded by the bridge, in whatever order its callbacks stand."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import alignkit
from alignkit.objectives.d2o import METHOD
from alignkit.parts.method import AnchorSchedule
from alignkit.runs.preemption import StopRequest, StopWhenAsked
from alignkit.shapes._candidates import LateRowsTrainer
from alignkit.storage.durability import is_complete
from alignkit.storage.manifest import Manifest
from tests.gradients.conftest import chosen
from tests.sampling.test_sample_refresh import make
from tests.trainers import flat_weights, logged

SAVED = {"anchor.safetensors", "anchor.json", "starting_weights_0.pt", "training_rows.parquet"}
ANCHORED = dataclasses.replace(METHOD, anchor=lambda options: AnchorSchedule(kind="ema", decay=0.5))


class Shuffled(LateRowsTrainer):
    """With anchor and decay; its callbacks, those of transformers included, are called in an order of their own."""

    order: int | None = None

    def __init__(self, *inherited: Any, **options: Any) -> None:
        decay = chosen("decay_to_init", decay_coef=10.0)
        super().__init__(*inherited, **{**options, "method": ANCHORED, "gradient_rule": decay})

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.order is not None:
            random.Random(self.order).shuffle(self.callback_handler.callbacks)
        return super().get_train_dataloader()


def trainer_of_everything(path: Path, order: int | None) -> Any:
    """An anchor that moves, weights that are pulled to their start, and rows that change after steps 2 and 4."""
    trainer = make(path, kind=Shuffled, lora=True, max_steps=6, save_strategy="steps", save_steps=1)
    trainer.order = order
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose callbacks stand as they were added."""
    trainer = trainer_of_everything(tmp_path_factory.mktemp("whole"), None)
    trainer.train()
    return trainer


@pytest.mark.parametrize("order", [0, 1, 2])
def test_checkpoints_are_whole_in_any_order_of_callbacks(whole: Any, tmp_path: Path, order: int) -> None:
    """All that is saved is in the list of a complete checkpoint, and a run resumed in a third order is the same."""
    shuffled = trainer_of_everything(tmp_path / "shuffled", order)
    shuffled.train()
    names = [[type(callback) for callback in t.callback_handler.callbacks] for t in (whole, shuffled)]
    assert names[0] != names[1] and set(names[0]) == set(names[1])
    for step in range(1, 7):
        marker = json.loads((tmp_path / "shuffled" / f"checkpoint-{step}" / "complete.json").read_text())
        assert marker["files"].keys() >= SAVED
    checkpoint = tmp_path / "resumed" / "checkpoint-3"
    shutil.copytree(tmp_path / "shuffled" / "checkpoint-3", checkpoint)
    resumed = trainer_of_everything(tmp_path / "resumed", order + 10)
    Manifest(tmp_path / "resumed").claim_checkpoint(checkpoint)
    resumed.train(resume_from_checkpoint=True)
    for trainer in (shuffled, resumed):
        assert logged(trainer, "loss") == logged(whole, "loss")
        assert torch.equal(flat_weights(trainer.model), flat_weights(whole.model))
        assert trainer.train_dataset[:] == whole.train_dataset[:]
        starts = [persistent.starts() for persistent in (whole.persistent[-1], trainer.persistent[-1])]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*starts, strict=True))


class Kept:
    """Tells what it sees in the checkpoints it is asked to save into and load from."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, what: str, directory: Path) -> None:
        self.told.append(f"{what} {directory.name}")

    def save(self, directory: Path) -> None:
        assert (directory / "trainer_state.json").is_file() and not is_complete(directory)
        self.tell("save", directory)

    def load(self, directory: Path) -> None:
        assert is_complete(directory)
        self.tell("load", directory)


def test_the_bridge_asks_before_it_saves_and_loads_only_on_resuming(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    told = []
    for resume in (None, str(tmp_path / "False" / "checkpoint-1")):
        kept, trainer = Kept(), make(tmp_path / str(resume is not None), **options)
        trainer.persistent.append(kept)
        trainer.before_saving.append(lambda folder, kept=kept: kept.tell(f"{folder.exists()}", folder))
        trainer.train(resume_from_checkpoint=resume)
        told.append(kept.told)
    first, second = (["False checkpoint-1", "save checkpoint-1"], ["False checkpoint-2", "save checkpoint-2"])
    assert told == [first + second, ["load checkpoint-1", *second]]


def test_a_checkpoint_that_is_refused_is_not_written(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise OSError("no room")

    trainer = make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.before_saving.insert(0, refuse)
    with pytest.raises(OSError, match="no room"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not Manifest(tmp_path).checkpoints()


def test_a_save_that_a_signal_asks_for_is_announced_too(tmp_path: Path) -> None:
    """The guard stands before the callback that asks for it."""
    trainer, request = make(tmp_path, max_steps=3, save_strategy="no"), StopRequest()
    trainer.add_callback(StopWhenAsked(request))
    request.signal = signal.SIGTERM
    trainer.train()
    assert Manifest(tmp_path).checkpoints() == [tmp_path / "checkpoint-1"] and is_complete(tmp_path / "checkpoint-1")


def test_transformers_alone_says_which_checkpoint_is_resumed_from() -> None:
    sources = Path(alignkit.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "get_last_checkpoint" in path.read_text(encoding="utf-8")]
