"""Checkpoints, arguments and models small enough to be made by the dozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from alignkit.models.saved_weights import ADAPTER_FILE
from alignkit.runs.checkpoints import CheckpointGuard

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]


def arguments(output_dir: Path, **options: object) -> TrainingArguments:
    """Arguments of a CPU run without reports."""
    return TrainingArguments(output_dir=str(output_dir), report_to="none", use_cpu=True, disable_tqdm=True, **options)


def write_checkpoint(run: Path, step: int, *, numel: int = 8, weights: dict[str, Tensor] | None = None) -> Path:
    """What transformers writes for one process, with weights that tell the step."""
    checkpoint = run / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    default = {"lora_A": torch.full((numel,), float(step)), "lora_B": torch.full((numel,), -float(step))}
    save_file(default if weights is None else weights, checkpoint / ADAPTER_FILE)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step, "moments": torch.full((numel,), float(step))}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def save(guard: CheckpointGuard, run: Path, step: int, args: TrainingArguments, **options: object) -> Path:
    """Announce a checkpoint, write it and let the guard finish it."""
    guard.announce(run / f"checkpoint-{step}")
    checkpoint = write_checkpoint(run, step, **options)
    guard.on_save(args, TrainerState(global_step=step), TrainerControl())
    return checkpoint


def guarded(trainer: Any) -> Any:
    """A bridge whose checkpoints are announced, verified and marked complete."""
    guard = CheckpointGuard()
    trainer.add_callback(guard)
    trainer.before_saving.append(guard.announce)
    return trainer


class AnnouncingGuard(CheckpointGuard):
    """For a trainer of transformers, which says nothing before it saves."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Announce the checkpoint of this step."""
        if control.should_save:
            self.announce(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def tiny_model(seed: int = 0) -> Qwen3ForCausalLM:
    """A model of a few thousand weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def tiny_adapter(model: Qwen3ForCausalLM) -> torch.nn.Module:
    """The model with a LoRA adapter whose B is not zero."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
