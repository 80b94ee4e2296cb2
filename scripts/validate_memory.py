"""Compare the memory estimate with what real training steps take, configuration by configuration.

    python scripts/validate_memory.py                          # CPU: every allocation of a step is followed
    python scripts/validate_memory.py --device cuda            # GPU: the allocator's own peak

On a CPU the peak is that of live tensor bytes: every storage that an operation returns is counted until it is freed.
Memory that a kernel takes and gives back inside one operation is not seen there. Two steps are made, since an
optimizer has its states from the second on. ``saved`` is what is kept for the backward pass when the last layer has
been computed, which the peak alone would hide behind the head.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig

from alignkit.memory.decoder import Tokens, Trained
from alignkit.memory.estimate import Estimate, Step, estimate
from alignkit.memory.shape import ModelShape
from alignkit.models._forward import base_model
from alignkit.models.quantization import quantization_config
from alignkit.parametrizations._lora import lora_config, unadaptable
from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from alignkit.shapes._tokens import SupervisedTrainer

MIB = 2**20
TOLERANCE = 0.08


# --- what is measured -------------------------------------------------------------------------------------------------


class TrackedAllocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and keeps the most there were.

    Args:
        tensors: What is there already.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.at_peak = ""
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in tensors:
            self._follow(tensor, "start")

    def _follow(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._freed, size)
        self.live += size
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, name

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._follow(value, str(func))
        return out


@dataclass
class Measured:
    """Bytes: the peak of two steps, and what is kept for the backward pass."""

    peak: int
    saved: int
    at_peak: str


# --- what is run ------------------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: What is special about it.
        family: Class of its config in transformers, without ``Config``.
        sizes: Beside those of ``LLAMA``.
        prompt: Tokens of every prompt.
        completions: Tokens of each candidate; of supervised rows, one number a row.
        batch: Rows a micro-batch.
        rank: Of LoRA's factors; None trains all weights.
    """

    name: str
    family: str = "Qwen3"
    sizes: dict[str, Any] = field(default_factory=dict)
    program: Literal["preference", "sft"] = "preference"
    prompt: int = 64
    completions: tuple[int, ...] = (64, 64)
    batch: int = 2
    rank: int | None = 8
    targets: str | tuple[str, ...] = "all-linear"
    saved_beside: tuple[str, ...] = ()
    quantization: Literal["none", "nf4", "int8"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    bf16: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw_torch"
    accumulation: int = 1
    precomputed: bool = False
    layout: Literal["padded", "packed"] = "padded"

    @property
    def is_ragged(self) -> bool:
        """Whether rows are padded."""
        return len(set(self.completions)) > 1

    def tokens(self) -> Tokens:
        """The micro-batch, as the estimate takes it."""
        if self.layout == "packed":
            prefix, branches = (0, (self.prompt,)) if self.program == "sft" else (self.prompt - 1, self.completions)
            return Tokens.packed(((prefix, branches),) * self.batch)
        length = self.prompt + max(self.completions)
        rows = self.batch * (len(self.completions) if self.program == "preference" else 1)
        scored = self.batch * sum(self.completions)
        if self.program == "sft":
            scored = sum(self.completions[i % len(self.completions)] for i in range(self.batch))
        return Tokens(rows, length, self.is_ragged, scored)

    def step(self, device: Literal["cpu", "cuda"] = "cpu") -> Step:
        """The run, as the estimate takes it."""
        width = 2 if self.dtype == "bfloat16" else 4
        trained = Trained(width=width)
        if self.rank is not None:
            targets = None if self.targets == "all-linear" else tuple(self.targets)
            trained = Trained("lora", width, 4, 1.0, self.rank, targets, self.saved_beside, self.quantization)
        own = "copy" if self.rank is None else "adapter_disabled"
        return Step(
            self.tokens(),
            trained,
            autocast=2 if self.bf16 else None,
            checkpointing=self.checkpointing,
            accumulates=self.accumulation > 1,
            optimizer=self.optimizer,
            reference="none" if self.precomputed or self.program == "sft" else own,
            device=device,
            casts_adapter_inputs=not self.bf16,
        )


def estimated(case: Case, device: Literal["cpu", "cuda"] = "cpu") -> Estimate:
    """The estimate for a case."""
    return estimate(ModelShape.of(_config(case).to_dict()), case.step(device))


def measured(case: Case, device: Literal["cpu", "cuda"] = "cpu") -> Measured:
    """Train two steps and measure."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, Path(folder), device)
        return _tracked(trainer)


def _tracked(trainer: Any) -> Measured:
    models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) else [])]
    tracked = TrackedAllocations([t for model in models for t in (*model.parameters(), *model.buffers())])
    live: dict[str, int] = {}
    backbone = base_model(trainer.model).base_model

    def before(*unused: Any) -> None:
        if torch.is_grad_enabled():
            live["before"] = tracked.live

    def after(*unused: Any) -> None:
        if torch.is_grad_enabled():
            live["saved"] = tracked.live - live["before"]

    backbone.register_forward_pre_hook(before)
    backbone.register_forward_hook(after)
    with tracked:
        trainer.train()
    return Measured(tracked.peak, live["saved"], tracked.at_peak)


def _config(case: Case) -> Any:
    sizes = LLAMA | ({"pad_token_id": 0} if case.family in ("Mixtral", "Olmoe") else {}) | case.sizes
    return getattr(transformers, f"{case.family}Config")(**sizes)


def _model(case: Case, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = AutoModelForCausalLM.from_config(_config(case)).to(dtype)
    if case.quantization == "none":
        return model
    model.save_pretrained(folder / "base")
    how = {"quantization_config": quantization_config(case.quantization, dtype), "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, **how)


def _rows(case: Case) -> Dataset:
    draw = random.Random(0)

    def words(count: int) -> list[int]:
        return [draw.randrange(2, 90) for _ in range(count)]

    count = 2 * case.batch * case.accumulation
    if case.program == "sft":
        rows = []
        for i in range(count):
            prompt, answer = words(case.prompt), words(case.completions[i % len(case.completions)])
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return Dataset.from_list(rows)
    scores = [1.0, *[0.0] * (len(case.completions) - 1)]
    return Dataset.from_list(
        [
            {
                "prompt_ids": words(case.prompt),
                "completion_ids": [words(n) for n in case.completions],
                "scores": scores,
            }
            for _ in range(count)
        ]
    )


def _arguments(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """Those that all trainers share."""
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": case.batch,
        "per_device_eval_batch_size": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "max_steps": 2,
        "logging_steps": 100,
        "report_to": "none",
        "bf16": case.bf16,
        "gradient_checkpointing": case.checkpointing,
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "pad_to_multiple_of": None,
        "prediction_loss_only": True,
        "optim": case.optimizer,
        "train_sampling_strategy": "sequential",
    }


def _adapter(case: Case, model: nn.Module) -> dict[str, Any]:
    if case.rank is None:
        return {}
    left_out = list(unadaptable(model)) if case.targets == "all-linear" else []
    adapter = lora_config(
        r=case.rank,
        alpha=2 * case.rank,
        dropout=0.0,
        target_modules=case.targets,
        modules_to_save=case.saved_beside,
        exclude=left_out,
    )
    return {"peft_config": adapter}


def _trainer(case: Case, folder: Path, device: str) -> Any:
    model, arguments = _model(case, folder), _arguments(case, folder, device)
    inherited = {"processing_class": _tokenizer(), "train_dataset": _rows(case), **_adapter(case, model)}
    if case.program == "sft":
        method = load_method("sft")
        return SupervisedTrainer(model, SFTConfig(**arguments), method=method, options=method.options(), **inherited)
    if case.rank is None and not case.precomputed:
        inherited["ref_model"] = copy.deepcopy(model).eval()
    method = load_method("dpo" if len(case.completions) == 2 else "adpo")
    arguments["precompute_ref_log_probs"] = case.precomputed
    settings = BridgeSettings(case.layout, reference_cache=folder / "cache")
    return PreferenceTrainer(
        model, DPOConfig(**arguments), method=method, options=method.options(), settings=settings, **inherited
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 96)}
    rust = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", eos_token="<eos>")


WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
DEEP = {"num_hidden_layers": 12}
CASES: tuple[Case, ...] = (
    Case("LoRA, pairs of one length"),
    Case("LoRA, ragged pairs", completions=(64, 40)),
    Case("LoRA, deep, ragged", sizes=DEEP, completions=(64, 40)),
    Case("LoRA, deep, checkpointing", sizes=DEEP, checkpointing=True),
    Case("LoRA, wide", sizes=WIDE),
    Case("LoRA, wide, deep, long", sizes=WIDE | DEEP, prompt=256, completions=(128, 128), batch=1),
    Case("LoRA, 512/256 ragged, checkpointing", sizes=DEEP, prompt=512, completions=(256, 100), checkpointing=True),
    Case("LoRA rank 64", sizes=WIDE, rank=64),
    Case("LoRA on q_proj and v_proj", targets=("q_proj", "v_proj"), sizes=DEEP),
    Case("LoRA and the head in full", saved_beside=("lm_head",), sizes={"tie_word_embeddings": False}),
    Case("LoRA, bf16 autocast on float32", sizes=DEEP, bf16=True),
    Case("LoRA, bf16 autocast on bf16", sizes=DEEP, bf16=True, dtype="bfloat16"),
    Case("LoRA, bf16 without autocast", sizes=DEEP, dtype="bfloat16"),
    Case("LoRA, bf16 autocast, checkpointing, ragged", sizes=DEEP, bf16=True, dtype="bfloat16", checkpointing=True,
         completions=(64, 30)),
    Case("LoRA, reference precomputed", sizes=DEEP, precomputed=True),
    Case("LoRA, accumulation", sizes=WIDE, accumulation=2),
    Case("QLoRA nf4", sizes=WIDE, quantization="nf4", dtype="bfloat16", bf16=True),
    Case("QLoRA nf4, checkpointing", sizes=WIDE | DEEP, quantization="nf4", dtype="bfloat16", bf16=True,
         checkpointing=True),
    Case("full", rank=None, sizes=DEEP),
    Case("full, checkpointing", rank=None, sizes=WIDE | DEEP, checkpointing=True),
    Case("full, bf16 autocast", rank=None, sizes=DEEP, bf16=True),
    Case("full, wide, adafactor", rank=None, sizes=WIDE | DEEP, optimizer="adafactor", batch=1),
    Case("full, wide, sgd, accumulation", rank=None, sizes=WIDE | DEEP, optimizer="sgd", accumulation=2, batch=1),
    Case("full, large vocabulary", rank=None, sizes={"vocab_size": 40000, "tie_word_embeddings": False}, batch=1),
    Case("K = 4, LoRA", completions=(48, 48, 48, 48), sizes=DEEP),
    Case("K = 8, LoRA, ragged", completions=(48, 40, 30, 48, 20, 10, 48, 5), batch=1, sizes=DEEP),
    Case("K = 5, full", completions=(30, 30, 30, 30, 30), rank=None, sizes=WIDE, batch=1),
    Case("Llama, MHA, LoRA, ragged", "Llama", {"num_key_value_heads": 4} | DEEP, completions=(64, 40)),
    Case("Qwen2, full", "Qwen2", {}, rank=None),
    Case("Qwen3-MoE, LoRA", "Qwen3Moe", EXPERTS | DEEP),
    Case("Qwen3-MoE, full", "Qwen3Moe", EXPERTS, rank=None),
    Case("packed pairs, LoRA", layout="packed", sizes=DEEP),
    Case("packed, ragged, LoRA", layout="packed", completions=(64, 30), sizes=DEEP, batch=4),
    Case("packed, long prompt, full", layout="packed", prompt=300, completions=(60, 20), sizes=DEEP, rank=None),
    Case("packed, K = 8, checkpointing", layout="packed", completions=(48, 40, 30, 48, 20, 10, 48, 5), batch=1,
         sizes=DEEP, checkpointing=True),
    Case("packed, bf16 autocast on bf16", layout="packed", sizes=DEEP, bf16=True, dtype="bfloat16", batch=4,
         completions=(64, 30)),
    Case("packed, QLoRA nf4", layout="packed", sizes=WIDE, quantization="nf4", dtype="bfloat16", bf16=True),
    Case("SFT, LoRA, ragged", program="sft", completions=(64, 200), batch=4, sizes=DEEP),
    Case("SFT, full", program="sft", completions=(128,), batch=4, rank=None, sizes=WIDE),
    Case("SFT, QLoRA nf4, bf16", program="sft", completions=(100, 60), batch=4, sizes=WIDE, quantization="nf4",
         dtype="bfloat16", bf16=True),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="Cases whose name contains this.")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    worst = 0.0
    for case in CASES:
        if options.only not in case.name:
            continue
        start = time.monotonic()
        found, expected = measured(case, options.device), estimated(case, options.device)
        errors = expected.peak / found.peak - 1, expected.saved / found.saved - 1
        worst = max(worst, *map(abs, errors))
        print(
            f"| {case.name} | {found.peak / MIB:.1f} | {expected.peak / MIB:.1f} | {errors[0]:+.1%} "
            f"| {found.saved / MIB:.1f} | {expected.saved / MIB:.1f} | {errors[1]:+.1%} | {found.at_peak} "
            f"| {expected.where} | {time.monotonic() - start:.1f} s |",
            flush=True,
        )
    print(f"worst {worst:.1%} on {platform.machine()}, torch {torch.__version__}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
