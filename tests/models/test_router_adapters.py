"""Routers trained by RoMA in every family: the manifold term falls, PEFT alone loads them, a merge is that model."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignkit.losses.roma import roma_loss
from alignkit.losses.types import RoutedBatch
from alignkit.models._routers import (
    Router,
    RouterCapture,
    check_capture,
    find_routers,
    last_routers,
    routing_scores,
)
from alignkit.models.export import merge_adapter
from alignkit.models.files import read_adapter
from alignkit.models.full_rank import settle
from alignkit.models.loading import ModelSource
from alignkit.parametrizations._routers import prepare
from tests.moe import FAMILIES, VOCABULARY, tiny_moe

PROMPTS = [[5, 9, 12, 30, 7, 22], [20, 3, 41]]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS])


ROWS = torch.randint(2, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(1))
ENDS = torch.arange(8) % 4 + 2
"""Last position of each prompt; one more is trained, and the rest is padding."""
MASK = (torch.arange(8) <= ENDS[:, None] + 1).long()


def passed(model: PeftModel, routers: list[Router]) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels, and routing at the ends of the prompts."""
    with RouterCapture(routers) as captured:
        out = model(ROWS, attention_mask=MASK, use_cache=False).logits
    blocks = [logits.view(8, 8, -1)[torch.arange(8), ENDS] for logits in captured.logits]
    scores = [routing_scores(block, "auto", router) for block, router in zip(blocks, routers, strict=True)]
    logps = out[:, :-1].log_softmax(-1).gather(-1, ROWS[:, 1:, None])[..., 0]
    return logps, torch.cat(scores, -1)


def trained(model: Any) -> tuple[PeftModel, list[float]]:
    """The parametrisation's adapter on two routers after steps of RoMA, and its manifold term by step.

    Every row is drawn to where another one is routed under the base model.
    """
    wrapped = get_peft_model(model, prepare(SimpleNamespace(router_layers=2, dense_mixer=False), model)).eval()
    settle(wrapped)
    routers = last_routers(wrapped, 2)
    with torch.no_grad(), wrapped.disable_adapter():
        _, base = passed(wrapped, routers)
    labels = torch.arange(7) == ENDS[:, None]
    fixed = (labels, base.roll(1, 0), torch.zeros(8), torch.ones(8, dtype=torch.bool), base, len(routers), 0)
    steps = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    distances = []
    for _ in range(10):
        logps, routing = passed(wrapped, routers)
        ce, manifold = roma_loss(RoutedBatch(logps, fixed[0], routing, *fixed[1:]), manifold_coef=3.0).terms
        assert manifold.values.requires_grad
        distances.append(float(manifold.values.detach().mean()))
        steps.zero_grad()
        (ce.values.sum() / ce.num_items + manifold.weight * manifold.values.mean()).backward()
        steps.step()
    return wrapped, distances


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"dots1", "lfm2_moe"}))
def test_trained_saved_reloaded_and_merged_it_is_one_model(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    # Jamba's state space layers round by where their tensors lie in memory, the same model's in two passes too.
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4 if family == "jamba" else 0)
    base, folder, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    tiny_moe(family).save_pretrained(base)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)  # noqa: E731
    model, report = load(base)
    assert not any(report.values()), report
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untouched, routers = logits(model), find_routers(model)

    wrapped, distances = trained(model)
    assert distances[-1] < 0.6 * distances[0], distances
    changes = {
        f"{name.removeprefix('base_model.model.').removesuffix('lora_A.default.weight')}weight": parameter.detach()
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    assert list(changes) == [f"{router.name}.{router.parameter}" for router in routers[-2:]]
    tuned = logits(wrapped)
    assert (tuned - untouched).abs().max() > 1e-2
    with wrapped.disable_adapter():
        same(logits(wrapped), untouched)
    wrapped.save_pretrained(folder)

    by_peft = PeftModel.from_pretrained(load(base)[0], folder).eval()
    assert type(by_peft.peft_config["default"]) is LoraConfig
    check_capture(by_peft, find_routers(by_peft))
    by_transformers = load(base)[0]
    by_transformers.load_adapter(str(folder))
    same(logits(by_peft), tuned)
    same(logits(by_transformers.eval()), tuned)

    merge_adapter(read_adapter(folder), ModelSource(str(base)), merged, tokenizer=tokenizer, prompts=PROMPTS)
    plain, report = load(merged)
    assert not any(report.values()), report
    # Rounding of kernels, which may go by where a file lies in memory: below, the weights are the same to the last bit.
    torch.testing.assert_close(logits(plain), tuned, rtol=0, atol=1e-4)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value + changes[name] if name in changes else value), name
