"""Make the reference bank of a router training: ``alignkit bank`` of a checkout.

python scripts/build_routing_bank.py router/roma --data questions.jsonl --bank_dir banks/olmoe
"""

from alignkit.programs.bank import main
from alignkit.programs.entry import run_program

if __name__ == "__main__":
    run_program(main)
