"""Rewards as a run's YAML names them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from alignkit.errors import ConfigError, DataError
from alignkit.parts.options import OptionInfo
from alignkit.parts.reward import Reward, load_reward, reward_names
from alignkit.rewards import check_columns, load_rewards
from tests.conftest import REPOSITORY

MINE = '''
from dataclasses import dataclass

from alignkit.parts.options import option
from alignkit.parts.reward import Reward

LIMIT = 3

def shorter(prompts, completions, limit_column, *, factor=2.0, **columns):
    return [factor * (len(text) < limit) for text, limit in zip(completions, limit_column)]

def strict(prompts, completions):
    return [0.0] * len(prompts)

@dataclass(frozen=True, kw_only=True)
class Starts(Reward):
    """Whether a completion begins with a text."""

    name = "starts"
    summary = "Whether a completion begins with a text."
    fidelity = "ours"

    text: str = option(help="The text.")

    def score(self, sample):
        return float(sample.text.startswith(self.text))
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def problems(*entries: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_rewards(entries)
    return caught.value.problems


def test_entries_of_every_form(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    chosen = load_rewards(
        [
            "gsm8k_annotations",
            {"name": "json_schema", "schema": str(tmp_path / "schema.json"), "weight": 0.25},
            f"{mine}:shorter",
            {"name": f"{mine}:Starts", "text": "x", "weight": 3, "as": "begins"},
            {"name": "json_correct", "column": "wanted"},
        ]
    )
    assert [(one.name, one.weight, one.needs_columns) for one in chosen] == [
        ("gsm8k_annotations", 1.0, ()),
        ("json_schema", 0.25, ()),
        ("shorter", 1.0, ("limit_column",)),
        ("begins", 3.0, ()),
        ("json_correct", 0.5, ("wanted",)),
    ]
    assert [one.function.__name__ for one in chosen] == [one.name for one in chosen]
    columns = {"limit_column": [2, 2], "wanted": [None, None], "trainer_state": object()}
    found = [
        one.function(prompts=["q", "q"], completions=["{}", "x"], completion_ids=[[1], [2]], **columns)
        for one in chosen
    ]
    assert found == [[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [None, None]]


def test_rewards_of_a_file_work_in_another_process(mine: Path) -> None:
    """Which has not loaded the file, and stands in another folder."""
    entries = [f"{mine}:shorter", {"name": f"{mine}:Starts", "text": "x"}]
    (mine.parent / "pickled").write_bytes(pickle.dumps(load_rewards(entries)))
    code = (
        "import pickle, sys; chosen = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print([c.function(prompts=['q'], completions=['x'], limit_column=[2]) for c in chosen])\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(mine.parent / "pickled")]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[[2.0], [1.0]]", "[]"]


def test_every_problem_is_told_at_once(mine: Path) -> None:
    (mine.parent / "broken.py").write_text("import no_such_module\n")
    found = problems(
        "gsm8k_anotations",
        {"name": "json_schema", "shema": 1},
        {"name": "json_format", "fence": "no"},
        {"name": "length", "soft_limit": 9, "hard_limit": 3},
        {"name": "json_valid", "partial": 2},
        {"name": "json_valid", "weight": "much"},
        {"name": "json_valid", "as": 3},
        "json_valid",
        "json_valid",
        4,
        "nowhere.py:f",
        f"{mine.parent / 'broken.py'}:f",
        f"{mine}:shortr",
        f"{mine}:LIMIT",
        f"{mine}:strict",
        {"name": f"{mine}:shorter", "factor": 3},
        f"{mine}:Starts",
        {"name": f"{mine}:Starts", "text": 3},
        {"name": "repetition", "n": True},
    )
    wanted = [
        "rewards[0]: there is no reward 'gsm8k_anotations'. Did you mean gsm8k_annotations?",
        "rewards[1]: json_schema has no option 'shema'. Did you mean schema?",
        "rewards[2]: json_format: fence must be one of forbid, allow, require, not 'no'",
        "rewards[3]: length: hard_limit 3 must be above soft_limit 9",
        "rewards[4]: json_valid: partial must be below 1, not 2",
        "rewards[5]: `weight: 'much'` must be a finite number",
        "rewards[6]: `as: 3` is no name. Write text",
        "rewards[8]: another one is called 'json_valid'. Give one of them a name with `as: ...`",
        "rewards[9]: 4 is no reward.",
        "rewards[10]: there is no file",
        "rewards[11]: ",
        "rewards[12]: ",
        "rewards[13]: LIMIT is int, which cannot be called. Write a function",
        "rewards[14]: ",
        "rewards[15]: ",
        "rewards[16]: starts needs text",
        "rewards[17]: starts: text must be text, not 3",
        "rewards[18]: repetition: n must be a whole number, not True",
    ]
    assert len(found) == len(wanted)
    for problem, beginning in zip(found, wanted, strict=True):
        assert problem.startswith(beginning)
    assert "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')" in found[10]
    assert "mine.py has nothing called 'shortr'. Did you mean" in found[11] and "mine.py:shorter?" in found[11]
    assert "takes prompts, completions; a trainer passes every column" in found[13] and "**columns" in found[13]
    assert "is given the option 'factor'; a function of yours has none" in found[14]


def test_no_reward_at_all_is_a_problem() -> None:
    assert problems()[0].startswith("there is none. Choose from gsm8k_annotations, gsm8k_answer, ")


def test_missing_columns_are_told_together() -> None:
    chosen = load_rewards(["gsm8k_answer", "r3", "json_valid"])
    check_columns(chosen, ["prompt", "answer", "qtype", "reference"])
    with pytest.raises(DataError) as caught:
        check_columns(chosen, ["prompt", "answers"])
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "the reward 'gsm8k_answer' reads the column 'answer'",
        "the reward 'r3' reads the column 'qtype'",
        "the reward 'r3' reads the column 'reference'",
    ]
    assert "did you mean 'answers'? Rename it" in caught.value.problems[0]


@pytest.mark.parametrize("name", reward_names())
def test_every_reward_is_documented_and_its_options_are_declared(name: str) -> None:
    reward = load_reward(name)
    assert issubclass(reward, Reward) and reward.name == name
    assert reward.summary.endswith(".") and len(reward.summary) < 120 and reward.fidelity
    assert reward.__doc__ and not reward.__doc__.startswith(f"{reward.__name__}(")
    hints = get_type_hints(reward)
    for field in dataclasses.fields(reward):
        info = field.metadata["option"]
        assert isinstance(info, OptionInfo) and info.help.endswith(".") and field.name in hints


def test_a_file_in_the_folder_is_all_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import alignkit.rewards

    (tmp_path / "spare.py").write_text(MINE + "\nREWARDS = (Starts,)\n")
    monkeypatch.setattr(alignkit.rewards, "__path__", [*alignkit.rewards.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "alignkit.rewards.spare", raising=False)
    assert "starts" in reward_names()
    (chosen,) = load_rewards([{"name": "starts", "text": "a"}])
    assert chosen.function(prompts=["q"], completions=["ab"]) == [1.0]
    monkeypatch.delitem(sys.modules, "alignkit.rewards.spare")


def test_options_survive_json(tmp_path: Path) -> None:
    """A run records what it was given."""
    entry = json.loads(json.dumps({"name": "json_structure", "keys": {"a": "number"}, "extra_penalty": 1}))
    (chosen,) = load_rewards([entry])
    assert chosen.function(prompts=["q"], completions=['{"a": 1, "b": 2}']) == [0.5]
