"""Compare the memory estimate with what real training steps take, configuration by configuration.

    python scripts/validate_memory.py                          # CPU: every allocation of a step is followed
    python scripts/validate_memory.py --write docs/results/memory.md
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
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
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
    attention: str = "sdpa"

    @property
    def is_ragged(self) -> bool:
        """Whether rows are padded."""
        return len(set(self.completions)) > 1

    def tokens(self) -> Tokens:
        """The micro-batch, as the estimate takes it."""
        if self.layout == "packed":
            return self._packed()
        length = self.prompt + max(self.completions)
        rows = self.batch * (len(self.completions) if self.program == "preference" else 1)
        scored = self.batch * sum(self.completions)
        if self.program == "sft":
            scored = sum(self.completions[i % len(self.completions)] for i in range(self.batch))
        return Tokens(rows, length, self.is_ragged, scored)

    def _packed(self) -> Tokens:
        if self.program == "preference":
            return Tokens.packed(((self.prompt - 1, self.completions),) * self.batch)
        answers = [self.completions[i % len(self.completions)] for i in range(self.batch)]
        # The last token of a row predicts none.
        return Tokens.packed(tuple((0, (self.prompt + answer - 1,)) for answer in answers), sum(answers))

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
            attention=self.attention,
        )


def estimated(case: Case, device: Literal["cpu", "cuda"] = "cpu") -> Estimate:
    """The estimate for a case."""
    return estimate(ModelShape.of(_config(case).to_dict()), case.step(device))


def measured(case: Case, device: Literal["cpu", "cuda"] = "cpu") -> Measured:
    """Train two steps and measure."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, Path(folder), device)
        return _tracked(trainer) if device == "cpu" else _allocated(trainer)


def _tracked(trainer: Any) -> Measured:
    models = [trainer.model, *([trainer.ref_model] if vars(trainer).get("ref_model") else [])]
    tracked = TrackedAllocations([t for model in models for t in (*model.parameters(), *model.buffers())])
    with _saved_by(trainer, lambda: tracked.live) as saved, tracked:
        trainer.train()
    return Measured(tracked.peak, saved[-1], tracked.at_peak)


def _allocated(trainer: Any) -> Measured:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with _saved_by(trainer, torch.cuda.memory_allocated) as saved:
        trainer.train()
    return Measured(torch.cuda.max_memory_allocated(), saved[-1], "")


@contextmanager
def _saved_by(trainer: Any, live: Callable[[], int]) -> Iterator[list[int]]:
    """Bytes that each pass with gradient has added by the end of its last layer."""
    before, saved = [0], [0]

    def enter(*unused: Any) -> None:
        if torch.is_grad_enabled():
            before[0] = live()

    def leave(*unused: Any) -> None:
        if torch.is_grad_enabled():
            saved.append(live() - before[0])

    backbone = base_model(trainer.model).base_model
    handles = [backbone.register_forward_pre_hook(enter), backbone.register_forward_hook(leave)]
    yield saved
    for handle in handles:
        handle.remove()


def _config(case: Case) -> Any:
    sizes = LLAMA | ({"pad_token_id": 0} if case.family in ("Mixtral", "Olmoe") else {}) | case.sizes
    return getattr(transformers, f"{case.family}Config")(**sizes)


def _model(case: Case, folder: Path, device: str) -> nn.Module:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = AutoModelForCausalLM.from_config(_config(case), attn_implementation=case.attention).to(dtype)
    if case.quantization == "none":
        return model
    model.save_pretrained(folder / "base")
    how = {"quantization_config": quantization_config(case.quantization, dtype), "device_map": {"": device}}
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
    model, arguments = _model(case, folder, device), _arguments(case, folder, device)
    inherited = {"processing_class": _tokenizer(), "train_dataset": _rows(case), **_adapter(case, model)}
    if case.program == "sft":
        method = load_method("sft")
        how = {"method": method, "options": method.options(), "layout": case.layout}
        return SupervisedTrainer(model, SFTConfig(**arguments), **how, **inherited)
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
    Case("eager attention, ragged", "Llama", DEEP, completions=(64, 40), attention="eager"),
    Case("eager attention, bf16", "Llama", DEEP, bf16=True, dtype="bfloat16", attention="eager"),
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
    Case("Qwen3-MoE, LoRA, checkpointing", "Qwen3Moe", EXPERTS | DEEP, checkpointing=True),
    Case("SFT, LoRA, ragged", program="sft", completions=(64, 200), batch=4, sizes=DEEP),
    Case("SFT, packed, LoRA", program="sft", completions=(64, 200), batch=4, sizes=DEEP, layout="packed"),
    Case("SFT, full", program="sft", completions=(128,), batch=4, rank=None, sizes=WIDE),
    Case("SFT, QLoRA nf4, bf16", program="sft", completions=(100, 60), batch=4, sizes=WIDE, quantization="nf4",
         dtype="bfloat16", bf16=True),
)  # fmt: skip


PAGE = """# The memory estimate against real training steps

`alignkit.memory` says what a training step takes, from a model's `config.json` and the run's config. Each line is one
configuration: two optimizer steps of our trainers, in which
{how}.
*Saved* is what is kept for the backward pass when the last layer has been computed; *peak* is the highest point of both
steps, with weights, gradients, optimizer and head. MiB, and the error of the estimate. Every one must be within
{tolerance:.0%}; the worst is {worst:.1%}.

Where not said otherwise: Qwen3 of 4 layers of 128, a vocabulary of 1,000 (the head computes tiles of 32,768 words
whatever the vocabulary), LoRA of rank 8 on all linear layers, float32, 2 prompts of 64 tokens with 2 completions of 64.

    {command}

{machine}, {date}.

{table}
"""
HOW = {
    "cpu": "every storage that an operation returns is followed until it is freed",
    "cuda": "the allocator says what was allocated at most",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="Cases whose name contains this.")
    parser.add_argument("--write", type=Path, help="File for the page with the table.")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    lines, worst = [], 0.0
    for case in CASES:
        if options.only in case.name:
            line, error = _line(case, options.device)
            print(line, flush=True)
            lines.append(line)
            worst = max(worst, error)
    print(f"worst {worst:.1%}")
    if options.write:
        options.write.write_text(_page(lines, worst, options), encoding="utf-8")
    return int(worst > TOLERANCE)


def _line(case: Case, device: Literal["cpu", "cuda"]) -> tuple[str, float]:
    found, expected = measured(case, device), estimated(case, device)
    pairs = [(found.peak, expected.peak), (found.saved, expected.saved)]
    errors = [guess / real - 1 for real, guess in pairs]
    cells = [f"{real / MIB:.1f} | {guess / MIB:.1f} | {guess / real - 1:+.1%}" for real, guess in pairs]
    return f"| {case.name} | {' | '.join(cells)} |", max(map(abs, errors))


def _page(lines: Sequence[str], worst: float, options: argparse.Namespace) -> str:
    head = "| configuration | peak | estimated | error | saved | estimated | error |\n|---|---|---|---|---|---|---|"
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({platform.machine()})"
    return PAGE.format(
        how=HOW[options.device],
        tolerance=TOLERANCE,
        worst=worst,
        command=f"python scripts/validate_memory.py --device {options.device} --write docs/results/memory.md",
        machine=f"{device}, torch {torch.__version__}, transformers {transformers.__version__}",
        date=date.today().isoformat(),
        table="\n".join([head, *lines]),
    )


if __name__ == "__main__":
    sys.exit(main())
