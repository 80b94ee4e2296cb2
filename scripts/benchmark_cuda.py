"""Speed of large models on a GPU against trl.DPOTrainer: random Qwen3 of real shapes, LoRA of rank 16 or all weights.

    python scripts/benchmark.py --device cuda --suite real          # some ten minutes on an H200
    python scripts/benchmark.py --device cpu --suite real --tiny    # the same code with tiny shapes, without claims

One process a model size; in it the sides follow one another, each on a model made anew from the same seed:

- ``trl``: trl.DPOTrainer with its defaults (bf16, gradient checkpointing)
- ``padded``: ours, everything chosen by the run but the layout
- ``auto``: ours, everything chosen by the run (first epoch: the reference is computed while training)
- ``cached``: the same once the reference's log-probs are on disk

Hardware use is the FLOPs that a side really executes over what a large matrix product reaches on the same device.
FLOPs: 2 x parameters of the layers x tokens for a forward pass; as much for gradients of activations, of weights where
all are trained, of recomputed activations and of a reference that is computed while training. Attention is 4 x head
size x heads for each query and key it sees, twice that backwards; the head 2 x width x vocabulary for each scored
token.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback
from trl import DPOConfig, DPOTrainer

from alignkit.data.candidates import to_candidate_rows
from alignkit.models._segments import KEYWORD
from alignkit.models.choices import Choice, chosen_line
from alignkit.models.wrapping import base_model
from alignkit.parametrizations._lora import lora_config
from alignkit.parametrizations._policy import attach, prepare
from alignkit.parts.shape import load_bridge, shapes_by_program
from alignkit.runs import checkpointing
from alignkit.runs.arguments import fitted, training_arguments
from alignkit.shapes._kernel_choice import take_kernels
from alignkit.shapes.candidates import PreferenceConfig
from benchmark_rows import pairs_of_words, word_tokenizer

SIDES = ("trl", "padded", "auto", "cached")
MOST_SECONDS = 570.0
"""No side begins later than this."""
WARM_UP_STEPS = 2
LEAST_USE, LEAST_OF_TOKENS = 0.45, 0.9


@dataclass(frozen=True)
class Size:
    """A model."""

    width: int
    layers: int
    heads: int
    key_heads: int
    ffn: int
    head_size: int = 128
    vocabulary: int = 151936
    tied: bool = False

    def config(self) -> Qwen3Config:
        """For transformers."""
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_size,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            eos_token_id=1,
        )


SIZES = {
    "8B": Size(4096, 36, 32, 8, 12288),
    "1.7B": Size(2048, 28, 16, 8, 6144, tied=True),
    "0.6B": Size(1024, 28, 16, 8, 3072, tied=True),
}
TINY = Size(64, 2, 2, 1, 96, head_size=32, vocabulary=2048, tied=True)


@dataclass(frozen=True)
class Case:
    """Rows of a model size.

    Attributes:
        claims: The least ratio to TRL, by side.
        checks_use: Whether hardware use and the share of the tokens are claimed.
    """

    size: str
    prompt: tuple[int, int]
    completion: tuple[int, int]
    batch_size: int
    is_full: bool = False
    steps: int = 4
    claims: tuple[tuple[str, float], ...] = ()
    checks_use: bool = False

    def tiny(self) -> Case:
        """The same code with next to nothing to compute."""
        small = [(max(low // 16, 1), max(high // 16, 2)) for low, high in (self.prompt, self.completion)]
        return replace(self, prompt=small[0], completion=small[1], batch_size=2, steps=1, claims=(), checks_use=False)


CASES = {
    "8B 384/128": Case("8B", (384, 384), (128, 128), 8, claims=(("auto", 1.9), ("cached", 2.8)), checks_use=True),
    "8B 1024/64": Case("8B", (1024, 1024), (64, 64), 4, claims=(("auto", 2.2), ("cached", 2.8)), checks_use=True),
    "8B 16/256": Case("8B", (16, 16), (256, 256), 8),
    "1.7B ragged": Case("1.7B", (192, 576), (64, 192), 8),
    "0.6B full": Case("0.6B", (384, 384), (128, 128), 8, is_full=True),
}


# --- one side ---------------------------------------------------------------------------------------------------------


class Work(TrainerCallback):
    """Times the steps after the warm-up, and counts what the policy's passes with gradient compute in all steps."""

    def __init__(self, model: nn.Module) -> None:
        self.begin = self.end = 0.0
        self.steps = self.tokens = self.seen = 0
        # Behind the hook of packed rows, which puts their parts in place of the segments.
        base_model(model).base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        rows, length = kwargs["input_ids"].shape
        self.tokens += rows * length
        parts = kwargs.get(KEYWORD)
        sizes = [(length, length)] * rows if parts is None else [parts.sizes(part) for part in parts.parts]
        self.seen += sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in sizes)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Read the clock."""
        _wait(args.device)
        self.end, self.steps = time.perf_counter(), state.global_step
        if state.global_step == WARM_UP_STEPS:
            self.begin = self.end


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops_of_step(size: Size, work: Work, scored: float, *, is_full: bool, recomputes: bool, scores_ref: bool) -> float:
    """FLOPs that a step executes; see the beginning of this file.

    Args:
        size: The model.
        work: What was counted over all steps.
        scored: Completion tokens a step.
        is_full: Whether all weights are trained.
        recomputes: Whether activations are computed again.
        scores_ref: Whether the reference is computed while training.
    """
    tokens, seen = work.tokens / work.steps, work.seen / work.steps
    attention_weights = 2 * size.width * size.head_size * (size.heads + size.key_heads)
    weights = size.layers * (attention_weights + 3 * size.width * size.ffn)
    passes = 1 + 1 + is_full + recomputes + scores_ref
    layers = 2 * weights * tokens * passes
    attention = 4 * size.layers * size.heads * size.head_size * seen * (1 + 2 + recomputes + scores_ref)
    # TRL's head computes its logits again on the way back.
    head = 2 * size.width * size.vocabulary * scored * (1 + 2 + is_full + scores_ref)
    return float(layers + attention + head)


def measured_peak(device: torch.device) -> float:
    """FLOP/s of a large product of matrices, the best of ten."""
    width, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    factor = torch.randn(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        _ = factor @ factor
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best


def make_model(size: Size, device: torch.device, folder: Path, *, is_full: bool) -> Any:
    """A random model on the device; the same for all sides. A copy for the reference is loaded from ``folder``."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(size.config(), dtype=dtype)
    if not (folder / "config.json").is_file():
        (model if is_full else model.config).save_pretrained(folder)
    return model


