"""The processes that scripts/benchmark.py compares: each builds one trainer and runs blocks of steps on request.

Started by scripts/benchmark.py with a :class:`WorkerSpec` as JSON; answers each line on stdin with one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from alignkit.data.candidates import to_candidate_rows
from alignkit.models.wrapping import base_model
from alignkit.parametrizations._lora import lora_config
from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from alignkit.shapes._tokens import SupervisedTrainer
from benchmark_rows import GSM_TINY, gsm8k_examples, gsm8k_pairs, pairs_of_words, tokenizer_of
from validate_memory import TrackedAllocations

WARM_UP_STEPS = 1


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to build its trainer; ``side`` is ``trl`` or a layout of ours, ``method`` ours."""

    side: str
    method: str
    source: str
    prompt: tuple[int, int]
    completion: tuple[int, int]
    candidates: int
    parametrization: str
    batch_size: int
    steps: int
    threads: int
    dtype: str
    model_dir: str

    @property
    def num_rows(self) -> int:
        """Of one call of ``train``."""
        return self.batch_size * (self.steps + WARM_UP_STEPS)


def training_arguments(spec: WorkerSpec) -> dict[str, Any]:
    """The same arguments for both sides."""
    return {
        "output_dir": str(Path(spec.model_dir) / f"out_{spec.side}"),
        "per_device_train_batch_size": spec.batch_size,
        "max_steps": spec.steps + WARM_UP_STEPS,
        "learning_rate": 1e-5,
        "logging_steps": spec.steps + WARM_UP_STEPS,
        "bf16": spec.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "pad_to_multiple_of": None,
        # The rows of a batch decide how much is padding, so both sides see the same batches.
        "train_sampling_strategy": "sequential",
    }


def load(spec: WorkerSpec) -> Any:
    """The model both sides train."""
    path = spec.model_dir if spec.source == "words" else GSM_TINY
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def build_trainer(spec: WorkerSpec) -> Any:
    """A trainer of TRL's or of ours over the same rows."""
    peft_config = None
    if spec.parametrization == "lora":
        peft_config = lora_config(r=16, alpha=32, dropout=0.0, target_modules="all-linear")
    tokenizer = tokenizer_of(spec.source)
    common = {"processing_class": tokenizer, "peft_config": peft_config}
    if spec.source == "gsm8k_sft":
        return _supervised(spec, Dataset.from_list(gsm8k_examples(spec.num_rows, tokenizer)), common)
    if spec.source == "gsm8k":
        rows = gsm8k_pairs(spec.num_rows, tokenizer)
    else:
        rows = pairs_of_words(spec.num_rows, tuple(spec.prompt), tuple(spec.completion), spec.candidates)
    return _preference(spec, rows, common)


def _supervised(spec: WorkerSpec, rows: Dataset, common: dict[str, Any]) -> SFTTrainer:
    args = SFTConfig(**training_arguments(spec))
    if spec.side == "trl":
        return SFTTrainer(load(spec), args, train_dataset=rows, **common)
    method = load_method("sft")
    how = {"method": method, "options": method.options(), "layout": spec.side}
    return SupervisedTrainer(load(spec), args, train_dataset=rows, **how, **common)


def _preference(spec: WorkerSpec, rows: list[dict[str, Any]], common: dict[str, Any]) -> DPOTrainer:
    common["args"] = DPOConfig(**training_arguments(spec))
    if spec.side == "trl":
        pairs = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1]} for r in rows]
        return DPOTrainer(load(spec), train_dataset=Dataset.from_list(pairs), **common)
    method, tokenizer = load_method(spec.method), common["processing_class"]
    candidate_rows, _ = to_candidate_rows(
        Dataset.from_list(rows), tokenizer, max_length=None, num_candidates=method.num_candidates
    )
    if "token_rewards" in method.needs(method.options()):
        rewards = [[[0.1] * len(ids) for ids in row] for row in candidate_rows["completion_ids"]]
        candidate_rows = candidate_rows.add_column("token_rewards", rewards)
    return PreferenceTrainer(
        load(spec),
        method=method,
        options=method.options(),
        settings=BridgeSettings(layout=spec.side),
        train_dataset=candidate_rows,
        ref_model=None if common["peft_config"] else load(spec),
        **common,
    )


class Clock(TrainerCallback):
    """Times the steps after the warm-up, in seconds of this process, whatever else the machine does."""

    begin = end = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Read the clock."""
        if state.global_step == WARM_UP_STEPS:
            self.begin = time.process_time()
        self.end = time.process_time()


class TokenCount:
    """Tokens that the policy computes, padding included."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        base_model(model).base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens += kwargs["input_ids"].numel()


def tracked_block(trainer: Any) -> float:
    """Train one block, which is not timed, and return the most bytes of tensors that were alive during it, as MiB."""
    models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) is not None else [])]
    with TrackedAllocations([t for model in models for t in (*model.parameters(), *model.buffers())]) as tracked:
        trainer.train()
    return tracked.peak / 2**20


def work(spec: WorkerSpec) -> None:
    """Say what was built and what memory a first block took, then answer each line on stdin with one block of steps."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr; stdout carries the protocol alone
    torch.set_num_threads(spec.threads)
    trainer, clock = build_trainer(spec), Clock()
    trainer.add_callback(clock)
    layout = "trl" if spec.side == "trl" else trainer.layout.layout
    count = TokenCount(trainer.model)
    peak = tracked_block(trainer)
    print(json.dumps({"layout": layout, "tokens": count.tokens, "peak_mib": peak}), file=replies, flush=True)
    for _ in sys.stdin:
        trainer.train()
        print(json.dumps({"seconds": clock.end - clock.begin}), file=replies, flush=True)


if __name__ == "__main__":
    work(WorkerSpec(**json.loads(sys.argv[1])))
