"""An adapter of full rank is the weight itself, trained: the same gradients and steps, kept apart from its start."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from alignkit.errors import ModelError
from alignkit.models._engine import keep_sums_whole
from alignkit.models.full_rank import continue_full_rank, full_rank_config, settle
from alignkit.references._anchor import add_anchor_adapter

EXPERTS = 4
WEIGHTS = {f"model.layers.{layer}.mlp.gate.weight": EXPERTS for layer in (1, 2)}
TOKENS = torch.arange(24).view(2, 12) % 31


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return Qwen3MoeForCausalLM(config)


def with_adapter(model: nn.Module) -> PeftModel:
    wrapped = get_peft_model(model, full_rank_config(WEIGHTS))
    settle(wrapped)
    return wrapped


def trained(model: nn.Module, **optimizer: float) -> list[nn.Parameter]:
    """The parameters that train, after five steps of AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = torch.optim.AdamW(parameters, **{"lr": 1e-3, "weight_decay": 0.0, **optimizer})
    for _ in range(5):
        steps.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        steps.step()
    return parameters


def test_its_steps_are_those_of_the_weights_themselves() -> None:
    plain, wrapped = mixture(), with_adapter(mixture())
    start = copy.deepcopy(plain.state_dict())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in WEIGHTS)
    weights, changes = trained(plain), trained(wrapped)
    assert len(weights) == len(changes) == len(WEIGHTS)
    for name, weight, change in zip(WEIGHTS, weights, changes, strict=True):
        assert change.shape == weight.shape and (weight - start[name]).abs().min() > 1e-4
        torch.testing.assert_close(start[name] + change, weight, rtol=0, atol=1e-6)


def test_weight_decay_pulls_towards_the_weights_that_were_there() -> None:
    # A step of SGD on nothing but decay: the change shrinks, not the weight.
    wrapped = with_adapter(mixture())
    changes = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for change in changes:
            change.fill_(0.5)
    before = [parameter.clone() for parameter in wrapped.parameters() if not parameter.requires_grad]
    for change in changes:
        change.grad = torch.zeros_like(change)
    torch.optim.AdamW(changes, lr=0.1, weight_decay=0.5).step()
    assert all(torch.allclose(change, torch.tensor(0.475)) for change in changes)
    after = [parameter for parameter in wrapped.parameters() if not parameter.requires_grad]
    assert all(map(torch.equal, before, after))


def test_small_steps_on_half_precision_weights_are_kept() -> None:
    wrapped = with_adapter(mixture().to(torch.bfloat16))
    (first, *_) = trained(wrapped, lr=1e-6)
    assert first.dtype == torch.float32
    assert 0 < first.abs().max() < 1e-5  # Every one would have been lost beside a weight of 0.02 or more in bfloat16.
    with torch.no_grad():
        first.fill_(0.25)
    with_it = wrapped(input_ids=TOKENS, output_router_logits=True).router_logits[1]
    with wrapped.disable_adapter():
        without = wrapped(input_ids=TOKENS, output_router_logits=True).router_logits[1]
    assert (with_it - without).abs().max() > 0.1


@pytest.mark.parametrize("disturb", ["toggle", "anchor"])
def test_the_fixed_factor_never_trains(disturb: str) -> None:
    wrapped = with_adapter(mixture())
    trained(wrapped)
    if disturb == "toggle":
        with wrapped.disable_adapter():
            pass
    else:
        add_anchor_adapter(wrapped)
    wrapped(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert sorted(name for name, p in wrapped.named_parameters() if p.requires_grad) == sorted(
        f"base_model.model.{name.removesuffix('weight')}lora_A.default.weight" for name in WEIGHTS
    )
    if disturb == "anchor":
        own = wrapped(input_ids=TOKENS).logits
        wrapped.set_adapter("ref")
        torch.testing.assert_close(wrapped(input_ids=TOKENS).logits, own, rtol=0, atol=0)


def test_a_saved_one_loads_as_any_adapter_and_goes_on(tmp_path: Path) -> None:
    wrapped = with_adapter(mixture())
    trained(wrapped)
    expected = wrapped.eval()(input_ids=TOKENS).logits
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture(), str(tmp_path), is_trainable=True).eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.equal(loaded(input_ids=TOKENS).logits, expected)
    continue_full_rank(loaded)
    settle(loaded)
    assert torch.equal(loaded(input_ids=TOKENS).logits, expected)
    assert sum(parameter.requires_grad for parameter in loaded.parameters()) == len(WEIGHTS)


def test_an_adapter_of_lower_rank_is_not_continued(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[], target_parameters=sorted(WEIGHTS))
    with pytest.raises(ModelError, match="not made by training routers.*parametrization: lora"):
        continue_full_rank(get_peft_model(mixture(), config))


def test_zero3_leaves_routers_whole_and_never_the_experts_of_a_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.models._engine.is_deepspeed_zero3_enabled", lambda: True)
    router_size = EXPERTS * 32
    for given, expected in (({}, 100_000), ({"stage3_param_persistence_threshold": 0}, router_size)):
        config = {"zero_optimization": dict(given)}
        keep_sums_whole(with_adapter(mixture()), config)
        assert config["zero_optimization"]["stage3_param_persistence_threshold"] == expected
        assert config["zero_optimization"]["leaf_module"]["classes"] == []
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    keep_sums_whole(get_peft_model(mixture(), lora), config)
    assert config == {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
