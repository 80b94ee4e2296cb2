"""How every program that runs a model begins: its processes, the tokenizer, the model."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
import transformers
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.models._forward import add_completion_head
from alignkit.models.files import AdapterFiles
from alignkit.models.loading import ModelSource, check_base, load_adapter, load_model, load_tokenizer
from alignkit.models.precision import has_bfloat16


def start_processes(*, use_cpu: bool) -> PartialState:
    """Join the other processes of the launch; only the first one shows progress.

    Args:
        use_cpu: Stay on the CPU even where there is an accelerator.
    """
    state = PartialState(cpu=True) if use_cpu else PartialState()
    if not state.is_main_process:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return state


def fitting_dtype(device: torch.device) -> str:
    """Precision of weights that are only read: bfloat16 on an accelerator that computes in it, float32 elsewhere."""
    return "bfloat16" if device.type != "cpu" and has_bfloat16() else "float32"


def tokenizer_for(
    source: ModelSource, adapter: AdapterFiles | None, chat_template: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, which knows the template it was trained with; otherwise the model's.

    Args:
        source: The model.
        adapter: The adapter, or None.
        chat_template: Jinja file that replaces the chat template, or None.
    """
    if adapter is not None and adapter.has_tokenizer:
        return load_tokenizer(str(adapter.directory), chat_template=chat_template)
    return load_tokenizer(
        source.model,
        revision=source.revision,
        chat_template=chat_template,
        trust_remote_code=source.trust_remote_code,
    )


def load_for_scoring(
    source: ModelSource, adapter: AdapterFiles | None, device: torch.device, *, top1: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a model with the head that gives the log-probs of given tokens.

    Args:
        source: The model.
        adapter: Put on it, or None.
        device: Where to.
        top1: Whether the head also says which tokens are the most likely ones.

    Raises:
        ModelError: It cannot be loaded, or the adapter was trained on another base.
    """
    if adapter is not None:
        check_base(adapter, source)
    model = load_model(source, device)
    # The head goes on before PEFT wraps the model.
    add_completion_head(model, top1=top1)
    return model if adapter is None else load_adapter(model, adapter)
