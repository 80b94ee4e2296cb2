"""The best evaluation of a run: its weights are the result, and training ends where none is better."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerControl, TrainerState

from alignkit import train_sft
from alignkit.config.best import more_is_better
from alignkit.errors import ConfigError
from alignkit.runs.best import EarlyStopping, Ranking
from alignkit.shapes.tokens import SupervisedConfig
from tests.programs.conftest import pairs, save_model, write_rows
from tests.runs.saved import arguments


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and rows that soon are learned by heart."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(12)]
    write_rows(tmp_path / "rows.jsonl", rows[:6])
    write_rows(tmp_path / "held_out.jsonl", rows[6:])
    return tmp_path


def run(place: Path, **changes: Any) -> dict[str, Any]:
    """Train as a user does, and return ``run.json``."""
    config: dict[str, Any] = {
        "model": "model",
        "data": "rows.jsonl",
        "eval_data": "held_out.jsonl",
        "method": "sft",
        "output_dir": "run",
        "use_cpu": True,
        "parametrization": "full",
        "learning_rate": 4e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 4,
        "num_samples": 0,
    }
    train_sft(SupervisedConfig(**config | changes))
    record: dict[str, Any] = json.loads((place / "run" / "run.json").read_text())
    return record


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def held_out_losses(place: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_the_result_is_the_model_of_the_best_evaluation(place: Path) -> None:
    record = run(place, load_best_model_at_end=True, save_total_limit=1)
    losses = held_out_losses(place)
    assert list(losses) == [0, 2, 4, 6, 8]
    best = min(list(losses)[1:], key=losses.__getitem__)
    assert best < 8, "the last step must not be the best, or nothing is gone back to"
    assert record["best"] == {"step": best, "checkpoint": f"checkpoint-{best}", "eval_loss": losses[best]}
    assert record["results"]["loss"] == losses[best] and "ended_early" not in record
    kept = {path.name for path in (place / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-8"}

    saved, last = weights(place / "run"), weights(place / "run" / "checkpoint-8")
    expected = weights(place / "run" / f"checkpoint-{best}")
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    assert not all(torch.equal(saved[key], last[key]) for key in last)
    # By another route: the model as anyone would load it has the loss that the run reports.
    model = AutoModelForCausalLM.from_pretrained(place / "run")
    total, count = 0.0, 0
    for row in map(json.loads, (place / "held_out.jsonl").read_text().splitlines()):
        index = {f"w{i}": i + 3 for i in range(61)}
        prompt, completion = ([index[word] for word in row[key].split()] for key in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *completion, 1]])
        logps = model(ids).logits.detach().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, count = total - float(logps.sum()), count + len(logps)
    assert total / count == pytest.approx(record["results"]["loss"], abs=1e-5)

    # The report alone is written again: the best is found in the checkpoint's log, and gone back to once more.
    again = run(place, load_best_model_at_end=True, save_total_limit=1, resume=True)
    assert again["best"] == record["best"] and again["results"] == record["results"]
    assert all(torch.equal(value, expected[key]) for key, value in weights(place / "run").items())


def test_training_ends_where_nothing_gets_better_and_a_resumed_run_knows_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(place)
    losses, last = held_out_losses(place), weights(place / "run")
    ended = next(step for step in (4, 6, 8) if losses[step] >= min(losses[s] for s in range(2, step, 2)))
    assert ended < 8 and "ended_early" not in whole
    stops = {"early_stopping_patience": 1, "overwrite": True}
    assert run(place, **stops)["ended_early"] == ended
    assert "evaluations were not better in eval_loss; training ends here" in capsys.readouterr().out
    assert list(held_out_losses(place)) == list(range(0, ended + 1, 2))
    stopped = weights(place / "run")
    assert all(torch.equal(stopped[key], value) for key, value in weights(place / f"run/checkpoint-{ended}").items())

    assert run(place, early_stopping_patience=1, resume=True)["ended_early"] == ended
    assert all(torch.equal(stopped[key], value) for key, value in weights(place / "run").items())
    patient = run(place, early_stopping_patience=9, resume=True)
    assert patient["ended_early"] is None
    assert all(torch.equal(last[key], value) for key, value in weights(place / "run").items()), "as if never stopped"


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("greater", [True, False])
def test_patience_is_that_of_transformers(greater: bool, threshold: float, tmp_path: Path) -> None:
    """Over random evaluations, among them equal ones and ones better by less than the threshold."""
    draw = random.Random(0)
    args = arguments(tmp_path, metric_for_best_model="eval_x", greater_is_better=greater)
    ended = set()
    for _ in range(60):
        patience, state = draw.randint(1, 3), TrainerState(max_steps=100)
        ours, theirs = (
            EarlyStopping(Ranking("eval_x", greater), patience, threshold),
            EarlyStoppingCallback(patience, threshold),
        )
        for step in range(1, 9):
            state.global_step, value = step, draw.randrange(8) / 4
            state.log_history.append({"eval_x": value, "step": step})
            mine, other = TrainerControl(), TrainerControl()
            ours.on_evaluate(args, state, mine)
            theirs.on_evaluate(args, state, other, {"eval_x": value})
            better = state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric)
            state.best_metric = value if better else state.best_metric  # as its trainer does, after the callback
            assert mine.should_training_stop == other.should_training_stop
            if mine.should_training_stop:
                ended.add(step)
                break
    assert len(ended) > 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metric_for_best_model": "eval_mean_token_acuracy", "greater_is_better": True}, "eval_mean_token_accuracy?"),
        ({"metric_for_best_model": "loss/ll"}, "evaluations have eval_entropy, .*Did you mean eval_loss"),
        ({"metric_for_best_model": "entropy"}, "Write greater_is_better: true or false as well"),
    ],
)
def test_a_metric_that_no_evaluation_has(place: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(place, load_best_model_at_end=True, **changes)
    assert not list((place / "run").glob("checkpoint-*"))


def test_which_way_is_better() -> None:
    more = ["eval_reward", "rewards/accuracies", "rewards/margins", "eval_pass@4", "mean_token_accuracy"]
    less = ["loss", "eval_loss", "loss/nll", "eval_hard_loss"]
    assert all(more_is_better(name, None) is True for name in more)
    assert all(more_is_better(name, None) is False for name in less)
    assert more_is_better("entropy", None) is None and more_is_better("loss", True) is True
