"""The online program, with completions that do not depend on the process layout; started by ``accelerate launch``.

Completions are drawn as ever, the likeliest by ``top_k: 1``, and written down; trained on is what a function of the
prompt gives in their place, since what is likeliest would be the same for all completions of a prompt. Every process
writes ``process_<rank>.json`` into the working directory.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from alignkit.config import parse_program_arguments
from alignkit.programs.entry import run_program

LONGEST = 12


def stand_ins(prompts: list[list[int]], generations: int) -> list[list[int]]:
    """Pieces of the prompts, of different lengths."""
    found = []
    for i, prompt in enumerate(prompts):
        draw = random.Random(f"{prompt} {i % generations}")
        first = draw.randrange(len(prompt) - LONGEST)
        found.append(prompt[first : first + draw.randint(3, LONGEST)])
    return found


def half_without_spread(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward under which the completions of about every second prompt are all worth the same."""
    dead = [random.Random(f"{prompt}!").random() < 0.5 for prompt in map(str, prompts)]
    return [0.1 if is_dead else len(set(str(text))) / 8 for is_dead, text in zip(dead, completions, strict=True)]


def main() -> None:
    """One run, and what this process has to say of it."""
    loaded = parse_program_arguments("online", sys.argv[1:])
    from alignkit.runs.python import train_online
    from alignkit.shapes._policy_trainer import OnlineTrainer

    draw, drawn = OnlineTrainer._generate_single_turn, []

    def drawn_and_replaced(self: Any, prompt_ids: list[list[int]], *more: Any) -> Any:
        likeliest, logps = draw(self, prompt_ids, *more)
        drawn.extend([self.state.global_step, *pair] for pair in zip(prompt_ids, likeliest, strict=True))
        return stand_ins(prompt_ids, self.num_generations), logps

    OnlineTrainer._generate_single_turn = drawn_and_replaced
    trainer = train_online(loaded).trainer
    found = {
        "drawn": drawn,
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        "memory": {key: value.tolist() for key, value in trainer.rollouts.memory.items()},
    }
    Path(f"process_{trainer.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_program(main)
