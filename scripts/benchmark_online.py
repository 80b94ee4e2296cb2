"""The update of online RL against trl.GRPOTrainer, side by side: speed and peak memory, without generation.

    python scripts/benchmark_online.py                          # all cases, full fine-tuning, one thread
    python scripts/benchmark_online.py --cases long_prompt --rounds 9 --parametrization lora

A case is run by two processes that live side by side and take turns: some steps of the one, some steps of the other,
round after round, so that a machine that slows down slows both. Both are handed the same completions by a
``rollout_func`` in place of drawing them; a step is everything else: rewards, advantages, the passes of the old policy
and the reference where there are any, forward, backward and optimizer.

Printed are seconds a step (medians over rounds), the median of the ratios of a round with the least and the greatest,
and the bound that the number of tokens sets. On a CPU seconds are those that the process computed, over all of its
threads, so that others on the machine disturb less; ``--wall`` takes the clock on the wall, as a GPU always does.
Where memory is claimed, two more processes do two steps each: it is how far the resident set rose above what it was
when the trainer stood ready (the kernel's high-water mark, reset there), on a GPU the peak of its allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignkit.programs.entry import run_program
from benchmark import KEPT_MEMORY


@dataclass(frozen=True)
class Side:
    """What one process trains: ``trl`` or a layout of ours, a method with its options, and how."""

    layout: str
    method: str = "grpo"
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    dead: float = 0.0


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        prompt, completion: Lengths in tokens; completions have all lengths from half of it on if ``varied``.
        ours, peer: The two sides; the ratio is the peer's time over ours.
        speed: The least ratio that is claimed, or None.
        memory: The greatest share of the peer's memory that is claimed, or None.
        micro_batches: A step has so many of ``batch_size`` completions.
    """

    prompt: int
    completion: int
    ours: Side
    peer: Side
    speed: float | None = None
    memory: float | None = None
    micro_batches: int = 1
    varied: bool = False


REUSED = {"num_iterations": 2}
CASES = {
    "long_prompt": Case(512, 64, Side("auto"), Side("trl"), 3.5, 0.6),
    "with_reference": Case(
        512, 64, Side("auto", options={"beta": 0.04}, arguments=REUSED),
        Side("trl", options={"beta": 0.04}, arguments=REUSED), 3.5,
    ),
    "torn_groups": Case(512, 64, Side("auto"), Side("trl"), 3.5, micro_batches=4, varied=True),
    "short_prompt": Case(16, 256, Side("auto"), Side("trl"), 0.97),
    "middling_prompt": Case(64, 128, Side("auto"), Side("trl"), 0.97, varied=True),
    "guard": Case(128, 64, Side("auto", "grpo_guard", arguments=REUSED), Side("auto", arguments=REUSED), 1 / 1.03),
    "dead_groups": Case(512, 64, Side("auto", dead=0.5), Side("auto"), 1 / 0.55, micro_batches=4),
}  # fmt: skip
GROUP = 8
VOCABULARY, WARM_UP = 2048, 1


# --- one side, in a process of its own -------------------------------------------------------------------------------