def build(side: str, case: Case, model: Any, folder: Path, rows: list[dict[str, Any]]) -> Any:
    """The trainer of a side, with everything decided that a run decides before its first step."""
    steps = WARM_UP_STEPS + case.steps
    on_cpu = model.device.type == "cpu"
    shared: dict[str, Any] = {
        "output_dir": str(folder / side),
        "per_device_train_batch_size": case.batch_size,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "logging_steps": steps,
        "use_cpu": on_cpu,
        "report_to": "none",
    }
    tokenizer = word_tokenizer()
    if side == "trl":
        pairs = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1]} for r in rows]
        adapter = None if case.is_full else lora_config(r=16, alpha=32, dropout=0.0, target_modules="all-linear")
        silent = {"save_strategy": "no", "disable_tqdm": True, "max_length": None}
        args = DPOConfig(**shared, **silent, bf16=not on_cpu, train_sampling_strategy="sequential")
        how = {"processing_class": tokenizer, "peft_config": adapter}
        # TRL would load it by the name of the model, which has none.
        reference = copy.deepcopy(model) if case.is_full else None
        return DPOTrainer(model, reference, args, train_dataset=Dataset.from_list(pairs), **how)
    config = PreferenceConfig(
        method="dpo",
        model=str(folder / "model"),
        data="random words",
        parametrization="full" if case.is_full else "lora",
        layout="padded" if side == "padded" else "auto",
        reference="precomputed" if side == "cached" else "auto",
        reference_cache=str(folder / "cache"),
        max_length=sum(high for _, high in (case.prompt, case.completion)),
        **shared,
    )
    candidates, _ = to_candidate_rows(Dataset.from_list(rows), tokenizer, max_length=None, num_candidates=2)
    return _as_a_run_does(config, model, tokenizer, SimpleNamespace(train=candidates, evaluation=None))


def _as_a_run_does(config: Any, model: Any, tokenizer: Any, data: Any) -> Any:
    choices: dict[str, Choice] = {}
    config = fitted(config, choices)
    bridge = load_bridge(shapes_by_program()["preference"])
    args = training_arguments(config, bridge, choices)
    args.save_strategy, args.disable_tqdm, args.train_sampling_strategy = "no", True, "sequential"
    plan = checkpointing.chosen(config, args, data, choices)
    how = {"gradient_rule": None, "peft_config": prepare(config, model), "callbacks": []}
    trainer = bridge.build(config, args, model, tokenizer, data, exchanges_rows=False, choices=choices, **how)
    trainer.choices = choices | trainer.choices
    take_kernels(trainer, config.kernels)
    attach(config, trainer)
    checkpointing.confirm(trainer, plan, trainer.choices)
    trainer.choices["layout"] = trainer.layout.as_choice()
    return trainer


def run_side(side: str, case: Case, size: Size, device: torch.device, folder: Path, peak: float) -> dict[str, Any]:
    """Train and return the figures of a side."""
    rows = pairs_of_words(case.batch_size * (WARM_UP_STEPS + case.steps), case.prompt, case.completion, 2)
    model = make_model(size, device, folder / "model", is_full=case.is_full)
    start = time.perf_counter()
    trainer = build(side, case, model, folder, rows)
    deciding, work = time.perf_counter() - start, Work(trainer.model)
    trainer.add_callback(work)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = (work.end - work.begin) / (work.steps - WARM_UP_STEPS)
    scored = sum(len(text.split()) + 1 for row in rows for text in row["completions"]) / work.steps
    choices = {} if side == "trl" else trainer.choices
    flops = flops_of_step(
        size,
        work,
        scored,
        is_full=case.is_full,
        recomputes=bool(trainer.args.gradient_checkpointing),
        scores_ref=not trainer.args.precompute_ref_log_probs,
    )
    return {
        "seconds": seconds,
        "tokens": work.tokens / work.steps,
        "use": flops / seconds / peak,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "building": deciding,
        "chosen": chosen_line(choices),
    }


