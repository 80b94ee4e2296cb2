"""A supervised run from the command line to what it leaves behind: conversations, packing, resumption, real rows."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file

from alignkit.models.saved_weights import verify_weights
from alignkit.shapes._tokens import METRICS
from tests.programs.conftest import CONFIG, pairs, write_rows
from tests.programs.launching import SFT, Ended, Launcher, read_lines, run_json, write_config

# One worker runs all of this folder: its programs are forked from one process, and its finished runs made once.
pytestmark = pytest.mark.xdist_group("programs")

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }} <eos>"
    "{% endgeneration %}{% else %}{{ m['content'] | trim }} {% endif %}{% endfor %}"
)
CLOCKED = re.compile(r".*(runtime|_per_second)")
GOOD: dict[str, Any] = {
    **CONFIG,
    "method": "sft",
    "data": "talks.jsonl",
    "chat_template": "template.jinja",
    "assistant_only_loss": True,
    "packing": True,
    "max_length": 24,
    "eval_fraction": 0.2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "logging_steps": 3,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,
    "num_samples": 2,
    "sample_max_new_tokens": 4,
}
"""Eight steps of packed conversations, saved after the fourth; logs and evaluations fall between saves."""


@pytest.fixture(scope="module")
def place(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workplace with conversations and a template."""
    copy = Path(shutil.copytree(workplace, tmp_path_factory.mktemp("sft") / "place"))
    talks = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        for row in pairs(60)
    ]
    write_rows(copy / "talks.jsonl", [{"messages": talk} for talk in talks])
    (copy / "template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def finished(launcher: Launcher, place: Path) -> tuple[Path, Ended]:
    """A finished run, and what it printed."""
    write_config(place / "c.yaml", GOOD)
    ended = launcher.run("--config", "c.yaml", directory=place, program=SFT)
    assert ended.exit_code == 0, ended.errors[-3000:]
    return place / "run", ended


def logs(run: Path) -> list[dict[str, Any]]:
    """What was logged, without clock times."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if not CLOCKED.match(key)} for line in lines]


def test_what_a_run_leaves_behind(finished: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    run, ended = finished
    for expected in ("messages\n", "trained tokens", "[[", "parameters train", "held-out rows: loss", "sample: "):
        assert expected in ended.output, expected
    record = run_json(run)
    assert record["status"] == "finished"
    splits = {split["name"]: split for split in record["data"]["splits"]}
    assert (splits["train"]["num_rows"], splits["held-out"]["num_rows"]) == (48, 12)
    assert record["config"]["packing"]["value"] is True and record["config"]["packing"]["source"].startswith("c.yaml:")
    assert len(record["samples"]) == 2 and set(record["results"]) == {"loss", "loss/nll", *METRICS} - {"num_tokens"}
    assert verify_weights(run).num_parameters == record["saved"]["parameters"] == record["trainable"]["trainable"]
    training = [line for line in logs(run) if "loss" in line]
    assert [line["step"] for line in training] == [3, 4, 6, 8]
    assert all(set(line) >= {*METRICS, "loss/nll"} for line in training)
    assert all(math.isfinite(value) for line in logs(run) for value in line.values())
    assert [line["step"] for line in logs(run) if "eval_loss" in line] == [0, 3, 6, 8]
    pixels = matplotlib.image.imread(run / "plot.png")
    assert pixels.shape[0] < pixels.shape[1] and pixels[..., :3].min() < 0.5
    card = (run / "README.md").read_text()
    assert "fine-tuned with `sft`" in card and "2203.02155" in card and "trained tokens a row" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    exec(compile(snippet, "snippet of the card", "exec"), names)
    assert any(bool(p.abs().sum() > 0) for name, p in names["model"].named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("changes", [{}, {"packing": False}], ids=["packed", "padded"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    changes: dict[str, Any], launcher: Launcher, place: Path, tmp_path: Path
) -> None:
    write_config(place / "whole.yaml", {**GOOD, **changes})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = ["--config", "whole.yaml", "--output_dir"]
    assert launcher.run(*arguments, str(whole), directory=place, program=SFT).exit_code == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-8")
    (resumed / "adapter_model.safetensors").unlink()
    often = shutil.copytree(resumed, tmp_path / "often")
    ended = launcher.run(*arguments, str(resumed), "--resume", directory=place, program=SFT)
    assert ended.exit_code == 0, ended.errors[-3000:]
    assert "resuming from" in ended.output
    assert logs(resumed) == logs(whole)
    ours, theirs = (load_file(run / "adapter_model.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    intervals = ["--logging_steps", "1", "--save_steps", "3"]
    assert launcher.run(*arguments, str(often), "--resume", *intervals, directory=place, program=SFT).exit_code == 0
    assert [entry["step"] for entry in logs(often) if "loss" in entry and entry["step"] > 4] == [5, 6, 7, 8]
    assert {path.name for path in often.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}
    other = launcher.run(*arguments, str(resumed), "--resume", "--max_length", "32", directory=place, program=SFT)
    assert other.exit_code == 2 and "max_length: 24" in other.message


def test_full_training_on_completions_continues_as_a_model(launcher: Launcher, place: Path) -> None:
    write_rows(place / "answers.jsonl", [{"prompt": r["prompt"], "completion": r["rejected"]} for r in pairs(20)])
    config = {**CONFIG, "method": "sft", "data": "answers.jsonl", "parametrization": "full", "output_dir": "answers"}
    write_config(place / "answers.yaml", {**config, "max_steps": 2})
    assert launcher.run("--config", "answers.yaml", directory=place, program=SFT).exit_code == 0
    again = ["--config", "answers.yaml", "--model", "answers", "--output_dir", "again", "--parametrization", "lora"]
    ended = launcher.run(*again, directory=place, program=SFT)
    assert ended.exit_code == 0, ended.errors[-3000:]
    assert "A LoRA adapter for the local model `answers`" in (place / "again" / "README.md").read_text()


@pytest.mark.shared
def test_real_rows_on_a_trained_model(launcher: Launcher, shared: Path, tmp_path: Path) -> None:
    """GSM8K on the model that has seen it: the report is clean, the loss low from the start."""
    model, data = shared / "models" / "gsm-tiny", shared / "data" / "gsm8k"
    for name in ("train", "test"):
        lines = (data / f"{name}.jsonl").read_text().splitlines()[:24]
        talks = [[(row["question"], "user"), (row["answer"], "assistant")] for row in map(json.loads, lines)]
        messages = [{"messages": [{"role": role, "content": text} for text, role in talk]} for talk in talks]
        write_rows(tmp_path / f"{name}.jsonl", messages)
    values = {
        "model": str(model), "data": "train.jsonl", "eval_data": "test.jsonl", "method": "sft", "output_dir": "run",
        "assistant_only_loss": True, "packing": True, "max_length": 512, "per_device_train_batch_size": 1,
        "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-4, "use_cpu": True, "num_samples": 1,
        "sample_max_new_tokens": 8, "max_eval_rows": 8,
    }  # fmt: skip
    write_config(tmp_path / "c.yaml", values)
    ended = launcher.run("--config", "c.yaml", directory=tmp_path, program=SFT)
    assert ended.exit_code == 0, ended.errors[-3000:]
    assert "all 24 whole completions end in one" in ended.output and "  fail  " not in ended.output
    record = run_json(tmp_path / "run")
    assert 0.5 < record["results"]["loss"] < 1.5 and record["results"]["mean_token_accuracy"] > 0.6
    assert all(line["loss"] < 1.2 for line in logs(tmp_path / "run") if "loss" in line)
    assert record["samples"][0]["prompt"].endswith("<|assistant|>\n")
