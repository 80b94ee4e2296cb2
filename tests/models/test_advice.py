"""Advice that can be followed: nothing is proposed that the next run would refuse."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.errors import ModelError, ProblemListError
from alignkit.hub import upload
from alignkit.parametrizations._lora import check_modules


def test_the_output_head_is_not_among_the_targets_proposed() -> None:
    """LoRA on it is refused, also where it is a layer of its own."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    with pytest.raises(ModelError) as error:
        check_modules(LlamaForCausalLM(config), ["query"])
    proposed = str(error.value).partition("names among ")[2].rstrip(".").split(", ")
    assert proposed == ["down_proj", "embed_tokens", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_a_training_is_told_of_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """--base_model and --repo_id belong to alignkit push."""
    monkeypatch.setattr(upload, "require_token", lambda: "token")
    with pytest.raises(ProblemListError) as error:
        upload.check_before_training("not an id", "./base", is_adapter=True)
    assert "hub_model_id: " in str(error.value) and "Give the Hub id of the base with model." in str(error.value)
    assert "--base_model" not in str(error.value) and "repo_id" not in str(error.value)
