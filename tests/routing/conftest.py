"""What the tests of the bank share."""

from __future__ import annotations

import pytest
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from alignkit.models._forward import add_completion_head
from tests.routing.tiny import tiny_moe
from tests.supervised import tokenizer as tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of 300 tokens."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def moe() -> OlmoeForCausalLM:
    """A tiny model with a completion head; nobody may change it."""
    model = tiny_moe()
    add_completion_head(model)
    return model
