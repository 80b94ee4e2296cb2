"""Tools and environments reach TRL's trainer, and what a model cannot be told of is refused before it is loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trl.chat_template_utils import qwen3_chat_template

from alignkit.errors import ConfigError
from alignkit.rewards import file_function
from alignkit.shapes._policy import check_prompts, check_tools
from tests.online import make
from tests.supervised import tokenizer
from tests.trainers import logged

CODE = '''
def double(number: int) -> int:
    """Double a number.

    Args:
        number: What to double.

    Returns:
        Twice as much.
    """
    return 2 * number


def undescribed(number):
    return number


class Counter:
    """Counts the calls."""

    def reset(self, **row):
        self.calls = 0
        return f"Count to {row['answer']}."

    def count(self) -> int:
        """Count one more.

        Returns:
            The number so far.
        """
        self.calls += 1
        return self.calls

    def get_reward(self) -> float:
        return float(self.calls)
'''


@pytest.fixture
def places(tmp_path: Path) -> str:
    """A file of tools, up to the name in it."""
    (tmp_path / "tools.py").write_text(CODE)
    return f"{tmp_path / 'tools.py'}:"


def config(**keys: Any) -> Any:
    return SimpleNamespace(**{"model": "m", "tools": [], "environment": None, "chat_template_kwargs": None} | keys)


def with_tools() -> Any:
    """The tokenizer with a template that knows tools, a copy that may be changed."""
    own = copy.deepcopy(tokenizer())
    own.chat_template = qwen3_chat_template
    return own


def test_a_template_without_tools_is_refused(places: str) -> None:
    with pytest.raises(ConfigError, match="`tools`: the chat template of m cannot write a call"):
        check_tools(config(tools=[f"{places}double"]), tokenizer())
    check_tools(config(), tokenizer())


def test_a_template_whose_calls_nobody_reads_is_refused(places: str) -> None:
    own = with_tools()
    own.chat_template += "{# ours #}"
    with pytest.raises(ConfigError, match="`environment`: TRL does not know how calls of tools are read"):
        check_tools(config(environment=f"{places}Counter"), own)


def test_a_function_that_says_too_little_of_itself_is_refused(places: str) -> None:
    with pytest.raises(ConfigError, match="undescribed cannot be described to a model"):
        check_tools(config(tools=[f"{places}undescribed"]), with_tools())


def test_tools_need_conversations(places: str) -> None:
    args: Any = SimpleNamespace(generation_batch_size=2, num_generations=2)
    rows = Dataset.from_list([{"prompt": "plain"}])
    with pytest.raises(ConfigError, match="Write apply_chat_template: true"):
        check_prompts(config(tools=[f"{places}double"]), args, rows)


def test_environment_gives_prompts_and_rewards_and_its_tools_are_offered(places: str, tmp_path: Path) -> None:
    talks = [{"prompt": [{"role": "user", "content": f"Go {i}. "}], "answer": str(i)} for i in range(4)]
    trainer = make(
        tmp_path / "run",
        train_dataset=Dataset.from_list(talks),
        processing_class=with_tools(),
        tools=[file_function(f"{places}double")],
        environment_factory=file_function(f"{places}Counter"),
        max_steps=1,
        max_completion_length=4,
    )
    trainer.train()
    assert logged(trainer, "tools/call_frequency") == [0.0]
    assert logged(trainer, "rewards/Counter/mean") == [0.0] and logged(trainer, "reward")[0] > 0
    assert {tool.__name__ for tool in trainer.tools} == {"double", "count"}
    shown = json.dumps(list(trainer._logs["prompt"]))
    assert "Count to 1." in shown and "Count to 3." in shown
