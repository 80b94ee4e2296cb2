"""Whatever a user gets wrong ends the real program with one message that says what to write instead."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.programs.conftest import CONFIG, WORDS, pairs, save_model, write_rows
from tests.programs.launching import PREFERENCE, SFT, Ended, Launcher, run_json, write_config

# One worker runs all of this folder: its programs are forked from one process, and its finished runs made once.
pytestmark = pytest.mark.xdist_group("programs")

CONVERSATION = {"prompt": [{"role": "user", "content": "w1"}], "chosen": [{"role": "assistant", "content": "w2"}]}
LISTS = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in pairs(20)]


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        name: What is wrong.
        changes: Keys of the config that differ from a good one; None leaves a key out.
        says: Regular expressions the message matches, in any order.
        make: Prepares files in the workplace.
    """

    name: str
    changes: Mapping[str, Any]
    says: tuple[str, ...]
    make: Callable[[Path], object] = field(default=lambda place: None)


def rows_in(name: str, rows: list[Any]) -> Callable[[Path], object]:
    """Write a data file; texts are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return lambda place: (place / name).write_text("".join(f"{line}\n" for line in lines))


def model_without(name: str, *files: str) -> Callable[[Path], object]:
    """Copy the model and delete files."""

    def make(place: Path) -> None:
        shutil.copytree(place / "model", place / name)
        for file in files:
            (place / name / file).unlink()

    return make


def damaged_model(place: Path) -> None:
    """Copy the model and cut its weights in half."""
    shutil.copytree(place / "model", place / "damaged")
    weights = place / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def misnamed(row: dict[str, str]) -> dict[str, str]:
    """A row with a typo in a column."""
    return {"prompt": row["prompt"], "choosen": row["chosen"], "rejected": row["rejected"]}


BFLOAT16 = Bad(
    "bfloat16 on a CPU nobody chose", {"bf16": True, "use_cpu": False}, ("bf16: true", "Write use_cpu: true as well")
)
BAD_CONFIGS = (
    Bad("a typo in a key", {"learnin_rate": 1e-3}, ("c.yaml:11", "learnin_rate", "Did you mean learning_rate")),
    Bad("a wrong type", {"max_steps": "many"}, ("max_steps: many", "Write a whole number")),
    Bad("a bad choice", {"method": "dpoo"}, ("method: dpoo", "dpo, exo_pair", "Did you mean dpo")),
    Bad("a typo in dtype", {"dtype": "bf16"}, ("dtype: bf16", "Did you mean bfloat16")),
    Bad("out of range", {"beta_neg": -1.0}, ("beta_neg: -1", "Write a value >= 0")),
    Bad("batch size 0", {"per_device_train_batch_size": 0}, ("batch_size: 0", "Write a value >= 1")),
    Bad("two precisions", {"bf16": True, "fp16": True}, ("one mixed precision", "Keep one of the two")),
    Bad("a launcher key", {"num_processes": 2}, ("num_processes: 2", "belongs to the launcher", "accelerate launch")),
    Bad("no method", {"method": None}, ("method", "is required")),
    Bad("streaming with a cache", {"reference": "precomputed", "streaming": True}, ("Write streaming: false",)),
    Bad("adapter on lm_head", {"lora_target_modules": ["lm_head"]}, ("contains lm_head", "Leave lm_head out")),
    Bad(
        "a kernel that is not installed",
        {"attn_implementation": "flash_attention_2", "bf16": True, "use_cpu": False},
        ("flash_attn", "pip install flash-attn"),
    ),
    Bad("longer rows than the model has positions", {"max_length": 257}, ("the 256 positions", "max_length: 256")),
    Bad("output_dir is a file", {"output_dir": "rows.jsonl"}, ("existing file", "Write a folder")),
    Bad("output_dir below a file", {"output_dir": "rows.jsonl/run"}, ("below rows.jsonl", "Write a folder")),
    Bad("a missing model", {"model": "./modell"}, ("./modell", "does not exist", "Did you mean model")),
    Bad(
        "a model without config.json",
        {"model": "no_config"},
        ("no config.json", "Write a folder"),
        model_without("no_config", "config.json"),
    ),
    Bad(
        "a model without weights",
        {"model": "no_weights"},
        ("no weights", "Write a folder"),
        model_without("no_weights", "model.safetensors"),
    ),
    Bad(
        "a model without tokenizer",
        {"model": "no_tokenizer"},
        ("no tokenizer", "save_pretrained"),
        model_without("no_tokenizer", "tokenizer.json", "tokenizer_config.json"),
    ),
    Bad("a missing data file", {"data": "row.jsonl"}, ("does not exist", "Did you mean rows.jsonl")),
    Bad("an empty data file", {"data": "empty.jsonl"}, ("empty.jsonl is empty",), rows_in("empty.jsonl", [])),
    Bad(
        "a malformed line",
        {"data": "malformed.jsonl"},
        ("malformed.jsonl:2", "Mend that line"),
        rows_in("malformed.jsonl", [*pairs(1), '{"prompt": "w1", "chosen": "w2" "rejected": "w3"}']),
    ),
    Bad(
        "a misnamed column",
        {"data": "misnamed.jsonl"},
        ("'chosen' is missing", r"Write column_map: \{chosen: choosen\}"),
        rows_in("misnamed.jsonl", [misnamed(row) for row in pairs(3)]),
    ),
)
"""Found before torch is imported."""

BAD_RUNS = (
    Bad(
        "an unknown Hub model without network",
        {"model": "nobody/nothing"},
        ("nobody/nothing", "Write the path of a saved model", "HF_HUB_OFFLINE"),
    ),
    Bad("damaged weights", {"model": "damaged"}, ("damaged", "download it again"), damaged_model),
    Bad(
        "no end-of-sequence token",
        {"model": "no_eos"},
        ("no eos_token", r"tokenizer\.save_pretrained\('no_eos'\)"),
        lambda place: save_model(place / "no_eos", eos=None),
    ),
    Bad("an unwritable place", {"output_dir": "/proc/run"}, ("/proc/run", "Write an output_dir where you may write")),
    Bad(
        "a malformed line further down",
        {"data": "late.jsonl"},
        ("late.jsonl:31", "write one JSON object a line"),
        rows_in("late.jsonl", [*pairs(30), '{"prompt": "w1", "chosen": "w2" "rejected": "w3"}']),
    ),
    Bad(
        "one candidate",
        {"data": "k1.jsonl"},
        ("fewer than 2 completions", "20 rows"),
        rows_in("k1.jsonl", [{**row, "completions": row["completions"][:1], "scores": [1]} for row in LISTS]),
    ),
    Bad(
        "four candidates for a pair method",
        {"data": "k4.jsonl"},
        ("exactly 2 completions", "keep 2 a row"),
        rows_in("k4.jsonl", [{**row, "completions": row["completions"] * 2, "scores": [1, 0, 0, 0]} for row in LISTS]),
    ),
    Bad(
        "NaN scores",
        {"data": "nan.jsonl"},
        ("nan.jsonl:1: malformed JSON", "NaN is not a number of JSON", "write null"),
        rows_in("nan.jsonl", [{**row, "scores": [1.0, float("nan")]} for row in LISTS]),
    ),
    Bad(
        "equal scores",
        {"data": "equal.jsonl"},
        ("20 of 20 rows are dropped", "all scores are equal", "column_map"),
        rows_in("equal.jsonl", [{**row, "scores": [1.0, 1.0]} for row in LISTS]),
    ),
    Bad(
        "chosen is rejected",
        {"data": "identical.jsonl"},
        ("20 of 20 rows are dropped", "identical", "column_map"),
        rows_in("identical.jsonl", [{**row, "rejected": row["chosen"]} for row in pairs(20)]),
    ),
    Bad("nothing left after truncation", {"max_length": 2}, ("max_length is 2; 64 would do",)),
    Bad(
        "messages without a chat template",
        {"data": "messages.jsonl"},
        ("no chat template", "Set chat_template"),
        rows_in("messages.jsonl", [{**CONVERSATION, "rejected": [{"role": "assistant", "content": "w3"}]}] * 9),
    ),
    Bad(
        "every row is cut",
        {"data": "cut.jsonl", "max_length": 8},
        ("9 of 9 rows .* are cut at 8 tokens", "max_length 64 holds", "max_truncated_fraction: 1"),
        rows_in("cut.jsonl", [{"prompt": f"w{i} ", "chosen": "w1 " * 30, "rejected": "w2 " * 30} for i in range(9)]),
    ),
    Bad(
        "held-out rows that are trained on",
        {"eval_data": "rows.jsonl", "max_eval_rows": 7},
        ("7 of 7 .* have an answer that is trained on", "write allow_overlap: true"),
    ),
    Bad("too few rows to hold out", {"eval_fraction": 0.001}, ("change the fraction, or give eval_data",)),
    Bad(
        "an unknown LoRA target",
        {"lora_target_modules": ["q_proj", "query"]},
        ("names query,", "names among down_proj, .*q_proj"),
    ),
    Bad("a pattern that matches nothing", {"lora_target_modules": r".*\.query"}, (r"\.query", "among down_proj")),
    Bad("an unknown module to save", {"lora_modules_to_save": ["head"]}, ("lora_modules_to_save names head",)),
    Bad(
        "an attention kernel for GPUs on the CPU",
        {"attn_implementation": "flex_attention", "use_cpu": False},
        ("flex_attention", "Write attn_implementation: sdpa"),
    ),
    Bad("float16 on the CPU", {"fp16": True, "use_cpu": False}, ("fp16: true", "Write bf16: true and use_cpu: true")),
    BFLOAT16,
    Bad(
        "a reference with another vocabulary",
        {"reference_model": "other_words"},
        ("other_words", "tokens differ", "Write a reference_model with the same tokenizer"),
        lambda place: save_model(place / "other_words", words=[*WORDS[:3], *reversed(WORDS[3:])]),
    ),
    Bad("an upload without token", {"push_to_hub": True, "hub_model_id": "me/it"}, ("HF_TOKEN is not set",)),
)
"""Found with the tokenizer, the rows or the model at hand, and before the first step."""


def config_of(bad: Bad, place: Path, good: Mapping[str, Any] = CONFIG) -> list[str]:
    """Write the files of a case; returns the arguments of the program."""
    bad.make(place)
    values = {**good, "output_dir": "run", **bad.changes}
    write_config(place / "c.yaml", {key: value for key, value in values.items() if value is not None})
    return ["--config", "c.yaml"]


def check(bad: Bad, ended: Ended) -> None:
    """One message, complete, and nothing of Python's."""
    assert ended.exit_code == 2, ended.errors[-3000:]
    assert "Traceback" not in ended.output + ended.errors
    assert ended.errors.count("error: ") == 1, ended.errors
    for expression in bad.says:
        assert re.search(expression, ended.message), f"{expression} not in\n{ended.message}"


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    """A workplace of the test's own."""
    return Path(shutil.copytree(workplace, tmp_path / "place"))


