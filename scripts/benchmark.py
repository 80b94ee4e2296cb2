"""Training speed and memory of alignkit against TRL's trainers, side by side.

    python scripts/benchmark.py                                # all cases, full fine-tuning, one thread
    python scripts/benchmark.py --cases long_prompt gsm8k --parametrization lora --rounds 9
    python scripts/benchmark.py --device cuda --suite real     # large models on a GPU; see benchmark_cuda.py

A case is run by two processes that live side by side and take turns: some steps of the one, some steps of the other,
round after round, so that a machine that slows down slows both; what counts is the time of the process, not of the
clock. Model, rows, batches, optimizer and steps are the same.
Printed are the medians over rounds of rows per second, the median of the ratios, the ratio of the tokens that the
policies of both sides compute, padding included, and the most bytes of tensors that were alive at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.programs.entry import run_program

WORKER = Path(__file__).with_name("benchmark_worker.py")

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""glibc hands large blocks back to the system, by a threshold that moves as a process goes on. Fetching them again
costs either side up to 15 % of a step, by luck; so both keep theirs."""


@dataclass(frozen=True)
class Rows:
    """What is trained on.

    Attributes:
        source: One of ``benchmark_rows.SOURCES``.
        prompt: Fewest and most tokens of a prompt of words.
        completion: Of each completion.
        candidates: Completions a prompt.
        batch_size: Rows a step.
    """

    source: str = "words"
    prompt: tuple[int, int] = (0, 0)
    completion: tuple[int, int] = (0, 0)
    candidates: int = 2
    batch_size: int = 2

    def __str__(self) -> str:
        if self.source != "words":
            return self.source
        spans = ["-".join(map(str, dict.fromkeys(span))) for span in (self.prompt, self.completion)]
        return f"{spans[0]}/{spans[1]} K={self.candidates}"


@dataclass(frozen=True)
class Case:
    """One comparison: the rows, the two sides, and what is claimed of their ratio.

    A side is ``trl`` or a layout of ours: ``padded``, ``packed`` or ``auto``. Ours trains ``method``; a peer of ours
    trains ``peer_method``, TRL always dpo or sft.

    Attributes:
        claim: The least ratio.
        of_tokens: Whether the claim is a share of the ratio of tokens.
    """

    rows: Rows
    claim: float
    of_tokens: bool = False
    ours: str = "auto"
    peer: str = "trl"
    method: str = "dpo"
    peer_method: str = "dpo"

    def least(self, figures: dict[str, Any]) -> float:
        """The least ratio that meets the claim."""
        return self.claim * figures["bound"] if self.of_tokens else self.claim

    def missed(self, figures: dict[str, Any]) -> list[str]:
        """What is claimed and is not so; memory is never more than TRL's."""
        found = ["speed"] if figures["ratio"] < self.least(figures) else []
        ours, peer = figures["memory"]
        return found + (["memory"] if self.peer == "trl" and ours > peer else [])


def _words(prompt: int, completion: int, candidates: int = 2) -> Rows:
    return Rows("words", (prompt, prompt), (completion, completion), candidates)


CASES = {
    "long_prompt": Case(_words(384, 128), 1.6),
    "longer_prompt": Case(_words(1024, 64), 1.95),
    "short_prompt": Case(_words(16, 256), 1.0),
    "gsm8k": Case(Rows("gsm8k", batch_size=8), 0.9, of_tokens=True),
    "hh_like": Case(Rows("words", (20, 200), (5, 150), batch_size=8), 0.9, of_tokens=True),
    "sft": Case(Rows("gsm8k_sft", batch_size=8), 0.9, of_tokens=True, method="sft"),
    "d2o_eight": Case(
        _words(384, 128, 8), 0.92, of_tokens=True, ours="packed", peer="padded", method="d2o", peer_method="d2o"
    ),
    "treg_step": Case(_words(384, 128), 1 / 1.05, ours="packed", peer="packed", method="treg"),
}


class Worker:
    """A process that trains on request."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"} | KEPT_MEMORY
        command = [sys.executable, str(WORKER), json.dumps(spec)]
        self.log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment
        )
        self.built = self._reply()

    def block(self) -> float:
        """Seconds of one block of steps."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._reply()["seconds"]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-8:])
            raise RuntimeError(f"a worker ended early:\n{tail}")
        return json.loads(line)