def work_on(names: list[str], device: torch.device, *, tiny: bool, until: float) -> Iterator[dict[str, Any]]:
    """Figures of every side of cases of one model size; a side that fails is told and is not the end.

    Args:
        until: When no side begins any more, seconds since the epoch.
    """
    peak = measured_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        # TRL first, in all cases: Liger's kernels stay in the file of a model once a run has put them there.
        for side, name in itertools.product(SIDES, names):
            case = CASES[name].tiny() if tiny else CASES[name]
            found = {"case": name, "side": side, "peak": peak}
            if time.time() > until:
                yield found | {"error": f"not run: {MOST_SECONDS:.0f} s are over"}
                continue
            try:
                found |= run_side(side, case, TINY if tiny else SIZES[case.size], device, Path(folder), peak)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is a line of the table
                traceback.print_exc()
                found["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield found


# --- the table --------------------------------------------------------------------------------------------------------


def verdicts(case: Case, sides: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """Every claim of a case: its words, what was found (0 where a side failed) and the least that meets it."""

    def seconds(side: str) -> float:
        return sides[side]["seconds"] if "seconds" in sides.get(side, {}) else float("nan")

    def found(value: float) -> float:
        return value if value == value else 0.0

    for side, least in case.claims:
        yield f"{side} against TRL", found(seconds("trl") / seconds(side)), least
    if case.checks_use:
        yield "hardware use of auto", sides.get("auto", {}).get("use", 0.0), LEAST_USE
        bound = sides.get("padded", {}).get("tokens", 0) / max(sides.get("auto", {}).get("tokens", 0), 1)
        share = found(seconds("padded") / seconds("auto")) / bound if bound else 0.0
        yield "auto against padded, of the ratio of tokens", share, LEAST_OF_TOKENS


def line(found: dict[str, Any], trl_seconds: float | None) -> str:
    """One side, as a row of the table."""
    start = f"| {found['case']} | {found['side']} |"
    if "error" in found:
        return f"{start} {found['error']} | | | | | |"
    ratio = f"{trl_seconds / found['seconds']:.2f}" if trl_seconds else ""
    return (
        f"{start} {1000 * found['seconds']:.0f} | {ratio} | {found['gib']:.1f} | {found['use']:.0%} | "
        f"{found['tokens']:.0f} | {found['building']:.0f} s; {found['chosen']} |"
    )


def main(device: str, *, tiny: bool) -> int:
    """Run all sides, a process a model size; status 1 when a claim is missed or, with tiny shapes, a side fails."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"{time.strftime('%Y-%m-%d')}  {where}, torch {torch.__version__}{', tiny shapes, no claims' if tiny else ''}"
    )
    print("| case | side | ms a step | x TRL | peak GiB | hardware use | tokens | before the first step |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    until = time.time() + MOST_SECONDS
    sides: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in CASES}
    for size in dict.fromkeys(case.size for case in CASES.values()):
        names = [name for name, case in CASES.items() if case.size == size]
        for found in _in_process(names, device, tiny=tiny, until=until):
            sides[found["case"]][found["side"]] = found
            print(line(found, sides[found["case"]].get("trl", {}).get("seconds")), flush=True)
    return judge(sides, tiny=tiny)


def judge(sides: dict[str, dict[str, dict[str, Any]]], *, tiny: bool) -> int:
    """Print what became of the claims; the status."""
    missed = 0
    for name, case in CASES.items():
        for words, value, least in () if tiny else verdicts(case, sides[name]):
            missed += value < least
            print(f"{name}: {words} {value:.2f}, >= {least:.2f} {'met' if value >= least else 'MISSED'}")
    failed = sum("error" in sides[name].get(side, {"error": ""}) for name in CASES for side in SIDES)
    return int(missed > 0 or (tiny and failed > 0))


def _in_process(names: list[str], device: str, *, tiny: bool, until: float) -> Iterator[dict[str, Any]]:
    spec = json.dumps({"names": names, "device": device, "tiny": tiny, "until": until})
    command = [sys.executable, __file__, spec]
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            assert process.stdout is not None
            yield from (json.loads(text.removeprefix(MARK)) for text in process.stdout if text.startswith(MARK))
        log.seek(0)
        if text := log.read()[-4000:] if process.returncode else "":
            print(f"the process of {names} ended with status {process.returncode}:\n{text}", file=sys.stderr)


MARK = "figures "
"""Before a line of figures, among what libraries print."""


def worker(names: list[str], device: str, *, tiny: bool, until: float) -> None:
    """The process of a model size: prints what :func:`work_on` finds."""
    for found in work_on(names, torch.device(device), tiny=tiny, until=until):
        print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    worker(**json.loads(sys.argv[1]))
