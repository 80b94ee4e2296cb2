"""What one run leaves behind, read as its owner would a month later."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from alignkit.config import load_config
from alignkit.models.saved_weights import verify_weights
from alignkit.parts.method import load_method
from alignkit.runs import results
from alignkit.runs.python import train_preference
from tests.programs.conftest import CONFIG, save_model, write_rows
from tests.programs.launching import Ended, Launcher, read_lines, run_json, write_config

# One worker runs all of this folder: its programs are forked from one process, and its finished runs made once.
pytestmark = pytest.mark.xdist_group("programs")

SECTIONS = {
    "alignkit_run", "batch_layout", "choices", "config", "data", "environment", "health", "health_state",
    "origin", "process_layout", "results", "results_before", "samples", "saved", "sessions", "status", "trainable",
}  # fmt: skip
HELD_OUT = {"eval_fraction": 0.2, "probe_rows": 4, "probe_steps": 2, "num_samples": 2, "sample_max_new_tokens": 4}


@pytest.fixture(scope="module")
def finished(launcher: Launcher, workplace: Path) -> tuple[Path, Ended]:
    """A finished LoRA run, and what it printed."""
    run = workplace / "finished"
    # Pinned, for auto takes the log-probs that another test's run may have left in the cache.
    keys = {**CONFIG, **HELD_OUT, "reference": "adapter_disabled", "output_dir": "finished", "max_steps": 4}
    write_config(workplace / "finished.yaml", keys)
    ended = launcher.run("--config", "finished.yaml", "--learning_rate", "2e-3", directory=workplace)
    assert ended.exit_code == 0, ended.errors[-3000:]
    return run, ended


@pytest.fixture(scope="module")
def run(finished: tuple[Path, Ended]) -> Path:
    """The run directory."""
    return finished[0]


@pytest.fixture(scope="module")
def record(run: Path) -> dict[str, Any]:
    """Its run.json."""
    return run_json(run)


def test_the_files(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "alignkit.json", "checkpoint-4",
        "manifest.json", "metrics.jsonl", "plot.png", "run.json", "tokenizer.json", "tokenizer_config.json",
        "training_args.bin",
    }  # fmt: skip


def test_the_terminal(finished: tuple[Path, Ended]) -> None:
    """What was read, what trains, how it went, and where to look."""
    _, ended = finished
    for expected in (
        "trained on",
        "[[",
        "chosen: layout ",
        "parameters train",
        "held-out rows: ",
        "sample: ",
        "plot plot.png",
    ):
        assert expected in ended.output, expected
    assert not re.search(r"^(step|eval) +\d+\s*$", ended.output, re.MULTILINE)
    assert "Traceback" not in ended.errors


def test_the_line_that_says_what_will_happen(finished: tuple[Path, Ended]) -> None:
    """Every number by hand: 2 rows on one process, 4 steps, the rate of the command line."""
    (line,) = [line for line in finished[1].output.splitlines() if line.startswith("run: ")]
    assert line == (
        "run: flex_dpo, lora; reference: the policy with its adapter off; learning rate 0.002 (linear); 2 rows x 1 "
        "accumulated x 1 process = 2 rows a step, 4 steps; cpu, weights float32, trained ones float32"
    )


def test_held_out_rows_before_and_after(finished: tuple[Path, Ended], run: Path, record: dict[str, Any]) -> None:
    """On the terminal and in the table of the card."""
    before, after = record["results_before"], record["results"]
    assert f"held-out rows: loss {before['loss']:.4g} -> {after['loss']:.4g}, rewards/accuracies" in finished[1].output
    card = (run / "README.md").read_text()
    assert "| metric | before | after |" in card
    assert f"| loss | {before['loss']:.4g} | {after['loss']:.4g} |" in card


def test_the_sections(record: dict[str, Any]) -> None:
    assert set(record) == SECTIONS
    assert record["status"] == "finished"
    config = record["config"]
    assert config["learning_rate"] == {"value": 0.002, "source": "command line"}
    assert config["max_steps"] == {"value": 4, "source": "finished.yaml:6"}
    assert config["beta_neg"]["source"] == "default"
    assert all(set(entry) == {"value", "source"} for entry in config.values())
    assert record["environment"]["alignkit"] and record["environment"]["python"]
    for package in ("torch", "transformers", "trl", "peft"):
        assert record["environment"]["versions"][package]


def test_the_layouts_that_ran(record: dict[str, Any]) -> None:
    layout = record["process_layout"]
    assert layout["world_size"] == 1
    assert layout["wrapper"] == "PeftModelForCausalLM"
    assert layout["local_parameters"] == record["trainable"]["total"]
    assert "backend" in layout
    assert record["batch_layout"]["layout"] in ("padded", "packed") and record["batch_layout"]["reason"]
    assert record["choices"]["layout"]["value"] == record["batch_layout"]["layout"]


def test_the_data_and_the_results(record: dict[str, Any]) -> None:
    splits = {split["name"]: split for split in record["data"]["splits"]}
    assert (splits["train"]["num_rows"], splits["held-out"]["num_rows"]) == (32, 8)
    assert 0 <= record["results"]["rewards/accuracies"] <= 1
    assert set(record["results"]) >= {"loss", *load_method("flex_dpo").metrics}
    before = record["results_before"]
    assert before.keys() == record["results"].keys() and before["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert before["logratio/chosen"] == pytest.approx(0, abs=1e-5) != record["results"]["logratio/chosen"]
    assert len(record["samples"]) == 2 and all(sample["prompt"] for sample in record["samples"])
    assert record["trainable"]["trainable"] == record["saved"]["parameters"] > 0
    assert record["saved"]["files"] == ["adapter_model.safetensors"]


def test_every_line_of_the_metrics(run: Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert set(load_method("flex_dpo").metrics) <= set(line)
        assert ("dispersion" in line) == (line["step"] % 2 == 0)
        # Of steps with less than half of the peak rate, as the last one here, nothing is said.
        assert ("unmoved_weights" in line) == (line["step"] < 4) and line.get("unmoved_weights", 0) < 0.01
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_the_plot_is_a_picture(run: Path) -> None:
    pixels = matplotlib.image.imread(run / "plot.png")
    height, width = pixels.shape[:2]
    assert 400 <= height <= 4000 and 400 <= width <= 4000
    assert (run / "plot.png").stat().st_size < 1_000_000
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


def test_the_snippet_of_the_card_loads_the_adapter(run: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (run / "README.md").read_text()
    assert "flex_dpo" in card and "2406.07327" in card and "None" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {}
    exec(compile(snippet, "snippet of the card", "exec"), names)
    adapters = {name: p for name, p in names["model"].named_parameters() if "lora_B" in name}
    assert adapters and any(bool(p.abs().sum() > 0) for p in adapters.values())


def test_the_saved_adapter_is_verified(run: Path, record: dict[str, Any]) -> None:
    saved = verify_weights(run)
    assert saved.num_parameters == record["saved"]["parameters"]
    assert verify_weights(run / "checkpoint-4") is not None and (run / "checkpoint-4" / "complete.json").exists()


def test_a_failed_run_says_why(launcher: Launcher, workplace: Path) -> None:
    rows = [{"prompt": "w1 ", "completions": ["w2 "], "scores": [1.0]}] * 4
    write_rows(workplace / "single.jsonl", rows)
    write_config(workplace / "failed.yaml", {**CONFIG, "data": "single.jsonl", "output_dir": "failed"})
    assert launcher.run("--config", "failed.yaml", directory=workplace).exit_code == 2
    record = run_json(workplace / "failed")
    assert record["status"].startswith("failed: MalformedRows: train: rows that cannot be trained on")
    assert record["config"]["data"]["value"] == "single.jsonl"


def test_weights_that_are_not_finite_are_never_called_finished(launcher: Launcher, workplace: Path) -> None:
    """A learning rate that blows the model up: the run stops, says so, and leaves no result that looks usable."""
    save_model(workplace / "explosive")
    config = {**CONFIG, "model": "explosive", "parametrization": "full", "learning_rate": 1e30, "max_grad_norm": 0.0}
    write_config(workplace / "diverged.yaml", {**config, "output_dir": "diverged"})
    ended = launcher.run("--config", "diverged.yaml", directory=workplace)
    assert ended.exit_code == 2 and "Traceback" not in ended.errors
    assert "learning_rate" in ended.message and "max_grad_norm: 1.0" in ended.message
    assert "checkpoint" not in ended.message, "none was written"
    assert "\nerror: " in f"\n{ended.errors}", "the message begins a line, not in that of the progress bar"
    assert run_json(workplace / "diverged")["status"].startswith("failed: ")
    assert not (workplace / "diverged" / "README.md").exists()


def test_an_answer_that_fails_does_not_cost_the_model(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*unused: Any, **unused_too: Any) -> None:
        raise RuntimeError("no answer")

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(results, "generate_samples", fail)
    names = {**CONFIG, "max_steps": 1, "eval_fraction": 0.2, "save_steps": 100, "output_dir": "unanswered"}
    with pytest.raises(RuntimeError, match="no answer"):
        train_preference(load_config("preference", None, [f"--{key}={value}" for key, value in names.items()]))
    assert verify_weights(workplace / "unanswered").num_parameters > 0
    assert run_json(workplace / "unanswered")["status"] == "failed: RuntimeError: no answer"