def compare(case: Case, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run one case and return its figures."""
    names = ("parametrization", "steps", "threads", "dtype")
    shared = asdict(case.rows) | {name: vars(options)[name] for name in names} | {"model_dir": str(directory)}
    sides = ((case.ours, case.method), (case.peer, case.peer_method))
    workers = [
        Worker({"side": side, "method": method, **shared}, directory / f"{i}.log")
        for i, (side, method) in enumerate(sides)
    ]
    rounds = [[worker.block() for worker in workers] for _ in range(options.rounds)]
    for worker in workers:
        worker.close()
    return figures_of([worker.built for worker in workers], rounds, case.rows.batch_size * options.steps)


def figures_of(built: list[dict[str, Any]], rounds: list[list[float]], rows: int) -> dict[str, Any]:
    """The figures of a case.

    Args:
        built: What our worker and its peer said of themselves.
        rounds: Seconds of both, round by round.
        rows: Of a round.
    """
    ratios = [theirs / ours for ours, theirs in rounds]
    ours, peer = built
    return {
        "layout": ours["layout"],
        "ours": rows / statistics.median(r[0] for r in rounds),
        "peer": rows / statistics.median(r[1] for r in rounds),
        "ratio": statistics.median(ratios),
        "spread": (min(ratios), max(ratios)),
        "bound": peer["tokens"] / ours["tokens"],
        "memory": [ours["peak_mib"], peer["peak_mib"]],
    }


def report(name: str, case: Case, figures: dict[str, Any]) -> str:
    """One line of the table."""
    missed = case.missed(figures)
    claim = f">= {case.least(figures):.2f} {'MISSED: ' + ', '.join(missed) if missed else 'met'}"
    low, high = figures["spread"]
    ours = case.ours if case.ours == figures["layout"] else f"{case.ours}={figures['layout']}"
    peer = case.peer if case.peer == "trl" else f"{case.peer_method} {case.peer}"
    sides = f"{case.method} {ours} : {peer}"
    speeds = f"{figures['ours']:8.2f} {figures['peer']:8.2f}"
    memory = f"{figures['memory'][0]:7.1f} {figures['memory'][1]:7.1f}"
    return (
        f"{name:<14} {case.rows!s:<20} {sides:<26} {speeds}  {figures['ratio']:5.2f} ({low:.2f}-{high:.2f})  "
        f"{figures['bound']:6.2f}  {memory}  {claim}"
    )


def arguments(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --suite real")
    parser.add_argument("--suite", choices=("small", "real"), default="small", help="real: models of real shapes")
    parser.add_argument("--tiny", action="store_true", help="--suite real with tiny shapes: tries the code, no claims")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parametrization", choices=("full", "lora"), default="full")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(argv)
    if options.suite == "small" and (options.device == "cuda" or options.tiny):
        parser.error("--device cuda and --tiny belong to --suite real: the small cases are made for a CPU")
    return options


def main() -> int:
    """Run the cases; status 1 when a claim is missed."""
    options = arguments(sys.argv[1:])
    if options.suite == "real":
        import benchmark_cuda

        return benchmark_cuda.main(options.device, tiny=options.tiny)
    from benchmark_rows import GSM8K, GSM_TINY, save_model

    print(
        f"{time.strftime('%Y-%m-%d')}  {platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s); "
        f"{options.parametrization}, {options.layers} layers of width {options.width} (gsm8k, sft: gsm-tiny), "
        f"{options.dtype}, {options.rounds} rounds of {options.steps} steps"
    )
    print(
        f"{'case':<14} {'rows':<20} {'ours : peer':<26} {'rows/s':>8} {'peer':>8}  ratio (min-max)    tokens  "
        f"{'MiB':>7} {'peer':>7}  claim"
    )
    missed = 0
    for name in options.cases:
        case = CASES[name]
        if case.rows.source != "words" and not (GSM8K.is_dir() and GSM_TINY.is_dir()):
            print(f"{name:<14} skipped: needs {GSM8K} and {GSM_TINY}; set ALIGNKIT_SHARED to the folder that has them")
            continue
        with tempfile.TemporaryDirectory() as directory:
            save_model(directory, options.width, options.layers)
            figures = compare(case, options, Path(directory))
        print(report(name, case, figures), flush=True)
        missed += bool(case.missed(figures))
    return int(missed > 0)


if __name__ == "__main__":
    run_program(main)
