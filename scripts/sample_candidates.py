"""Sample responses to every prompt as candidate lists: ``alignkit sample`` of a checkout.

python scripts/sample_candidates.py --model Qwen/Qwen3-0.6B --data negatives.jsonl --output samples.jsonl
"""

from alignkit.programs.entry import run_program
from alignkit.programs.sample import main

if __name__ == "__main__":
    run_program(main)
