"""Give every completion token a reward: ``alignkit score`` of a checkout.

python scripts/token_rewards.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --output rewarded.jsonl
"""

from alignkit.programs.entry import run_program
from alignkit.programs.score import main

if __name__ == "__main__":
    run_program(main)
