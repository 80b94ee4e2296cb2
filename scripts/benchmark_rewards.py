"""How many completions a minute the rewards judge on one core.

    python scripts/benchmark_rewards.py
    python scripts/benchmark_rewards.py --completions 100000 --rounds 5

Made-up completions of about 60 and 400 words: JSON with a worked answer, a fifth of it malformed, and tables of 12 and
80 rows. Processor time of this process, best of the rounds; the JSON parts of RL-Struct are also timed together.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Sequence
from typing import Any

from alignkit.programs.arguments import StrictParser, positive_int
from alignkit.programs.entry import run_program
from alignkit.reports.table import render_table
from alignkit.rewards import ChosenReward, load_rewards

KEYS = {"reasoning": "string", "answer": "integer"}
SCHEMA = {"type": "object", "properties": {key: {"type": kind} for key, kind in KEYS.items()}, "required": list(KEYS)}
JSON_PARTS = [
    "json_valid",
    {"name": "json_structure", "keys": KEYS},
    {"name": "json_schema", "schema": SCHEMA},
    "json_format",
    "json_correct",
]
OTHERS = ["length", "soft_overlong", "repetition", "gsm8k_annotations", "gsm8k_answer", "r3"]
TABLES = [{"name": "table_content", "column": "table"}, {"name": "table_structure", "column": "table"}]
WORDS = {"short": 60, "long": 400}
ROWS = {"short": 12, "long": 80}


def main() -> None:
    """Time every reward on short and on long completions."""
    parser = StrictParser(*__doc__.split("\n\n", 1))
    parser.add_argument("--completions", type=positive_int, default=10_000)
    parser.add_argument("--rounds", type=positive_int, default=3)
    arguments = parser.parse()
    random.seed(0)
    lines = []
    for size in WORDS:
        texts = [answer(WORDS[size]) for _ in range(arguments.completions)]
        tables = [written_table(ROWS[size]) for _ in range(max(1, arguments.completions // 10))]
        timed = [("the five JSON parts", load_rewards(JSON_PARTS), texts)]
        timed += [(one.name, [one], texts) for one in load_rewards([*JSON_PARTS, *OTHERS])]
        timed += [(one.name, [one], tables) for one in load_rewards(TABLES)]
        for name, rewards, completions in timed:
            seconds = min(judged(rewards, completions) for _ in range(arguments.rounds))
            each = seconds / len(completions)
            lines.append([f"{name}, {size}", f"{1e6 * each:.1f}", f"{60 / each:,.0f}"])
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    print(render_table(["reward", "us a completion", "completions a minute"], lines))


def judged(rewards: Sequence[ChosenReward], completions: Sequence[str]) -> float:
    """Seconds of the processor that rewards take over completions."""
    count = len(completions)
    ids = [list(range(len(text) // 4)) for text in completions]
    columns: dict[str, Any] = {
        "answer": ["#### 18"] * count,
        "table": [completions[0]] * count,
        "qtype": ["OPENENDED"] * count,
        "reference": [None] * count,
    }
    start = time.process_time()
    for reward in rewards:
        reward.function(prompts=["How many?"] * count, completions=completions, completion_ids=ids, **columns)
    return time.process_time() - start


def answer(words: int) -> str:
    """A worked answer in JSON, or nearly."""
    steps = []
    while len(steps) < words // 6:
        a, b = random.randrange(100), random.randrange(100)
        steps.append(f"step {len(steps)} gives {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.")
    text = json.dumps({"reasoning": "\n".join(steps), "answer": random.randrange(20)})
    return text if random.random() < 0.8 else text[:-1]


def written_table(rows: int) -> str:
    """A table of six columns."""
    head = "| name | points | wins | losses | rebounds | assists |\n|---|---|---|---|---|---|\n"
    return head + "\n".join("| " + " | ".join(str(random.randrange(50)) for _ in range(6)) + " |" for _ in range(rows))


if __name__ == "__main__":
    run_program(main)
