"""Compare two runs step by step: ``alignkit compare`` of a checkout.

python scripts/compare_runs.py runs/one_process runs/two_processes
"""

from alignkit.programs.compare import main
from alignkit.programs.entry import run_program

if __name__ == "__main__":
    run_program(main)
