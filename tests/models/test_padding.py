"""Padding computes nothing that is used, and must not spoil what is: gradients with a pad embedding of zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nForCausalLM

from alignkit.data.prefix import CandidateCollator
from alignkit.models._forward import add_completion_head, completion_logps, use_packed_attention
from tests.trainers import VOCABULARY, random_rows


@pytest.fixture
def gemma() -> Any:
    """It takes root mean squares of hidden states; transformers starts the pad embedding at 0."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        layer_types=["full_attention"] * 2, hidden_size_per_layer_input=4,
        laurel_rank=2, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 2,
        num_kv_shared_layers=0, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Gemma3nForCausalLM(config)
    assert not model.get_input_embeddings().weight[0].any()
    add_completion_head(model)
    return model


def test_gradients_are_those_of_single_sequences(gemma: Any) -> None:
    """Rows of different lengths, lists of different sizes; each sequence alone has no padding."""
    rows = random_rows([(4, (3, 5)), (1, (4, 2, 6)), (6, (1,))], seed=1)
    for row in rows:
        for completion in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + completion])
            logps = gemma(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            logps[0, len(row["prompt_ids"]) - 1 :].sum().backward()
    expected = {name: parameter.grad for name, parameter in gemma.named_parameters() if parameter.grad is not None}
    assert all(gradient.isfinite().all() for gradient in expected.values())
    use_packed_attention(gemma)
    for layout in ("padded", "packed"):
        gemma.zero_grad(set_to_none=True)
        completion_logps(gemma, CandidateCollator(0, layout)(rows)).sum().backward()  # type: ignore[arg-type]
        for name, parameter in gemma.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], atol=2e-4, rtol=1e-3)
