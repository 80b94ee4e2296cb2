"""Speed of the token-reward pass against scoring its four sequences a pair apart, side by side.

    python scripts/benchmark_token_rewards.py
    python scripts/benchmark_token_rewards.py --prompt 64 --completion 256 --rounds 9

Both score the same pairs, under the same two prompts, with the same model and as many sequences a forward pass; they
take turns, round after round, so that a machine that slows down slows both. Printed are the medians over rounds of the
seconds of each, and of the ratio. At the default sizes the status is 1 when a claim is missed: at most 0.65 where the
response is not part of the prompts, at most 1.00 where it is.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alignkit.programs.arguments import StrictParser, non_negative_int, positive_int
from alignkit.programs.entry import run_program

if TYPE_CHECKING:
    from datasets import Dataset

CLAIMS = {False: 0.65, True: 1.0}
"""Largest ratio at prompt 384 and completion 128, by whether the response is part of its prompts."""
CLAIMED_SIZES = (384, 128)


def contrast_rows(options: Any, include_response: bool) -> Dataset:
    """Pairs of random words with their contrast prompts."""
    import random

    from datasets import Dataset, disable_progress_bars

    from alignkit.data.candidates import to_candidate_rows
    from alignkit.data.contrast import load_contrast_prompts
    from benchmark_worker import VOCABULARY, word_tokenizer

    draw = random.Random(0)
    disable_progress_bars()

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(count))

    pairs = [
        {
            "prompt": words(options.prompt),
            "chosen": " " + words(options.completion - 1 + options.spread),
            "rejected": " " + words(options.completion - 1 - options.spread),
        }
        for _ in range(options.pairs)
    ]
    contrast = load_contrast_prompts(include_response=include_response)
    tokenizer = word_tokenizer()
    return to_candidate_rows(Dataset.from_list(pairs), tokenizer, max_length=None, num_candidates=2, contrast=contrast)[
        0
    ]


def passes(options: Any, directory: str, rows: Dataset) -> tuple[Callable[[], Any], Callable[[], Any], str]:
    """The pass as the trainer makes it, the same sequences apart, and how the first packs them."""
    import torch
    from transformers import AutoModelForCausalLM

    from alignkit.models._forward import add_completion_head, score_rows
    from alignkit.references._token_rewards import PassLayout, choose_pass_layout, scored_rows

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    add_completion_head(model)
    chosen = choose_pass_layout("auto", model, rows)
    apart = PassLayout("padded", "", chosen.width, chosen.split_attention)

    def score(layout: PassLayout) -> Callable[[], Any]:
        planned = [scored.candidate_row() for row in rows for scored in scored_rows(row, layout)]
        batch_size = max(options.batch_size * len(planned) // len(rows), 1)
        return lambda: score_rows(
            model, planned, pad_token_id=0, layout=layout.layout, batch_size=batch_size, device="cpu"
        )

    return score(chosen), score(apart), f"{chosen.layout}, {chosen.reason}"


def measure(options: Any, include_response: bool) -> float:
    """Print one line, and return the median ratio."""
    from benchmark_worker import save_model

    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, options.width, options.layers)
        ours, theirs, how = passes(options, directory, contrast_rows(options, include_response))
        rounds = [(seconds(ours), seconds(theirs)) for _ in range(options.rounds + 1)][1:]
    ratios = [a / b for a, b in rounds]
    ratio, claim = statistics.median(ratios), CLAIMS[include_response]
    first, second = (statistics.median(column) for column in zip(*rounds, strict=True))
    name = "response in the prompts" if include_response else "response not in the prompts"
    verdict = f"<= {claim:.2f} {'met' if ratio <= claim else 'MISSED'}" if is_claimed(options) else ""
    spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"{name:<28} {first:7.2f} s {second:7.2f} s apart  {ratio:.2f} {spread}  {verdict}  [{how}]")
    return ratio


def is_claimed(options: Any) -> bool:
    """Whether something is claimed of these sizes."""
    return (options.prompt, options.completion) == CLAIMED_SIZES


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> int:
    """Both cases; status 1 when a claim is missed."""
    parser = StrictParser(*__doc__.split("\n\n", 1))
    sizes = {"prompt": 384, "completion": 128, "pairs": 8, "batch_size": 2, "rounds": 7, "threads": 1}
    for name, default in {**sizes, "width": 192, "layers": 6}.items():
        parser.add_argument(f"--{name}", type=positive_int, default=default)
    parser.add_argument("--spread", type=non_negative_int, default=0, help="chosen is so much longer, rejected shorter")
    options = parser.parse()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    print(
        f"{time.strftime('%Y-%m-%d')}  {platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s); "
        f"{options.layers} layers of width {options.width}, prompt {options.prompt}, completion {options.completion}, "
        f"{options.pairs} pairs, {options.batch_size} a forward pass, {options.rounds} rounds"
    )
    ratios = {include_response: measure(options, include_response) for include_response in CLAIMS}
    return int(is_claimed(options) and any(ratio > CLAIMS[case] for case, ratio in ratios.items()))


if __name__ == "__main__":
    run_program(main)
