"""Make a model smaller so that stock code loads it: ``alignkit prune`` of a checkout.

python scripts/export_pruned.py --adapter runs/pat --output exported
"""

from alignkit.programs.entry import run_program
from alignkit.programs.prune import main

if __name__ == "__main__":
    run_program(main)