class Buffer:
    """Fixed completions of random tokens, and what they are worth.

    Args:
        case: Their lengths.
        dead: Share of the prompts whose completions are all worth the same.
    """

    def __init__(self, case: dict[str, Any], dead: float) -> None:
        self.case, self.dead, self.worth = case, dead, random.Random(1)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """What TRL's ``rollout_func`` returns; prompts stand ``GROUP`` times each."""
        draw, longest = random.Random(0), self.case["completion"]
        least = longest // 2 if self.case["varied"] else longest

        def tokens(count: int) -> list[int]:
            return [draw.randrange(2, VOCABULARY) for _ in range(count)]

        groups = [tokens(self.case["prompt"]) for _ in range(len(prompts) // GROUP)]
        return {
            "prompt_ids": [ids for ids in groups for _ in range(GROUP)],
            "completion_ids": [[*tokens(draw.randint(least, longest) - 1), 1] for _ in prompts],
            "logprobs": None,
        }

    def reward(self, completions: list[Any], **columns: Any) -> list[float]:
        """Random, and equal in the first prompts of a draw."""
        alike = round(self.dead * len(completions))
        return [0.0 if i < alike else self.worth.random() for i in range(len(completions))]


def training_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """Fields of TRL's GRPOConfig, the same for both sides."""
    case, side = spec["case"], spec["side"]
    return {
        "output_dir": str(Path(spec["model_dir"]) / f"out_{side['layout']}"),
        "num_generations": GROUP,
        "max_completion_length": case["completion"],
        "per_device_train_batch_size": spec["batch_size"],
        "gradient_accumulation_steps": case["micro_batches"],
        "max_steps": spec["steps"] + WARM_UP,
        "learning_rate": 1e-6,
        "logging_steps": spec["steps"] + WARM_UP,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **side["arguments"],
        **(side["options"] if side["layout"] == "trl" else {}),
    }


def build(spec: dict[str, Any]) -> Any:
    """trl.GRPOTrainer or ours over the same completions."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from alignkit.parametrizations._lora import lora_config
    from alignkit.parts.method import load_method
    from alignkit.shapes._policy_trainer import OnlineTrainer, UpdateSettings
    from benchmark_worker import word_tokenizer

    side, lora = spec["side"], spec["parametrization"] == "lora"

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(spec["model_dir"], dtype=torch.float32)

    buffer = Buffer(spec["case"], side["dead"])
    # Ours looks at a prompt before it runs; its length is that of what comes.
    prompts = [{"prompt": " ".join(["w5"] * spec["case"]["prompt"])}] * 256
    shared = {
        "args": GRPOConfig(**training_arguments(spec), use_cpu=not torch.cuda.is_available()),
        "reward_funcs": buffer.reward,
        "rollout_func": buffer,
        "train_dataset": Dataset.from_list(prompts),
        "processing_class": word_tokenizer(),
        "peft_config": lora_config(r=16, alpha=32, dropout=0.0, target_modules="all-linear") if lora else None,
    }
    if side["layout"] == "trl":
        return GRPOTrainer(load(), **shared)
    method = load_method(side["method"])
    chosen = method.options(**side["options"])
    reference = load() if "reference" in method.needs(chosen) and not lora else None
    layout = UpdateSettings(layout=side["layout"])
    return OnlineTrainer(load(), method=method, options=chosen, settings=layout, ref_model=reference, **shared)


def held_mib(name: str) -> float:
    """A figure of this process's memory: ``VmRSS``, what it holds, or ``VmHWM``, the most it has held."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


def work(spec: dict[str, Any]) -> None:
    """Answer each line on stdin with the seconds of one block of steps; end with the peak memory."""
    import torch
    from transformers import TrainerCallback

    now = time.perf_counter if spec["wall"] or torch.cuda.is_available() else time.process_time

    class Clock(TrainerCallback):
        """Times the steps after the warm-up."""

        begin = end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            """Read the clock."""
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.begin, self.end = (now(), 0.0) if state.global_step == WARM_UP else (self.begin, now())

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr; stdout carries the protocol alone
    torch.set_num_threads(spec["threads"])
    trainer, clock = build(spec), Clock()
    trainer.add_callback(clock)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = held_mib("VmRSS")
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for _ in sys.stdin:
        trainer.train()
        print(json.dumps({"seconds": clock.end - clock.begin}), file=replies, flush=True)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else held_mib("VmHWM") - before
    whole = peak if on_gpu else held_mib("VmHWM")
    print(json.dumps({"mib": peak, "whole": whole}), file=replies, flush=True)


# --- both sides ------------------------------------------------------------------------------------------------------


class Worker:
    """A process that trains on request."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
        # Memory is compared where blocks are handed back, time where they are kept (see benchmark.py).
        environment |= {} if spec["measures_memory"] else KEPT_MEMORY
        environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
        command = [sys.executable, __file__, "--worker", json.dumps(spec)]
        self.log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment
        )

    def ready(self) -> None:
        """Wait until the trainer is built."""
        self._reply()

    def block(self) -> float:
        """Seconds of one block of steps."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._reply()["seconds"]

    def close(self) -> dict[str, float]:
        """End the process; returns its memory, MiB."""
        self.process.stdin.close()
        found = self._reply()
        self.process.wait()
        return found

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-8:])
            raise RuntimeError(f"a worker ended early:\n{tail}")
        return json.loads(line)


