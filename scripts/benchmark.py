"""Training speed of alignkit's preference bridge against trl.DPOTrainer, side by side.

    python scripts/benchmark.py                     # all cases, full fine-tuning, one thread
    python scripts/benchmark.py --cases long_prompt longer_prompt --parametrization lora --rounds 9

A case is run by two processes that live side by side and take turns: some steps of the one, some steps of the other, round
after round, so that a machine that slows down slows both. Model, rows, pairs per batch, optimizer and steps are the same.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.programs import run_program

VOCABULARY = 2048
WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Case:
    """One comparison: row shape, the two sides, and what is claimed of their ratio.

    A side is ``trl`` or a layout of ours (``padded``, ``shared_prefix``, ``flex``, ``auto``).
    """

    prompt: int
    completion: int
    candidates: int
    ours: str
    peer: str
    claim: float | None

    @property
    def bound(self) -> float:
        """Tokens of the padded over tokens of the shared-prefix layout, K(P + C) / (P + KC)."""
        k, p, c = self.candidates, self.prompt, self.completion
        return k * (p + c) / (p + k * c)


CASES = {
    "long_prompt": Case(384, 128, 2, "auto", "trl", 1.35),
    "longer_prompt": Case(1024, 64, 2, "auto", "trl", 1.6),
    "short_prompt": Case(16, 256, 2, "auto", "trl", 0.97),
    "four_candidates": Case(384, 128, 4, "shared_prefix", "padded", 1.9),
    "flex_attention": Case(384, 128, 2, "flex", "trl", None),
    "dense_mask": Case(384, 128, 2, "shared_prefix", "trl", None),
    "padded": Case(384, 128, 2, "padded", "trl", None),
}
DEFAULT_CASES = ["long_prompt", "longer_prompt", "short_prompt", "four_candidates"]


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process needs to build its trainer."""

    side: str
    prompt: int
    completion: int
    candidates: int
    parametrization: str
    batch_size: int
    steps: int
    threads: int
    width: int
    layers: int
    dtype: str
    model_dir: str


# --- worker ----------------------------------------------------------------------------------------------------------


def texts(spec: WorkerSpec) -> list[dict[str, Any]]:
    """Rows of random words, exact in length: a completion gets its EOS from the tokenisation."""
    import random

    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(count))

    rows = []
    for _ in range(spec.batch_size * (spec.steps + WARM_UP_STEPS)):
        completions = [" " + words(spec.completion - 1) for _ in range(spec.candidates)]
        scores = [1.0] + [0.0] * (spec.candidates - 1)
        rows.append({"prompt": words(spec.prompt), "completions": completions, "scores": scores})
    return rows


def word_tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_model(directory: str, width: int, layers: int) -> None:
    """A random Qwen3 of the size asked for; both sides load it."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    heads = max(width // 32, 2)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def build_trainer(spec: WorkerSpec) -> Any:
    """trl.DPOTrainer or our PreferenceTrainer over the same rows."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from alignkit.data.convert import to_candidate_rows
    from alignkit.methods._preference import BridgeSettings, PreferenceTrainer
    from alignkit.methods.method import load_method
    from alignkit.parametrizations.lora import lora_config

    torch.set_num_threads(spec.threads)
    on_gpu = torch.cuda.is_available()
    args = DPOConfig(
        output_dir=str(Path(spec.model_dir) / f"out_{spec.side}"),
        per_device_train_batch_size=spec.batch_size,
        max_steps=spec.steps + WARM_UP_STEPS,
        learning_rate=1e-5,
        logging_steps=spec.steps + WARM_UP_STEPS,
        bf16=spec.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=not on_gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        pad_to_multiple_of=None,
    )
    attention = "flex_attention" if spec.side == "flex" else "sdpa"
    load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        spec.model_dir, dtype=torch.float32, attn_implementation=attention
    )
    peft_config = None
    if spec.parametrization == "lora":
        peft_config = lora_config(r=16, alpha=32, dropout=0.0, target_modules="all-linear")
    rows, tokenizer = Dataset.from_list(texts(spec)), word_tokenizer()
    if spec.side == "trl":
        pairs = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1]} for r in rows]
        return DPOTrainer(
            load(),
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    candidate_rows, _ = to_candidate_rows(rows, tokenizer, max_length=None, num_candidates=None)
    method = load_method("dpo") if spec.candidates == 2 else listwise_method()
    layout = "shared_prefix" if spec.side == "flex" else spec.side
    return PreferenceTrainer(
        load(),
        args,
        method=method,
        options=method.options(),
        settings=BridgeSettings(layout=layout),
        train_dataset=candidate_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        ref_model=None if peft_config else load(),
    )


def listwise_method() -> Any:
    """Cross-entropy of the first candidate over the log-ratios, for rows of more than two candidates."""
    from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items
    from alignkit.methods.method import Method, Paper

    def objective(batch: CandidateBatch, options: Any) -> LossOutput:
        ratios = batch.policy_logps - batch.ref_token_logps.sum(-1)
        values = -(0.1 * ratios).log_softmax(-1)[:, 0]
        return LossOutput((LossTerm("list", values, count_items(batch.completion_mask)["group"]),))

    return Method("listwise", "", object, objective, {}, Paper("", "", ""), "", num_candidates=None)


def work(spec: WorkerSpec) -> None:
    """Answer each line on stdin with one block of steps; end with the peak memory."""
    import resource

    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times the steps after the warm-up."""

        begin = end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step == WARM_UP_STEPS:
                self.begin = time.perf_counter()
            self.end = time.perf_counter()

    clock = Clock()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr; stdout carries the protocol alone
    trainer = build_trainer(spec)
    trainer.add_callback(clock)
    layout = "trl" if spec.side == "trl" else trainer.layout.layout
    print(json.dumps({"layout": layout}), file=replies, flush=True)
    for _ in sys.stdin:
        trainer.train()
        print(json.dumps({"seconds": clock.end - clock.begin}), file=replies, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"peak_mib": peak}), file=replies, flush=True)


# --- controller ------------------------------------------------------------------------------------------------------


class Worker:
    """A process that trains on request."""

    def __init__(self, spec: WorkerSpec, log: Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(spec.threads),
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(spec))]
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
    workers = [Worker(WorkerSpec(side=side, **shared), directory / f"{side}.log") for side in (case.ours, case.peer)]
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
    sides = f"{case.ours}={figures['layout']} : {case.peer}"
    speeds = f"{figures['ours']:8.2f} {figures['peer']:8.2f}"
    memory = f"{figures['memory'][0]:7.0f} {figures['memory'][1]:7.0f}"
    return (
        f"{name:<16} {shape:<13} {sides:<30} {speeds}  {figures['ratio']:5.2f} ({low:.2f}-{high:.2f})  "
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
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    """Run the cases; status 1 when a claim is missed."""
    options = arguments(sys.argv[1:])
    if options.worker is not None:
        work(WorkerSpec(**json.loads(options.worker)))
        return 0
    print(
        f"{time.strftime('%Y-%m-%d')}  {platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s) a process; "
        f"{options.parametrization}, {options.layers} layers of width {options.width}, {options.dtype}, "
        f"{options.batch_size} rows a step, {options.rounds} rounds of {options.steps} steps"
    )
    print(
        f"{'case':<16} {'rows':<13} {'ours : peer':<30} {'rows/s':>8} {'peer':>8}  ratio (min-max)     bound  "
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
