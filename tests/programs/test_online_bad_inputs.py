"""Whatever a user gets wrong ends the online program, too, with one message that says what to write instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignkit.storage.durability import checkpoint_step, complete_checkpoints
from tests.programs.conftest import CONFIG, pairs
from tests.programs.launching import ONLINE, Launcher, run_json
from tests.programs.test_bad_inputs import Bad, check, config_of, rows_in

# One worker runs all of this folder: its programs are forked from one process, and its finished runs made once.
pytestmark = pytest.mark.xdist_group("programs")

PROMPTS = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in pairs(8)]
REWARDS = """
def even(completions, **columns):
    return [float(i % 2) for i in range(len(completions))]

def late(completions, trainer_state, **columns):
    if trainer_state.global_step == 2:
        raise ValueError("no such unit")
    return even(completions)

def nan(completions, **columns):
    return [float("nan") for _ in completions]

def few(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["good" for _ in completions]
"""
GOOD = {
    **CONFIG, "method": "grpo", "data": "prompts.jsonl", "rewards": ["rewards.py:even"], "num_generations": 2,
    "max_completion_length": 4, "save_steps": 1, "max_steps": 3, "num_samples": 0,
}  # fmt: skip


def rewarded(name: str) -> dict[str, Any]:
    """Keys of a run with one of the functions above."""
    return {"rewards": [f"rewards.py:{name}"]}


BAD_CONFIGS = (
    Bad("a reward with a typo", {"rewards": ["repetitoin"]}, ("repetitoin", "Did you mean repetition")),
    Bad("a reward file that is not there", {"rewards": ["reward.py:even"]}, (r"reward\.py",)),
    Bad("a function that is not there", rewarded("odd"), ("odd", r"rewards\.py")),
    Bad("a column the reward reads", {"rewards": ["gsm8k_answer"], "data": "bare.jsonl"}, ("'answer' is missing",),
        rows_in("bare.jsonl", [{"prompt": "w1"}] * 8)),
    Bad("no rewards", {"rewards": None}, ("rewards", "is required")),
    Bad("greedy completions", {"temperature": 0}, ("temperature: 0", "Write a value > 0")),
    Bad("one completion a prompt", {"num_generations": 1}, ("num_generations: 1", "Write a value >= 2")),
    Bad("a method of another program", {"method": "dpo"}, ("method: dpo", "grpo")),
    Bad("a key of preference runs", {"max_length": 64}, ("max_length: 64", "is a key of")),
)  # fmt: skip
"""Found before torch is imported."""

BAD_RUNS = (
    Bad("groups that are torn apart", {"num_generations": 3}, ("num_generations: 3. does not divide the 2",)),
    Bad(
        "held-out groups that are torn apart",
        {"eval_fraction": 0.25, "per_device_eval_batch_size": 3},
        ("per_device_eval_batch_size: 3", "holds 3 completions, and a held-out prompt has 2", "num_generations_eval"),
    ),
    Bad(
        "fewer prompts than a draw",
        {"steps_per_generation": 16},
        ("8 training prompts are fewer than the 16", "steps_per_generation"),
    ),
    Bad("prompts that are all too long", {"max_prompt_length": 1}, ("max_prompt_length",)),
)
"""Found with the tokenizer, the rows or the model at hand, and before the first step."""

BAD_REWARDS = (
    Bad("NaN", rewarded("nan"), ("reward 'nan'", "nan", "completion")),
    Bad("too few rewards", rewarded("few"), ("reward 'few'", "1 reward", "2 completions")),
    Bad("no numbers", rewarded("words"), ("reward 'words'", "good")),
    Bad("an error in step 3", rewarded("late"), ("reward 'late'", "no such unit", "prompt", "completion")),
)
"""Found when the reward is asked."""


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    """A workplace of the test's own, with prompts and rewards."""
    copy = Path(shutil.copytree(workplace, tmp_path / "place"))
    (copy / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PROMPTS))
    (copy / "rewards.py").write_text(REWARDS)
    return copy


@pytest.mark.parametrize("bad", BAD_CONFIGS, ids=lambda bad: bad.name)
def test_a_bad_config(bad: Bad, launcher: Launcher, place: Path) -> None:
    check(bad, launcher.run(*config_of(bad, place, GOOD), directory=place, program=ONLINE))
    assert not (place / "run").exists()


@pytest.mark.parametrize("bad", BAD_RUNS, ids=lambda bad: bad.name)
def test_a_bad_run(bad: Bad, launcher: Launcher, place: Path) -> None:
    ended = launcher.run(*config_of(bad, place, GOOD), directory=place, program=ONLINE)
    check(bad, ended)
    assert "step " not in ended.output
    assert run_json(place / "run")["status"].startswith("failed: ")


@pytest.mark.parametrize("bad", BAD_REWARDS, ids=lambda bad: bad.name)
def test_a_bad_reward(bad: Bad, launcher: Launcher, place: Path) -> None:
    ended = launcher.run(*config_of(bad, place, GOOD), directory=place, program=ONLINE)
    check(bad, ended)
    assert run_json(place / "run")["status"].startswith("failed: ")
    saved = [checkpoint_step(path) for path in complete_checkpoints(place / "run")]
    assert saved == ([1, 2] if bad.name == "an error in step 3" else [])


def test_a_mended_reward_goes_on(launcher: Launcher, place: Path) -> None:
    """Nothing is lost by the error, and what all tests above change a little does work."""
    arguments = config_of(Bad("", rewarded("late"), ()), place, GOOD)
    assert launcher.run(*arguments, directory=place, program=ONLINE).exit_code == 2
    (place / "rewards.py").write_text(REWARDS.replace('raise ValueError("no such unit")', "pass"))
    ended = launcher.run(*arguments, "--resume", directory=place, program=ONLINE)
    assert ended.exit_code == 0, ended.errors[-3000:]
    assert "resuming from run/checkpoint-2" in ended.output