def workers(case: Case, options: argparse.Namespace, folder: Path, **changes: Any) -> list[Worker]:
    """The processes of both sides, ours first, ready to train."""
    sizes = {key: vars(options)[key] for key in ("parametrization", "batch_size", "steps", "threads", "wall")}
    shared = {"case": asdict(case), "model_dir": str(folder), "measures_memory": False, **sizes, **changes}
    sides = (case.ours, case.peer)
    pair = [Worker({"side": asdict(side), **shared}, folder / f"{i}.log") for i, side in enumerate(sides)]
    for worker in pair:
        worker.ready()
    return pair


def compare(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one case and return its figures."""
    pair = workers(case, options, folder)
    rounds = [[worker.block() for worker in pair] for _ in range(options.rounds)]
    for worker in pair:
        worker.close()
    memory = []
    if case.memory is not None:
        for worker in workers(case, options, folder, measures_memory=True, steps=1):
            worker.block()
            memory.append(worker.close())
    ratios = [theirs / ours for ours, theirs in rounds]
    return {
        "seconds": [statistics.median(r[i] for r in rounds) / options.steps for i in (0, 1)],
        "ratio": statistics.median(ratios),
        "spread": (min(ratios), max(ratios)),
        "memory": memory,
    }


def report(name: str, case: Case, figures: dict[str, Any]) -> tuple[str, bool]:
    """One line of the table, and whether what is claimed holds."""
    p, c = case.prompt, case.completion
    met, claims, memory = True, [], "-"
    if case.speed is not None:
        met = figures["ratio"] >= case.speed
        claims.append(f">= {case.speed:.2f} {'met' if met else 'MISSED'}")
    if case.memory is not None:
        share = figures["memory"][0]["mib"] / figures["memory"][1]["mib"]
        memory = " : ".join(f"{side['mib']:.0f} (of {side['whole']:.0f})" for side in figures["memory"])
        memory = f"{share:.2f} = {memory}"
        claims.append(f"memory <= {case.memory:.2f} {'met' if share <= case.memory else 'MISSED'}")
        met = met and share <= case.memory
    ours, theirs = (
        f"{side.method} {side.layout}{f' {side.dead:.0%} dead' if side.dead else ''}" for side in (case.ours, case.peer)
    )
    low, high = figures["spread"]
    seconds = " ".join(f"{value:7.2f}" for value in figures["seconds"])
    line = (
        f"{name:<16} {f'{p}/{c} x{case.micro_batches}':<11} {f'{ours} : {theirs}':<34} {seconds}  "
        f"{figures['ratio']:5.2f} ({low:.2f}-{high:.2f})  {GROUP * (p + c) / (p + GROUP * c):5.2f}  "
        f"{memory:<34} {', '.join(claims)}"
    )
    return line, met


def arguments(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parametrization", choices=("full", "lora"), default="full")
    parser.add_argument("--batch_size", type=int, default=GROUP, help="completions a micro-batch")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--wall", action="store_true", help="time by the clock on the wall on a CPU too")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    """Run the cases; status 1 when a claim is missed."""
    options = arguments(sys.argv[1:])
    if options.worker is not None:
        work(options.worker)
        return 0
    from benchmark_worker import save_model

    print(
        f"{time.strftime('%Y-%m-%d')}  {platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s); "
        f"{options.parametrization}, {options.layers} layers of width {options.width}, float32, {GROUP} completions a "
        f"prompt, {options.batch_size} a micro-batch, {options.rounds} rounds of {options.steps} steps"
    )
    print(
        f"{'case':<16} {'rows':<11} {'ours : peer':<34} {'s/step':>7} {'peer':>7}  ratio (min-max)     bound  "
        f"{'memory, MiB (of the process)':<34} claims"
    )
    missed = 0
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            save_model(folder, options.width, options.layers)
            line, met = report(name, CASES[name], compare(CASES[name], options, Path(folder)))
        print(line, flush=True)
        missed += not met
    return int(missed > 0)


if __name__ == "__main__":
    run_program(main)
