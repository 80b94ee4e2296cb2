"""What a gradient rule costs: processor time of an optimizer step, and memory, against the same step without a rule.

    python scripts/benchmark_gradients.py                       # LoRA on the default model, every rule below
    python scripts/benchmark_gradients.py --parametrization full --rounds 9 --sides glad perpgrad

Runs take turns, round after round, in one process with one thread that keeps its memory, and processor time is counted,
so that what else the machine does disturbs little. Rows are those of scripts/benchmark.py; reference log-probs are in
them, so that a step is one forward and one backward pass of the policy, and nothing else hides what a rule adds. Memory
is the peak of a process of its own for each side, on a wider model and shorter rows, so that what a rule holds shows
beside activations.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.programs.entry import run_program
from benchmark import KEPT_MEMORY

MIB = 2**20
MEMORY_SHAPE = {"width": 768, "prompt": 48, "completion": 16, "steps": 4}


@dataclass(frozen=True)
class Side:
    """A rule with options, and how many times the plain step it may cost."""

    rule: str | None
    options: dict[str, Any]
    claim: float | None = None


SIDES = {
    "none": Side(None, {}),
    "glad": Side("glad", {"rule_targets": "all"}, 2.1),
    "sam": Side("sam", {}, 2.1),
    "asam": Side("asam", {}, 2.1),
    "gsam": Side("gsam", {}, 2.1),
    "random_perturbation": Side("random_perturbation", {}, 2.1),
    "glad_every_4": Side("glad", {"rule_targets": "all", "every_k": 4}, 1.35),
    "perpgrad": Side("perpgrad", {}, 1.05),
    "l2_sp": Side("l2_sp", {}, None),
    "decay_to_init": Side("decay_to_init", {}, 1.05),
}


def rows(options: argparse.Namespace) -> Any:
    """Pairs of random tokens with made-up reference log-probs."""
    from datasets import Dataset

    draw = random.Random(0)
    tokens = lambda n: [draw.randrange(2, options.vocabulary) for _ in range(n)]  # noqa: E731
    pairs = [
        {
            "prompt_ids": tokens(options.prompt),
            "completion_ids": [tokens(options.completion), tokens(options.completion)],
            "scores": [1.0, 0.0],
            "ref_token_logps": [[-7.0] * options.completion] * 2,
        }
        for _ in range(options.batch_size * (options.steps + 1))
    ]
    return Dataset.from_list(pairs)


def save_model(directory: str, options: argparse.Namespace) -> None:
    """A random Qwen3 and a tokenizer that only knows what padding is."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    heads = max(options.width // 32, 2)
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)


def load_model(directory: str) -> Any:
    """The saved model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def build(name: str, directory: str, options: argparse.Namespace) -> Any:
    """A preference trainer on the saved model; its reference never runs, its values are in the rows."""
    from transformers import AutoTokenizer
    from trl import DPOConfig

    from alignkit.gradients._hook import chosen_rule
    from alignkit.parametrizations._lora import lora_config
    from alignkit.parts.method import load_method
    from alignkit.parts.rule import load_rule
    from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer

    side, method = SIDES[name], load_method("dpo")
    is_lora = options.parametrization == "lora"
    adapter = lora_config(r=16, alpha=32, dropout=0.0, target_modules="all-linear") if is_lora else None
    trainer = PreferenceTrainer(
        load_model(directory),
        DPOConfig(
            output_dir=str(Path(directory) / "out"),
            per_device_train_batch_size=options.batch_size,
            max_steps=options.steps + 1,
            logging_steps=options.steps + 1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_length=None,
        ),
        method=method,
        options=method.options(),
        settings=BridgeSettings(layout="padded"),
        gradient_rule=chosen_rule(side.rule, load_rule(side.rule).options(**side.options) if side.rule else None),
        train_dataset=rows(options),
        processing_class=AutoTokenizer.from_pretrained(directory),
        ref_model=None if is_lora else load_model(directory),
        peft_config=adapter,
    )
    return trainer


def timed(name: str, directory: str, options: argparse.Namespace) -> float:
    """Processor seconds of a step; the first one, which allocates, is left out."""
    from transformers import TrainerCallback

    trainer, marks = build(name, directory, options), []

    class Clock(TrainerCallback):
        """Reads the processor time after each step."""

        def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
            """One reading."""
            marks.append(time.process_time())

    trainer.add_callback(Clock())
    trainer.train()
    return (marks[-1] - marks[0]) / options.steps


def peak_memory(sides: list[str], arguments: list[str]) -> dict[str, dict[str, float]]:
    """Of each side, the peak memory of a process that trains it, and the size of what trains, both in MiB."""
    shape = [word for key, value in MEMORY_SHAPE.items() for word in (f"--{key}", str(value))]
    environment = {key: value for key, value in os.environ.items() if key not in KEPT_MEMORY}
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, parse([*arguments, *shape]))
        for name in sides:
            command = [sys.executable, __file__, *arguments, *shape, "--measure_memory", name, directory]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            measured[name] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_memory(name: str, directory: str, options: argparse.Namespace) -> None:
    """Train one side and print its peak as the last line."""
    trainer = build(name, directory, options)
    trainer.train()
    trainable = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    # Not getrusage: its maximum outlives exec, so a child would start from the size of its parent.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"peak": int(peak) / 1024, "trainable": trainable / MIB}))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost of gradient rules against a step without one.")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--parametrization", choices=("lora", "full"), default="lora")
    for name, default in (
        ("rounds", 5), ("steps", 4), ("batch_size", 2), ("prompt", 384), ("completion", 128), ("width", 192),
        ("layers", 4), ("vocabulary", 2048),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no_memory", action="store_true", help="leave out the memory, a process for each side")
    parser.add_argument("--measure_memory", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Time the sides in turn and print a table; status 1 if a claim is missed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    arguments = sys.argv[1:]
    options = parse(arguments)
    if options.measure_memory:
        measure_memory(*options.measure_memory, options)
        return 0
    if not KEPT_MEMORY.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_MEMORY)
    sides = list(dict.fromkeys(["none", *options.sides]))
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, options)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.rounds):
            for name in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                seconds[name].append(timed(name, directory, options))
    memory = {} if options.no_memory else peak_memory(sides, arguments)
    return report(seconds, memory, options)


def report(seconds: dict[str, list[float]], memory: dict[str, dict[str, float]], options: argparse.Namespace) -> int:
    """The table; ratios are medians over rounds of the ratio to the plain step of the same round."""
    print(f"{platform.processor() or platform.machine()}, one thread, {options.parametrization}, {vars(options)}")
    print("| side | s a step | ratio | claim | peak MiB | above none, in copies of what trains |")
    print("| --- " * 6 + "|")
    missed = False
    for name, values in seconds.items():
        ratio = statistics.median(value / plain for value, plain in zip(values, seconds["none"], strict=True))
        claim = SIDES[name].claim
        missed |= claim is not None and ratio > claim
        peak = extra = "-"
        if memory:
            peak = f"{memory[name]['peak']:.0f}"
            extra = f"{(memory[name]['peak'] - memory['none']['peak']) / memory[name]['trainable']:.1f}"
        print(f"| {name} | {statistics.median(values):.3f} | {ratio:.3f} | {claim or '-'} | {peak} | {extra} |")
    return int(missed)


if __name__ == "__main__":
    run_program(main)
