"""What was drawn and what it was worth, as parquet files of a run: a look at what the model does for its rewards.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``GRPOTrainer._logs``, which holds prompts, completions and advantages of the last draw, of all processes
- trl ``GRPOTrainer._step``, the number of micro-batches that are done
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from alignkit.reports.rollouts import FOLDER, file_name
from alignkit.shapes._policy_metrics import Drawn
from alignkit.storage.durability import write_whole
from alignkit.storage.manifest import Manifest


class RolloutFiles:
    """Writes the completions of the first, of every ``every``-th and of the last step, each step's into its own file.

    A resumed run draws the same completions again and writes the same files, so that none is there twice. What a
    checkpoint had still to use was written when it was drawn.

    Args:
        trainer: An :class:`~alignkit.shapes._policy_trainer.OnlineTrainer`.
        every: Steps between two files.
    """

    def __init__(self, trainer: Any, every: int) -> None:
        self.trainer, self.every = trainer, every

    def __call__(self, drawn: Drawn) -> None:
        """Write a draw if it serves a step whose turn it is."""
        step = self._due()
        if step is None or not self.trainer.is_world_process_zero():
            return
        run = Path(self.trainer.args.output_dir)
        name = f"{FOLDER}/{file_name(step)}"
        Manifest(run).claim(name)
        (run / FOLDER).mkdir(exist_ok=True)
        content = io.BytesIO()
        pyarrow.parquet.write_table(self._table(step, drawn), content, compression="zstd")
        write_whole(run / name, content.getvalue())

    def _due(self) -> int | None:
        """The first step, of those that the draw serves, whose completions are wanted."""
        trainer = self.trainer
        accumulated, done = trainer.args.gradient_accumulation_steps, trainer.state.global_step
        if trainer._step % accumulated:
            return None  # another draw of the same step
        served = math.ceil(trainer.args.steps_per_generation * trainer.num_iterations / accumulated)
        steps = range(done + 1, min(done + served, trainer.state.max_steps) + 1)
        return next((step for step in steps if step in (1, trainer.state.max_steps) or step % self.every == 0), None)

    def _table(self, step: int, drawn: Drawn) -> pyarrow.Table:
        trainer, count = self.trainer, len(drawn.lengths)
        prompts, completions, advantages = (
            list(trainer._logs[key])[-count:] for key in ("prompt", "completion", "advantages")
        )
        names = trainer.reward_func_names
        parts = {f"rewards/{name}": _numbers(drawn.parts[:, i]) for i, name in enumerate(names)}
        columns = {
            "step": [step] * count,
            "group": [row // drawn.generations for row in range(count)],
            "prompt": [as_text(prompt) for prompt in prompts],
            "completion": [as_text(completion) for completion in completions],
            **parts,
            "reward": _numbers(drawn.rewards),
            "advantage": advantages,
            "length": drawn.lengths.tolist(),
            "truncated": drawn.truncated.tolist(),
        }
        numbers = {name: pyarrow.float64() for name in (*parts, "reward", "advantage")}
        return pyarrow.table({key: pyarrow.array(column, type=numbers.get(key)) for key, column in columns.items()})


def _numbers(values: Any) -> list[float | None]:
    """Rewards, None where there is none."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def as_text(said: str | list[dict[str, Any]]) -> str:
    """A prompt or completion as text that a file can hold: halves of characters are written out.

    Args:
        said: Text, or messages; of these a lone one without tool calls is its content, others follow their roles.
    """
    if isinstance(said, str):
        text = said
    elif len(said) == 1 and isinstance(said[0].get("content"), str) and not said[0].get("tool_calls"):
        text = said[0]["content"]
    else:
        text = "\n\n".join(map(_message, said))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _message(message: dict[str, Any]) -> str:
    content = message.get("content")
    told = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
    calls = message.get("tool_calls")
    called = f"\n{json.dumps(calls, ensure_ascii=False, default=str)}" if calls else ""
    return f"{message.get('role')}: {told}{called}"
