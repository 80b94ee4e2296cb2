"""A tiny mixture of experts, and rows of questions with choices."""

from __future__ import annotations

from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from tests.supervised import tokenizer as tiny_tokenizer


def tiny_moe(**changes: Any) -> OlmoeForCausalLM:
    """An OLMoE of 3 layers and 6 experts with fresh weights, always the same."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "pad_token_id": tiny_tokenizer().pad_token_id,
        "eos_token_id": tiny_tokenizer().eos_token_id,
    }
    return OlmoeForCausalLM(OlmoeConfig(**(config | changes))).eval()


def question_rows(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of 4 tasks with 4 choices each, as token ids."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(10, 300, (length,), generator=draw).tolist()

    rows = []
    for i in range(count):
        choices = [ids(1, 4) for _ in range(4)]
        rows.append(
            {
                "prompt_ids": ids(2, 12),
                "choices_ids": choices,
                "completion_ids": choices[int(torch.randint(4, (1,), generator=draw))],
                "task": "abcd"[i % 4],
                "text": f"question {i}",
            }
        )
    return rows