@pytest.mark.parametrize("bad", BAD_CONFIGS, ids=lambda bad: bad.name)
def test_a_bad_config(bad: Bad, launcher: Launcher, place: Path) -> None:
    check(bad, launcher.run(*config_of(bad, place), directory=place))
    assert not (place / "run").exists()


@pytest.mark.parametrize("bad", BAD_RUNS, ids=lambda bad: bad.name)
def test_a_bad_run(bad: Bad, launcher: Launcher, place: Path) -> None:
    ended = launcher.run(*config_of(bad, place), directory=place)
    check(bad, ended)
    assert "step " not in ended.output
    if (place / "run").exists():
        assert run_json(place / "run")["status"].startswith("failed: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "d.yaml"], ("d.yaml: no such file", "Did you mean c.yaml")),
        (["--config", "broken.yaml"], ("broken.yaml:2: not valid YAML", "Write `key: value` lines")),
        (["--config"], ("has no value", "Write --config FILE.yaml")),
        (["--config", "c.yaml", "--betaa", "0.2"], ("command line", "betaa")),
        ([], ("model", "data", "method", "output_dir", "is required")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line(arguments: list[str], says: tuple[str, ...], launcher: Launcher, place: Path) -> None:
    write_config(place / "c.yaml", CONFIG)
    (place / "broken.yaml").write_text("model: model\n  data: [rows\n")
    check(Bad("", {}, says), launcher.run(*arguments, directory=place))


def test_every_problem_is_said_at_once_and_soon(place: Path, environment: dict[str, str]) -> None:
    """In a process of its own: seconds count from the shell prompt, and torch must not be among them."""
    write_config(place / "c.yaml", {**CONFIG, "dtype": "bf16", "data": "row.jsonl", "learnin_rate": 1, "max_steps": 0})
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(PREFERENCE), "--config", "c.yaml"],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert time.monotonic() - start < 3
    errors = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    check(
        Bad("", {}, ("4 problems", "bf16", "row.jsonl", "learnin_rate", "max_steps: 0")),
        Ended(done.returncode, "", errors),
    )
    assert not re.search(r"\| +(torch|transformers|trl|datasets)$", done.stderr, re.MULTILINE)


def test_a_gradient_rule_that_the_launch_excludes(launcher: Launcher, place: Path) -> None:
    """Refused before the rows are read, which may take hours of token rewards or samples."""
    write_config(place / "c.yaml", {**CONFIG, "gradient_rule": "sam"})
    write_rows(place / "answers.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(9)])
    other = ("--method", "sft", "--data", "answers.jsonl", "--output_dir", "sft")
    for run, program, more in (("run", PREFERENCE, ()), ("sft", SFT, other)):
        compiled = {"ACCELERATE_DYNAMO_BACKEND": "inductor"}
        ended = launcher.run("--config", "c.yaml", *more, directory=place, program=program, environment=compiled)
        check(Bad("", {}, ("gradient_rule: sam", "the launcher's dynamo_backend")), ended)
        assert "data" not in run_json(place / run)


def test_an_adapter_of_another_base(launcher: Launcher, place: Path) -> None:
    write_config(place / "c.yaml", {**CONFIG, "max_steps": 1})
    assert launcher.run("--config", "c.yaml", directory=place).exit_code == 0
    save_model(place / "wide", hidden=48)
    arguments = ("--config", "c.yaml", "--output_dir", "second", "--model", "wide", "--adapter", "run")
    ended = launcher.run(*arguments, directory=place)
    check(
        Bad("", {}, ("the adapter 'run' was trained on another base than 'wide'", "hidden_size", "it calls 'model'")),
        ended,
    )


def test_an_upload_that_nobody_could_load(launcher: Launcher, place: Path) -> None:
    write_config(place / "c.yaml", {**CONFIG, "push_to_hub": True, "hub_model_id": "me/it"})
    ended = launcher.run("--config", "c.yaml", directory=place, environment={"HF_TOKEN": "hf_not_a_token"})
    check(Bad("", {}, ("could not be published", "'model' as base model", "publish it first")), ended)
    assert not (place / "run").exists() and "hf_not_a_token" not in ended.errors


def test_a_mended_run_starts_where_the_failed_one_was(launcher: Launcher, place: Path) -> None:
    """Nothing was trained, so nothing can be lost; once there is anything, the directory is refused."""
    write_config(place / "c.yaml", {**CONFIG, "max_steps": 1, "max_length": 2})
    check(Bad("", {}, ("64 would do",)), launcher.run("--config", "c.yaml", directory=place))
    assert {path.name for path in (place / "run").iterdir()} == {"run.json", "manifest.json"}
    assert "\n" not in run_json(place / "run")["status"]
    write_rows(place / "rows.jsonl", pairs(4))
    assert launcher.run("--config", "c.yaml", "--max_length", "64", directory=place).exit_code == 0
    again = launcher.run("--config", "c.yaml", directory=place)
    check(Bad("", {}, ("already holds a run", "resume: true", "overwrite: true")), again)
