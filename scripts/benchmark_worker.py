"""The processes that scripts/benchmark.py compares: each builds one trainer and runs blocks of steps on request.

Started by scripts/benchmark.py with a :class:`WorkerSpec` as JSON; answers each line on stdin with one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, TrainerCallback
from trl import DPOConfig, DPOTrainer

from alignkit.data.candidates import to_candidate_rows
from alignkit.parametrizations._lora import lora_config
from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer

VOCABULARY = 2048
WARM_UP_STEPS = 1


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process needs to build its trainer; ``side`` is ``trl`` or a layout of ours, ``method`` ours."""

    side: str
    method: str
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


def texts(spec: WorkerSpec) -> list[dict[str, Any]]:
    """Rows of random words, exact in length: a completion gets its EOS from the tokenisation."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(count))

    rows = []
    for _ in range(spec.batch_size * (spec.steps + WARM_UP_STEPS)):
        completions = [" " + words(spec.completion - 1) for _ in range(spec.candidates)]
        scores = [1.0] * (spec.candidates - 1) + [0.0]
        rows.append({"prompt": words(spec.prompt), "completions": completions, "scores": scores})
    return rows


def word_tokenizer() -> Any:
    """One token a word."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_model(directory: str, width: int, layers: int) -> None:
    """A random Qwen3 of the size asked for; both sides load it."""
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


def training_arguments(spec: WorkerSpec) -> DPOConfig:
    """The same arguments for both sides."""
    return DPOConfig(
        output_dir=str(Path(spec.model_dir) / f"out_{spec.side}"),
        per_device_train_batch_size=spec.batch_size,
        max_steps=spec.steps + WARM_UP_STEPS,
        learning_rate=1e-5,
        logging_steps=spec.steps + WARM_UP_STEPS,
        bf16=spec.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        pad_to_multiple_of=None,
    )


def load(spec: WorkerSpec) -> Any:
    """The model both sides train."""
    return AutoModelForCausalLM.from_pretrained(spec.model_dir, dtype=torch.float32)


def build_trainer(spec: WorkerSpec) -> DPOTrainer:
    """trl.DPOTrainer or our PreferenceTrainer over the same rows."""
    peft_config = None
    if spec.parametrization == "lora":
        peft_config = lora_config(r=16, alpha=32, dropout=0.0, target_modules="all-linear")
    tokenizer = word_tokenizer()
    common = {"args": training_arguments(spec), "processing_class": tokenizer, "peft_config": peft_config}
    rows = texts(spec)
    if spec.side == "trl":
        pairs = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1]} for r in rows]
        return DPOTrainer(load(spec), train_dataset=Dataset.from_list(pairs), **common)
    method = load_method(spec.method)
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
        ref_model=None if peft_config else load(spec),
        **common,
    )


def _now() -> float:
    """Seconds: of this process where it computes on the CPU, whatever else the machine does; otherwise of the clock."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Times the steps after the warm-up."""

    begin = end = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Read the clock."""
        if state.global_step == WARM_UP_STEPS:
            self.begin = _now()
        self.end = _now()


def peak_mib() -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(spec: WorkerSpec) -> None:
    """Answer each line on stdin with one block of steps; end with the peak memory."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr; stdout carries the protocol alone
    torch.set_num_threads(spec.threads)
    trainer, clock = build_trainer(spec), Clock()
    trainer.add_callback(clock)
    layout = trainer.layout.layout if isinstance(trainer, PreferenceTrainer) else "trl"
    print(json.dumps({"layout": layout}), file=replies, flush=True)
    for _ in sys.stdin:
        trainer.train()
        print(json.dumps({"seconds": clock.end - clock.begin}), file=replies, flush=True)
    print(json.dumps({"peak_mib": peak_mib()}), file=replies, flush=True)


if __name__ == "__main__":
    work(WorkerSpec(**json.loads(sys.argv[1])))
