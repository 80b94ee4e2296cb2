"""The rows of a d2o run: lists of another form are refused, streamed or not; errors come before samples are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from alignkit.errors import AlignkitError, DataError
from alignkit.objectives._d2o import checked_lists
from alignkit.objectives.d2o import D2OOptions
from alignkit.runs.python import train_preference
from alignkit.sampling.engines import HuggingFaceEngine, Request
from alignkit.sampling.generation import Sample
from alignkit.shapes.candidates import PreferenceConfig
from tests.scripts.tiny import save_model, write_rows

NEGATIVES = [{"prompt": f"Say {i}.", "rejected": f"No {i}."} for i in range(3)]


def lists(*scores: Any) -> list[dict[str, Any]]:
    """One list for every sequence of scores."""
    return [
        {"prompt": f"p{i}", "completions": [f"c{k}" for k in range(len(s))], "scores": list(s)}
        for i, s in enumerate(scores)
    ]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "model", seed=3)
    write_rows(tmp_path / "rows.jsonl", NEGATIVES)
    base = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run")}
    quick = {"use_cpu": True, "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 1, "num_samples": 0}
    return {**base, **quick, "method": "d2o"}


def run(config: Mapping[str, Any], **options: Any) -> Any:
    chosen = D2OOptions(**{"num_samples_per_prompt": 2, "sampling_max_new_tokens": 6, **options})
    return train_preference(PreferenceConfig(**config, method_options=chosen)).trainer


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What is asked of the model, which says ``No 0.`` to everything and so leaves the first row without a sample."""
    asked: list[Request] = []

    def engine(self: HuggingFaceEngine, requests: Sequence[Request]) -> list[Sample]:
        asked.extend(requests)
        return [Sample("No 0.", 6, False, 0.0) for _ in requests]

    monkeypatch.setattr(HuggingFaceEngine, "__call__", engine)
    return asked


@pytest.mark.parametrize("scores", [[1, 1, 0], [0, 1, 1], [3, -2], [2.5, 2.5, 2.5, 0.5], [1, 1], [1, None], ["1", "0"]])
def test_lists_that_pass(scores: list[Any]) -> None:
    """The negative need not be the last; what prefers nothing or is no number is left to the conversion."""
    rows = Dataset.from_list(lists(scores))
    assert checked_lists(rows, "train") is rows
    assert list(checked_lists(rows.to_iterable_dataset(), "train")) == rows.to_list()


@pytest.mark.parametrize("scores", [[1, 0, 0], [2, 1, 0], [1, 1, 0.5, 0], [0, 1, 0]])
@pytest.mark.parametrize("streamed", [False, True])
def test_lists_of_another_form(scores: list[float], streamed: bool) -> None:
    table = Dataset.from_list(lists(*[[1.0, 1.0, 0.0]] * 100, scores, [1.0, 0.0]))
    with pytest.raises(DataError, match=r"held-out: rows that are not samples and one negative") as raised:
        list(checked_lists(table.to_iterable_dataset() if streamed else table, "held-out"))
    assert f"1 row: row 100: scores {[float(s) for s in scores]}" in str(raised.value)


def test_streamed_lists_are_checked_before_training(config: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", lists(*[[1, 0, 0]] * 4))
    with pytest.raises(DataError, match="4 rows: row 0: scores"):
        run({**config, "streaming": True})
    write_rows(tmp_path / "rows.jsonl", lists(*[[1, 1, 0]] * 4))
    trainer = run({**config, "streaming": True})
    assert trainer.state.global_step == 1 and next(iter(trainer.train_dataset))["scores"] == [1, 1, 0]


def test_rows_lost_while_sampling_are_counted(
    config: dict[str, Any], tmp_path: Path, answers: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"(?s)1 of 3 rows are dropped, max_dropped_fraction 0.1 allows 0.*left: 1"):
        run(config)
    drawn = len(answers)
    capsys.readouterr()
    trainer = run({**config, "max_dropped_fraction": 0.4})
    assert len(trainer.train_dataset) == 2 and len(answers) == drawn
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (split,) = record["data"]["splits"]
    assert (split["num_rows_in"], split["num_rows"], split["dropped"]) == (3, 2, {"no sample is left": 1})
    report = record["sampling"]["train"]
    assert (report["num_prompts"], report["num_rows"], report["num_draws"]) == (3, 2, 2 * 2 + 4 * 2)
    printed = capsys.readouterr().out
    assert "samples of train" in printed and "SamplingReport(" not in printed
    assert "100.0% of the samples were cut" in printed and "Raise sampling_max_new_tokens\n" in printed


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {"helpful_reference_model": "./nowhere"}, r"`helpful_reference_model: ./nowhere`: .*does not exist"),
        ({}, {"helpful_reference_model": "org/nowhere"}, r"`helpful_reference_model: org/nowhere`: the tokenizer"),
        ({"reference_model": "org/nowhere"}, {}, r"`reference_model: org/nowhere`: the tokenizer of"),
        ({"lora_target_modules": ["foo"]}, {}, "lora_target_modules names foo, which cannot take an adapter here"),
        ({"eval_data": "{tmp}/ranked.jsonl"}, {}, "held-out: rows that are not samples and one negative"),
        ({"eval_data": "{tmp}/long.jsonl"}, {}, "held-out: 1 of 1 prompts are too long to sample for"),
        ({}, {"sampling_max_new_tokens": 507}, "takes 507 of .* 512 positions.*set sampling_max_new_tokens to 506 or"),
    ],
)
def test_errors_come_before_samples_are_drawn(
    changes: dict[str, Any],
    options: dict[str, Any],
    expected: str,
    config: dict[str, Any],
    tmp_path: Path,
    answers: list[Request],
) -> None:
    write_rows(tmp_path / "ranked.jsonl", lists([2, 1, 0]))
    write_rows(tmp_path / "long.jsonl", [{"prompt": "?" * 507, "rejected": "No."}])
    changes = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(AlignkitError, match=expected):
        run({**config, **changes}, **options)
    assert answers == []
