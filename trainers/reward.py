"""Reward models: train a model to give answers numbers, higher ones to better answers.

    accelerate launch trainers/reward.py --config reward/bradley_terry --data rows.jsonl
    accelerate launch --config_file configs/accelerate/zero2.yaml trainers/reward.py --config my_run.yaml

``--help`` lists every key; ``--print_config`` shows each value and where it comes from. The run itself reads top to
bottom in ``alignkit/runs/run.py``.
"""

import sys

from alignkit.config import parse_program_arguments
from alignkit.programs.entry import run_program


def main() -> None:
    """One run, from the command line to the model card."""
    loaded = parse_program_arguments("reward", sys.argv[1:])

    # Torch and the Hugging Face libraries are imported here, once the configuration is known to be right.
    from alignkit.runs.python import train_reward

    train_reward(loaded)


if __name__ == "__main__":
    run_program(main)
