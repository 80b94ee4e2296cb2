"""Train a model on lines."""

import sys

from alignkit.config import parse_program_arguments
from alignkit.programs.entry import run_program


def main() -> None:
    """One run, from the command line to the model card."""
    loaded = parse_program_arguments("spare", sys.argv[1:])
    from alignkit.runs.run import train

    train(loaded)


if __name__ == "__main__":
    run_program(main)
