"""Routing vectors of prompts: the right tokens, whatever the padding, and what the model itself puts out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import OlmoeForCausalLM

from alignkit.models._routers import find_routers, last_routers
from alignkit.routing.options import TOKEN_SETS
from alignkit.routing.passes import RoutingPass, token_positions
from tests.routing.tiny import question_rows, tiny_moe

PROMPTS = [row["prompt_ids"] for row in question_rows(9)]


def make(model: OlmoeForCausalLM, token_set: str = "last1", layers: int | None = 2) -> RoutingPass:
    routers = last_routers(model, layers)
    return RoutingPass(model, routers, pad_token_id=0, token_set=token_set, score="softmax", device="cpu")


@pytest.mark.parametrize(
    ("token_set", "length", "expected"),
    [
        ("last1", 7, [6]),
        ("first1", 7, [0]),
        ("middle1", 7, [3]),
        ("middle1", 8, [3]),
        ("last3", 7, [4, 5, 6]),
        ("first3", 7, [0, 1, 2]),
        ("middle3", 7, [2, 3, 4]),
        ("last3", 2, [0, 1]),
        ("middle3", 1, [0]),
        ("last1", 1, [0]),
    ],
)
@pytest.mark.parametrize("start", [0, 5])
def test_tokens_of_a_set(token_set: str, length: int, expected: list[int], start: int) -> None:
    columns, counts = token_positions(torch.tensor([start]), torch.tensor([length]), token_set)
    assert columns[counts].tolist() == [start + place for place in expected]
    assert int(columns.max()) < start + length, "what does not count is no column beyond the prompt"


def by_hand(model: OlmoeForCausalLM, prompt: list[int], token_set: str) -> tuple[Tensor, Tensor]:
    """The model's own outputs for one prompt without padding, and Python's slices."""
    with torch.no_grad():
        output = model(torch.tensor([prompt]), output_router_logits=True, output_hidden_states=True)
    place, count = token_set[:-1], int(token_set[-1])
    first = {"first": 0, "middle": max(len(prompt) - count, 0) // 2, "last": max(len(prompt) - count, 0)}[place]
    layers = [layer[first : first + count].exp() for layer in output.router_logits[1:]]
    routing = torch.cat([(layer / layer.sum(1, keepdim=True)).mean(0) for layer in layers])
    return routing, output.hidden_states[-1][0].mean(0)


@pytest.mark.parametrize("token_set", TOKEN_SETS)
def test_padded_batches_give_what_the_model_gives_for_one_prompt(token_set: str, moe: OlmoeForCausalLM) -> None:
    found = make(moe, token_set)(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        routing, pooled = by_hand(moe, prompt, token_set)
        assert torch.allclose(found.routing[row], routing, atol=1e-6)
        assert torch.allclose(found.pooled[row], pooled, atol=1e-5)
    assert torch.allclose(found.routing.view(len(PROMPTS), 2, 6).sum(-1), torch.ones(len(PROMPTS), 2))


@pytest.mark.parametrize("token_set", ["last1", "first3", "middle1"])
def test_the_side_of_the_padding_changes_nothing(token_set: str, moe: OlmoeForCausalLM) -> None:
    chosen = make(moe, token_set)
    right = chosen(PROMPTS)
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    left = chosen.of_batch(ids, mask)
    assert torch.allclose(left.routing, right.routing, atol=1e-6)
    assert torch.allclose(left.pooled, right.pooled, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_moe().train()
    found = make(model)(PROMPTS[:3])
    assert model.training and not found.routing.requires_grad
    assert not model.model._forward_hooks and not find_routers(model)[0].module._forward_hooks


def test_words_are_not_asked_for(moe: OlmoeForCausalLM) -> None:
    widths = []
    hook = moe.lm_head.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    make(moe)(PROMPTS)
    hook.remove()
    assert widths == [1]
