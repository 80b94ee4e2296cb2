"""Training speed of alignkit's preference bridge against trl.DPOTrainer, side by side.

    python scripts/benchmark.py                     # all cases, full fine-tuning, one thread
    python scripts/benchmark.py --cases long_prompt longer_prompt --parametrization lora --rounds 9

A case is run by two processes that live side by side and take turns: some steps of the one, some steps of the other,
round after round, so that a machine that slows down slows both. Model, rows, pairs per batch, optimizer and steps are
the same.
Printed are the medians over rounds of steps per second, the median of the ratios, the bound on the ratio that the
number of tokens sets, and the peak memory of each process.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.programs.entry import run_program

WORKER = Path(__file__).with_name("benchmark_worker.py")

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""glibc hands large blocks back to the system, by a threshold that moves as a process goes on. Fetching them again
costs either side up to 15 % of a step, by luck; so both keep theirs."""


@dataclass(frozen=True)
class Case:
    """One comparison: row shape, the two sides, and what is claimed of their ratio.

    A side is ``trl`` or a layout of ours: ``padded``, ``packed``
    for GPUs) or ``auto``. Ours trains ``method``; a peer of ours trains ``peer_method``, TRL always dpo.
    """

    prompt: int
    completion: int
    candidates: int
    ours: str
    peer: str
    claim: float | None
    method: str = "dpo"
    peer_method: str = "dpo"

    @property
    def bound(self) -> float:
        """Tokens of the padded over tokens of the shared-prefix layout, K(P + C) / (P + KC)."""
        k, p, c = self.candidates, self.prompt, self.completion
        return k * (p + c) / (p + k * c)


CASES = {
    "long_prompt": Case(384, 128, 2, "auto", "trl", 1.35),
    "longer_prompt": Case(1024, 64, 2, "auto", "trl", 1.6),
    "short_prompt": Case(16, 256, 2, "auto", "trl", 0.97),
    "adpo_four": Case(384, 128, 4, "packed", "padded", 1.9, "adpo", "adpo"),
    "d2o_seven": Case(384, 128, 8, "packed", "padded", 2.5, "d2o", "d2o"),
    "treg_step": Case(384, 128, 2, "packed", "packed", 1 / 1.05, "treg", "dpo"),
    "dense_mask": Case(384, 128, 2, "packed", "trl", None),
    "padded": Case(384, 128, 2, "padded", "trl", None),
}
DEFAULT_CASES = ["long_prompt", "longer_prompt", "short_prompt", "adpo_four", "d2o_seven", "treg_step"]


class Worker:
    """A process that trains on request."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"} | KEPT_MEMORY
        command = [sys.executable, str(WORKER), json.dumps(spec)]
        self.log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment
        )
        self.layout = self._reply()["layout"]

    def block(self) -> float:
        """Seconds of one block of steps."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._reply()["seconds"]

    def close(self) -> float:
        """End the process; returns its peak memory, MiB."""
        self.process.stdin.close()
        return self._reply()["peak_mib"]

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-8:])
            raise RuntimeError(f"a worker ended early:\n{tail}")
        return json.loads(line)


def compare(case: Case, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run one case and return its figures."""
    shared = {
        "prompt": case.prompt,
        "completion": case.completion,
        "candidates": case.candidates,
        "parametrization": options.parametrization,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "threads": options.threads,
        "width": options.width,
        "layers": options.layers,
        "dtype": options.dtype,
        "model_dir": str(directory),
    }
    sides = ((case.ours, case.method), (case.peer, case.peer_method))
    workers = [
        Worker({"side": side, "method": method, **shared}, directory / f"{i}.log")
        for i, (side, method) in enumerate(sides)
    ]
    rounds = [[worker.block() for worker in workers] for _ in range(options.rounds)]
    peaks = [worker.close() for worker in workers]
    pairs = options.batch_size * options.steps
    ratios = [theirs / ours for ours, theirs in rounds]
    return {
        "layout": workers[0].layout,
        "ours": pairs / statistics.median(r[0] for r in rounds),
        "peer": pairs / statistics.median(r[1] for r in rounds),
        "ratio": statistics.median(ratios),
        "spread": (min(ratios), max(ratios)),
        "memory": peaks,
    }


def report(name: str, case: Case, figures: dict[str, Any]) -> str:
    """One line of the table."""
    claim = "" if case.claim is None else f">= {case.claim:.2f} {'met' if figures['ratio'] >= case.claim else 'MISSED'}"
    low, high = figures["spread"]
    shape = f"{case.prompt}/{case.completion} K={case.candidates}"
    ours = case.ours if case.ours == figures["layout"] else f"{case.ours}={figures['layout']}"
    peer = case.peer if case.peer == "trl" else f"{case.peer_method} {case.peer}"
    sides = f"{case.method} {ours} : {peer}"
    speeds = f"{figures['ours']:8.2f} {figures['peer']:8.2f}"
    memory = f"{figures['memory'][0]:7.0f} {figures['memory'][1]:7.0f}"
    return (
        f"{name:<16} {shape:<13} {sides:<40} {speeds}  {figures['ratio']:5.2f} ({low:.2f}-{high:.2f})  "
        f"{case.bound:5.2f}  {memory}  {claim}"
    )


def arguments(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES)
    parser.add_argument("--parametrization", choices=("full", "lora"), default="full")
    parser.add_argument("--batch_size", type=int, default=2, help="rows (pairs or lists) a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def main() -> int:
    """Run the cases; status 1 when a claim is missed."""
    options = arguments(sys.argv[1:])
    from benchmark_worker import save_model

    print(
        f"{time.strftime('%Y-%m-%d')}  {platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s); "
        f"{options.parametrization}, {options.layers} layers of width {options.width}, {options.dtype}, "
        f"{options.batch_size} rows a step, {options.rounds} rounds of {options.steps} steps"
    )
    print(
        f"{'case':<16} {'rows':<13} {'ours : peer':<40} {'rows/s':>8} {'peer':>8}  ratio (min-max)     bound  "
        f"{'MiB':>7} {'peer':>7}  claim"
    )
    missed = 0
    for name in options.cases:
        with tempfile.TemporaryDirectory() as directory:
            save_model(directory, options.width, options.layers)
            figures = compare(CASES[name], options, Path(directory))
        print(report(name, CASES[name], figures), flush=True)
        missed += CASES[name].claim is not None and figures["ratio"] < CASES[name].claim
    return int(missed > 0)


if __name__ == "__main__":
    run_program(main)
