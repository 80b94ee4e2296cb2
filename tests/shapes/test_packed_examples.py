"""Examples that stand behind one another in one row: what they give is what padded rows give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig

from alignkit.data.filling import REPEATED
from alignkit.data.prefix import IGNORE_INDEX
from alignkit.errors import ModelError
from alignkit.shapes._example_collators import PackedCollator
from tests.supervised import completions, make, token_rows
from tests.trainers import flat_weights, logged

STEPS = {"max_steps": 3, "optim": "sgd", "learning_rate": 1e-2, "logging_steps": 1}


def examples() -> Dataset:
    return token_rows(completions())


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 48}], ids=["apart", "packed by TRL"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_training_follows_padded_rows(peft: bool, changes: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for layout in ("padded", "packed"):
        trainer = make(tmp_path / layout, examples(), peft, layout=layout, **STEPS, **changes)
        assert trainer.layout.layout == layout
        trainer.train()
        runs.append(trainer)
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-5, abs=1e-6), key
    torch.testing.assert_close(flat_weights(runs[1].model), flat_weights(runs[0].model), rtol=0, atol=1e-6)
    assert runs[1].evaluate(examples())["eval_loss"] == pytest.approx(
        runs[0].evaluate(examples())["eval_loss"], rel=1e-5
    )


def test_auto_is_packed_and_says_why_where_it_is_not(tmp_path: Path) -> None:
    assert make(tmp_path / "auto", examples(), layout="auto").layout.layout == "packed"
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    padded = make(tmp_path / "virtual", examples(), layout="auto", peft_config=virtual)
    assert padded.layout.layout == "padded" and "virtual tokens" in padded.layout.reason
    with pytest.raises(ModelError, match="layout: packed cannot be used: .*virtual tokens"):
        make(tmp_path / "asked", examples(), layout="packed", peft_config=virtual)


ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3, 4], "labels": [IGNORE_INDEX, IGNORE_INDEX, 3, 4]},
    {"input_ids": [5], "labels": [5]},
    {"input_ids": [6, 7, 8, 9, 10], "labels": [6, 7, IGNORE_INDEX, 9, 10], "seq_lengths": [3, 2]},
    {"input_ids": [11, 12], "labels": [11, 12], REPEATED: True},
]


def scored(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """Position and label of every token that the head scores."""
    runs, at, positions = batch["segments"].runs, 0, []
    for number, run in enumerate(runs):
        positions += range(at, at + run) if number % 2 else []
        at += run
    assert at == batch["input_ids"].shape[1]
    return list(zip(positions, batch["shift_labels"][0].tolist(), strict=True))


def test_a_position_predicts_the_next_token_of_its_own_example() -> None:
    batch = PackedCollator(pad_token_id=0)(ROWS[:2] + [ROWS[3]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1]]
    assert scored(batch) == [(1, 3), (2, 4), (5, IGNORE_INDEX)]
    assert batch["row_tokens"].tolist() == [4, 1, 0] and batch["row_scored"].tolist() == [2, 0, 1]


def test_what_trl_has_packed_stays_apart() -> None:
    batch = PackedCollator(pad_token_id=0, pad_to_multiple_of=8)([ROWS[2]])
    assert batch["segments"].prompts == ((0, (3,)), (0, (2,)), (3, ()))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    # 9 begins the second example: no position predicts it.
    assert scored(batch) == [(0, 7), (3, 10)]


def test_a_batch_in_which_nothing_is_trained_has_a_loss_of_zero(tmp_path: Path) -> None:
    trainer = make(tmp_path, examples(), layout="packed")
    batch = trainer.data_collator([{"input_ids": [5, 6], "labels": [IGNORE_INDEX] * 2}])
    _, result = trainer.evaluate_objective(trainer.model, batch)
    loss = sum(term.values.sum() for term in result.terms)
    loss.backward()
    assert float(loss) == 0.0


def test_of_the_last_batch_of_several_processes_only_its_own_rows_count(tmp_path: Path) -> None:
    trainer = make(tmp_path, examples(), layout="packed")
    batch = trainer.data_collator([dict(row) for row in examples()][:3])
    for kept in (0, 1, 2, 3):
        found = trainer.keep_rows(batch, kept)
        alone = trainer.data_collator([dict(row) for row in examples()][:kept]) if kept else None
        expected = int(trainer.item_counts(alone)["token"]) if alone else 0
        assert int(trainer.item_counts(found)["token"]) == expected
        assert int(found["row_tokens"].sum()) == (int(alone["row_tokens"].sum()) if alone else 0)
