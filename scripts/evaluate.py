"""Evaluate a model or an adapter on held-out preference rows: ``alignkit evaluate`` of a checkout.

python scripts/evaluate.py --model Qwen/Qwen3-0.6B --data heldout.jsonl
"""

from alignkit.programs.entry import run_program
from alignkit.programs.evaluate import main

if __name__ == "__main__":
    run_program(main)
