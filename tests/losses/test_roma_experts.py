"""Which experts each term of RoMA reaches in a real router: those that no token selected only by the manifold term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from alignkit.losses.roma import roma_loss
from alignkit.losses.types import LossOutput, RoutedBatch

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
EXPERTS, PROMPT = 8, 2


def outcome(model: torch.nn.Module) -> tuple[LossOutput, Tensor]:
    """The loss of one row of three tokens, and which experts of the last layer none of them selected."""
    tokens = torch.tensor([[5, 9, 17]])
    output = model(tokens, output_router_logits=True)
    logits = output.router_logits[-1]
    routing = logits[PROMPT - 1 : PROMPT].softmax(-1)
    logps = output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    batch = RoutedBatch(
        policy_token_logps=logps,
        label_mask=torch.tensor([[False, True]]),
        routing=routing,
        target_routing=routing.detach().roll(1, -1),
        target_variance=torch.zeros(1),
        has_target=torch.tensor([True]),
        base_routing=routing.detach(),
        num_layers=1,
        step=0,
    )
    selected = logits.topk(2, -1).indices.unique()
    return roma_loss(batch, manifold_coef=1.0), ~torch.isin(torch.arange(EXPERTS), selected)


def build(family: str) -> tuple[torch.nn.Module, Tensor]:
    """A model, and the weight of its last router."""
    torch.manual_seed(0)
    match family:
        case "granite":
            model = GraniteMoeForCausalLM(GraniteMoeConfig(num_local_experts=EXPERTS, **SIZES))
            return model, model.model.layers[-1].block_sparse_moe.router.weight
        case "mixtral":
            model = MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **SIZES))
        case "olmoe":
            model = OlmoeForCausalLM(OlmoeConfig(num_experts=EXPERTS, norm_topk_prob=False, **SIZES))
    return model, model.model.layers[-1].mlp.gate.weight


@pytest.mark.parametrize(("family", "least", "most"), [("granite", 0, 0), ("mixtral", 0, 1e-5), ("olmoe", 1e-3, 1)])
def test_experts_that_no_token_selected(family: str, least: float, most: float) -> None:
    """How much of the largest pull at a selected expert the cross-entropy has at one that no token selected.

    Granite takes the softmax of the selected logits alone. Mixtral divides the selected shares by their sum, which is
    the same but for rounding in float32. OLMoE mixes by the shares as they are.
    """
    model, router = build(family)
    loss, unselected = outcome(model)
    assert 0 < unselected.sum() < EXPERTS
    ce, drawn = (torch.autograd.grad(term.values.sum(), router, retain_graph=True)[0].abs() for term in loss.terms)
    assert least <= ce[unselected].max() / ce[~unselected].max() <= most
    assert drawn[unselected].amax(1).min() > 1e-3 * drawn[~unselected].max()
