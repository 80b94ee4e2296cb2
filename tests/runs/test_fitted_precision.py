"""The precision a run takes where none is written: that of the machine and of the launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.config import load_config
from alignkit.errors import ConfigError
from alignkit.models import precision
from alignkit.models.choices import Choice
from alignkit.runs.arguments import common_arguments, fitted
from alignkit.runs.directory import RunDirectory
from alignkit.runs.resumption import settled
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows

LAUNCHER = "ACCELERATE_MIXED_PRECISION"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator with bfloat16, and no launcher."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    for variable in (LAUNCHER, "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(variable, raising=False)


def config(*words: str, program: str = "preference", output: str = "run") -> Any:
    method = {"preference": "dpo", "sft": "sft", "online": "grpo", "router": "roma"}[program]
    rewards = ("--rewards", "length") if program == "online" else ()
    given = ("--model", "m", "--data", "d.jsonl", "--method", method, "--output_dir", output, *rewards, *words)
    return load_config(program, None, given, check_files=False)


def fit(*words: str, choices: dict[str, Choice] | None = None, **more: Any) -> tuple[bool, str, str]:
    """bf16, dtype and the reason."""
    made = {} if choices is None else choices
    found = fitted(config(*words, **more).config, made)
    assert common_arguments(found)["bf16"] is found.bf16 is made["bf16"].value
    return found.bf16, found.dtype, made["bf16"].reason


@pytest.mark.parametrize("program", ["preference", "sft", "online", "router"])
def test_every_program_fits_the_machine(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(program=program)[:2] == (True, "bfloat16")
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    found = fit(program=program)
    assert found == (False, "float32", "no accelerator here computes in bfloat16")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--parametrization", "full"], (True, "float32")),
        (["--use_cpu"], (False, "float32")),
        (["--fp16"], (False, "float32")),
        (["--dtype", "float32"], (False, "float32")),
        (["--dtype", "float16"], (False, "float16")),
        (["--dtype", "bfloat16"], (True, "bfloat16")),
        (["--dtype", "auto"], (True, "auto")),
        (["--bf16", "false"], (False, "float32")),
        (["--bf16", "true", "--use_cpu"], (True, "bfloat16")),
        (["--bf16", "true", "--use_cpu", "--dtype", "float32"], (True, "float32")),
    ],
)
def test_what_is_written_is_followed(words: list[str], expected: tuple[bool, str]) -> None:
    assert fit(*words)[:2] == expected


def test_the_reason_of_what_is_written_is_that() -> None:
    assert fit("--bf16", "false")[2] == "pinned"


@pytest.mark.parametrize(
    ("stated", "words", "expected"),
    [("bf16", ["--use_cpu"], True), ("fp16", [], False), ("bf16", ["--dtype", "float32"], True), ("no", [], True)],
)
def test_the_launcher_is_followed(
    stated: str, words: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER, stated)
    value, _, reason = fit(*words)
    assert value is expected and (stated == "no") != (stated in reason)


@pytest.mark.parametrize(
    ("stated", "words"), [("bf16", ["--bf16", "false"]), ("fp16", ["--bf16", "--use_cpu"]), ("bf16", ["--fp16"])]
)
def test_two_precisions_are_refused(stated: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHER, stated)
    with pytest.raises(ConfigError, match=f"{words[0][2:]}: .*launcher's file says {stated}.*Write bf16: auto"):
        fit(*words)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"bf16": {"enabled": True}}, True),
        ({"bf16": {"enabled": False}}, False),
        ({"fp16": {"enabled": True}}, False),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, True),
        ({}, True),
    ],
)
def test_a_file_of_deepspeed_is_followed(
    content: dict[str, Any], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert fit()[0] is expected
    if content.get("bf16") == {"enabled": False}:
        with pytest.raises(ConfigError, match="bf16: true.*the launcher's file says no"):
            fit("--bf16", "--use_cpu")


def test_a_resumed_run_stays_in_its_precision() -> None:
    assert fit(choices={"bf16": Choice("bf16", False, "as it was")}) == (False, "float32", "as it was")
    with pytest.raises(ConfigError, match="was bfloat16 when the run began, and is not here: this run is on the CPU"):
        fit("--use_cpu", choices={"bf16": Choice("bf16", True, "as it was")})


@pytest.mark.parametrize(("stated", "expected"), [(None, (False, "float32")), ("bf16", (True, "bfloat16"))])
def test_a_run_of_older_defaults_is_resumed_under_them(
    stated: str | None, expected: tuple[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's precision was followed then too; what was written is not touched."""
    if stated:
        monkeypatch.setenv(LAUNCHER, stated)
    then = config("--weight_decay", "0.5").effective()
    then |= {"bf16": {"value": False, "source": "default"}, "weight_decay": {"value": 0.5, "source": "default"}}
    if not stated:
        then["dtype"] = {"value": "float32", "source": "default"}
    run = RunDirectory.create(tmp_path / "run")
    run.record(config=then)
    run.lock.release()
    loaded = settled(config("--weight_decay", "0.1", "--resume", output=str(tmp_path / "run")))
    found = fitted(loaded.config, {})
    assert (found.bf16, found.dtype, found.weight_decay) == (*expected, 0.1)
    # What began under today's defaults is the same configuration.
    assert settled(config("--resume", output=str(tmp_path / "new"))).config.bf16 == "auto"


@pytest.mark.parametrize("parametrization", ["lora", "full"])
def test_what_trains_is_float32_and_computed_in_bfloat16(
    parametrization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that says bf16 on a CPU is followed there too, so the whole of it can be seen."""
    monkeypatch.setenv(LAUNCHER, "bf16")
    save_model(tmp_path / "model")
    given = config_of("sft", str(tmp_path / "model"), tmp_path, parametrization=parametrization, max_steps=1)
    trainer = build(fitted(given, {}), text_rows(given, 8))
    trainer.train()
    kinds = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    base = {(False, torch.bfloat16)} if parametrization == "lora" else set()
    assert kinds == {(True, torch.float32)} | base
    assert trainer.accelerator.mixed_precision == "bf16"
