"""Supervised fine-tuning: train a model on text, on prompts with completions, or on conversations.

    accelerate launch trainers/sft.py --config sft/lora --model Qwen/Qwen3-0.6B --data rows.jsonl
    accelerate launch --config_file configs/accelerate/zero2.yaml trainers/sft.py --config my_run.yaml

``--help`` lists every key; ``--print_config`` shows each value and where it comes from. The run itself reads top to
bottom in ``alignkit/runs/run.py``.
"""

import sys

from alignkit.config import parse_program_arguments
from alignkit.programs.entry import run_program


def main() -> None:
    """One run, from the command line to the model card."""
    loaded = parse_program_arguments("sft", sys.argv[1:])

    # Torch and the Hugging Face libraries are imported here, once the configuration is known to be right.
    from alignkit.runs.python import train_sft

    train_sft(loaded)


if __name__ == "__main__":
    run_program(main)
