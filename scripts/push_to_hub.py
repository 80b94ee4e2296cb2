"""Publish an adapter or a model with its card: ``alignkit push`` of a checkout.

python scripts/push_to_hub.py --directory runs/first --repo_id name/my-model --dry_run
"""

from alignkit.programs.entry import run_program
from alignkit.programs.push import main

if __name__ == "__main__":
    run_program(main)
