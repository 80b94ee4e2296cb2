"""Merge an adapter into its base model: ``alignkit merge`` of a checkout.

python scripts/merge_adapter.py --adapter runs/first --output runs/first-merged
"""

from alignkit.programs.entry import run_program
from alignkit.programs.merge import main

if __name__ == "__main__":
    run_program(main)
