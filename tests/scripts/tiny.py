"""Models, adapters and rows small enough for every test, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] + eos_token }}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte and four special ones, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIALS[0], eos_token=SPECIALS[1])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(*, seed: int = 0, layers: int = 2, hidden: int = 32, family: str = "qwen3") -> PreTrainedModel:
    """A random causal language model over the bytes, float32, whose predictions are far from uniform."""
    config_class = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    config = config_class(
        vocab_size=256 + len(SPECIALS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_model(directory: Path, **options: Any) -> Path:
    """Save a tiny model with the tokenizer."""
    tiny_model(**options).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_adapter(base: Path, directory: Path, *, scale: float = 0.05, seed: int = 1, **options: Any) -> Path:
    """Save a LoRA adapter on the model in ``base`` with random updates of the given size."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    randomize(wrapped, scale, seed)
    wrapped.save_pretrained(directory)
    (directory / "README.md").unlink()
    return directory


def randomize(model: PeftModel, scale: float, seed: int) -> None:
    """Give every trainable weight a random value, as training would."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=scale)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_pairs(count: int) -> list[dict[str, Any]]:
    """Conversational pairs of different lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + {i}?" + "?" * (i % 4)}],
            "chosen": [{"role": "assistant", "content": f"It is {2 * i}" + "." * (i % 3)}],
            "rejected": [{"role": "assistant", "content": f"{'No. ' * (i % 5)}I do not know {i}"}],
        }
        for i in range(count)
    ]


def candidate_lists(count: int) -> list[dict[str, Any]]:
    """Plain-text candidate lists with two to four candidates and some equal scores."""
    return [
        {
            "prompt": f"Count to {i}: ",
            "completions": [" ".join(map(str, range(1, i + k + 2))) for k in range(2 + i % 3)],
            "scores": [float(k % 3) for k in range(2 + i % 3)],
        }
        for i in range(count)
    ]
