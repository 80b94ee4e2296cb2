"""Router training: move the routing of a mixture of experts towards that of prompts which it already solves.

    accelerate launch trainers/router.py --config router/roma --data rows.jsonl
    accelerate launch --config_file configs/accelerate/zero2.yaml trainers/router.py --config my_run.yaml

``--help`` lists every key; ``--print_config`` shows each value and where it comes from. The run itself reads top to
bottom in ``alignkit/runs/run.py``.
"""

import sys

from alignkit.config import parse_program_arguments
from alignkit.programs.entry import run_program


def main() -> None:
    """One run, from the command line to the model card."""
    loaded = parse_program_arguments("router", sys.argv[1:])

    # Torch and the Hugging Face libraries are imported here, once the configuration is known to be right.
    from alignkit.runs.python import train_router

    train_router(loaded)


if __name__ == "__main__":
    run_program(main)
