"""Routers of every family: found in order, their logits with the gradient, the same whatever is around the prompt."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from alignkit.errors import ModelError
from alignkit.models._routers import (
    Router,
    RouterCapture,
    check_capture,
    find_routers,
    last_routers,
    routing_scores,
)
from tests.moe import FAMILIES, LOCAL, NAMED, RELATIVES, SHARED, VOCABULARY, tiny_moe
from tests.moe import WIDTH as WIDTHS

PROMPT = [5, 9, 12, 30, 7, 22, 3]
EXPERTS, CHOSEN, HIDDEN = 8, 2, SHARED["hidden_size"]

for_every_family = pytest.mark.parametrize("family", FAMILIES)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def weight_of(router: Router) -> nn.Parameter:
    return router.module.get_parameter(router.parameter)


def inputs_of(routers: list[Router]) -> list[Tensor]:
    """Filled by the next forward pass: what each router is given, [B * S, H]."""
    seen: list[Tensor] = []
    for router in routers:
        router.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, HIDDEN)))
    return seen


def adapter_on(model: Any, routers: list[Router]) -> Any:
    targets = [f"{router.name}.{router.parameter}" for router in routers]
    config = LoraConfig(r=EXPERTS, lora_alpha=EXPERTS, target_modules=[], target_parameters=targets)
    return get_peft_model(model, config).eval()


@for_every_family
def test_they_are_found_in_the_order_of_their_layers(family: str) -> None:
    expected, model = FAMILIES[family], tiny_moe(family)
    routers = find_routers(model)
    assert [router.name for router in routers] == [expected.path.format(layer) for layer in expected.layers]
    for router in routers:
        assert router.module is model.get_submodule(router.name)
        assert weight_of(router).shape == (EXPERTS, HIDDEN)
        known = (router.parameter, router.num_experts, router.top_k, router.score)
        assert known == (expected.weight, EXPERTS, CHOSEN, expected.score)
    assert [router.name for router in last_routers(model, 1)] == [routers[-1].name]
    assert last_routers(model, None) == routers


@for_every_family
def test_inside_an_adapter_they_keep_their_names_and_are_caught(family: str) -> None:
    model = tiny_moe(family)
    plain = find_routers(model)
    wrapped = adapter_on(model, plain[-2:])
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = wrapped
    assert find_routers(wrapped) == plain and find_routers(parallel) == plain
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    check_capture(wrapped, plain)


@for_every_family
def test_caught_logits_are_the_models_own_and_linear_in_what_a_router_is_given(family: str) -> None:
    model = tiny_moe(family)
    routers = find_routers(model)
    seen = inputs_of(routers)
    tokens = ids(PROMPT, PROMPT[::-1])
    with RouterCapture(routers) as captured:
        out = model(tokens, output_router_logits=True, use_cache=False)
    assert len(out.router_logits) == len(captured.logits) == len(routers)
    for router, ours, theirs, given in zip(routers, captured.logits, out.router_logits, seen, strict=True):
        assert ours.shape == (tokens.numel(), EXPERTS) and torch.equal(ours, theirs)
        bias = dict(router.module.named_parameters()).get("bias", torch.zeros(EXPERTS))
        torch.testing.assert_close(ours, given @ weight_of(router).T + bias, rtol=1e-5, atol=1e-5)
    assert model(tokens, use_cache=False).router_logits is None
    check_capture(model, routers[-1:])


@for_every_family
def test_gradients_belong_to_their_layers_and_stop_before_the_first_that_trains(family: str) -> None:
    model = tiny_moe(family).requires_grad_(False)
    routers = find_routers(model)
    trained = routers[-2:] if len(routers) > 2 else routers[-1:]
    frozen = routers[: -len(trained)]
    weights = [weight_of(router).requires_grad_(True) for router in trained]
    seen = inputs_of(trained)
    with RouterCapture(routers) as captured:
        model(ids(PROMPT), use_cache=False)
    live = captured.logits[len(frozen) :]
    assert [logits.requires_grad for logits in captured.logits] == [False] * len(frozen) + [True] * len(trained)
    for layer, logits in enumerate(live):
        direction = torch.randn_like(logits, generator=torch.Generator().manual_seed(layer))
        grads = torch.autograd.grad((logits * direction).sum(), weights, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(grads[layer], direction.T @ seen[layer], rtol=1e-4, atol=1e-5)
        assert all(grad is None for grad in grads[layer + 1 :])
        # Through the mixing of experts.
        assert all(bool(grad.abs().max() > 0) for grad in grads[:layer])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"dbrx", "llama4", "phimoe"} | set(RELATIVES)))
def test_the_score_is_what_the_family_mixes_experts_with(family: str) -> None:
    """The three left out mix outside the router, through all experts, or by another rule for each of the chosen."""
    model = tiny_moe(family)
    router = find_routers(model)[-1]
    seen: list[Any] = []
    router.module.register_forward_hook(lambda *args: seen.append(args[2]))
    model(ids(PROMPT), use_cache=False)
    logits, mixed, chosen = seen[0]
    ours = routing_scores(logits, "auto", router).gather(-1, chosen)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), mixed.float() / mixed.float().sum(-1, keepdim=True))


@pytest.mark.parametrize("family", RELATIVES)
def test_relatives_come_along(family: str) -> None:
    expected, model = RELATIVES[family], tiny_moe(family)
    routers = find_routers(model)
    assert [router.name for router in routers] == [expected.path.format(layer) for layer in expected.layers]
    assert {(r.num_experts, r.top_k, r.score) for r in routers} == {(EXPERTS, CHOSEN, expected.score)}
    check_capture(model, routers)
    check_capture(adapter_on(model, routers[-1:]), routers)


@for_every_family
def test_routing_of_the_prompts_last_token_does_not_depend_on_padding_or_the_answer(family: str) -> None:
    model = tiny_moe(family)
    routers = find_routers(model)
    length, pads = len(PROMPT), [0] * 3

    @torch.no_grad()
    def routing(row: list[int], mask: list[int], position: int) -> Tensor:
        other = [11] * len(row)
        with RouterCapture(routers) as captured:
            model(ids(other, row), attention_mask=ids([1] * len(row), mask), use_cache=False)
        blocks = [logits.view(2, len(row), EXPERTS)[1, position] for logits in captured.logits]
        scores = [routing_scores(block, "auto", router) for block, router in zip(blocks, routers, strict=True)]
        assert [float(block.sum()) for block in scores] == pytest.approx([1.0] * len(routers))
        return torch.cat(scores)

    alone = routing(PROMPT, [1] * length, length - 1)
    for row, mask, position in (
        (pads + PROMPT, [0] * 3 + [1] * length, 3 + length - 1),
        (PROMPT + pads, [1] * length + [0] * 3, length - 1),
        (PROMPT + [40, 41], [1] * (length + 2), length - 1),
    ):
        torch.testing.assert_close(routing(row, mask, position), alone, rtol=0, atol=2e-5)
    assert (routing(PROMPT, [1] * length, length - 2) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "hunyuan_v1_moe"])
def test_gradient_checkpointing_changes_nothing_or_is_refused(family: str) -> None:
    def gradients(**checkpointing: bool) -> list[Tensor]:
        model = adapter_on(tiny_moe(family), find_routers(tiny_moe(family))[-2:])
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
            if "lora_B" in name:
                nn.init.eye_(parameter)
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        model.train()
        routers = last_routers(model, 2)
        with RouterCapture(routers) as captured:
            loss = model(ids(PROMPT), labels=ids(PROMPT), use_cache=False).loss
        kept = list(captured.logits)
        scores = [routing_scores(logits, "auto", r) for logits, r in zip(kept, routers, strict=True)]
        (loss + sum(score[-1].square().sum() for score in scores)).backward()
        assert all(a is b for a, b in zip(kept, captured.logits, strict=True))
        return [parameter.grad for name, parameter in model.named_parameters() if "lora_A" in name]

    plain = gradients()
    assert len(plain) == 2 and all(bool(grad.abs().max() > 0) for grad in plain)
    for ours, theirs in zip(gradients(use_reentrant=False), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    with pytest.raises(ModelError, match=r"reentrant. Write gradient_checkpointing_kwargs: \{use_reentrant: false\}"):
        gradients(use_reentrant=True)


def test_a_pass_that_is_not_one_is_an_error() -> None:
    model = tiny_moe("olmoe")
    routers = find_routers(model)
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.gate ran twice"), RouterCapture(routers):
        model(ids(PROMPT))
        model(ids(PROMPT))
    with pytest.raises(ModelError, match="3 of 3 routers did not run"), RouterCapture(routers):
        pass
    with RouterCapture(routers) as captured:
        model(ids(PROMPT))
    kept = captured.logits
    model(ids(PROMPT[:3]))
    assert captured.logits is kept and not any(router.module._forward_hooks for router in routers)


def test_scores_are_shares_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0], [-200.0, -201.0, -300.0, -199.0]], dtype=torch.bfloat16)
    x = logits.double().numpy()
    soft = np.exp(x - x.max(-1, keepdims=True))
    # Of numbers far below 0 the sigmoid is the exponential, of which only the ratio is left.
    sigmoid = np.where(x < -100, soft, 1 / (1 + np.exp(-np.maximum(x, -100))))
    chosen = np.array([[1, 0, 1, 0], [1, 0, 0, 1]])
    share = lambda values: values / values.sum(-1, keepdims=True)  # noqa: E731
    router: Any = {kind: SimpleNamespace(score=kind, top_k=2) for kind in ("softmax", "sigmoid")}
    for kind, score, expected in (
        ("auto", "softmax", share(soft)),
        ("auto", "sigmoid", share(sigmoid)),
        ("softmax", "sigmoid", share(soft)),
        ("sigmoid_norm", "softmax", share(sigmoid)),
        ("topk", "softmax", share(soft * chosen)),
        ("topk", "sigmoid", share(sigmoid * chosen)),
    ):
        ours = routing_scores(logits, kind, router[score])
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.double().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_a_capture_that_is_not_what_the_model_records_is_an_error() -> None:
    model = tiny_moe("olmoe")
    routers = find_routers(model)
    check_capture(model, routers)
    # After the hooks of the model itself, which does not see what this one makes of the logits.
    routers[1].module.register_forward_hook(lambda *args: (args[2][0] + 1, *args[2][1:]))
    with pytest.raises(ModelError, match=r"the logits of model.layers.1.mlp.gate are not those that OlmoeForCausalLM"):
        check_capture(model, routers)
    check_capture(model, routers[-1:])


def test_a_model_that_records_fewer_routers_than_there_are_is_an_error() -> None:
    model = tiny_moe("mixtral")
    routers = find_routers(model)
    model.register_forward_hook(lambda *args: SimpleNamespace(router_logits=args[2].router_logits[1:]))
    with pytest.raises(ModelError, match="MixtralForCausalLM puts out the logits of 2 routers .* 3 were found in it"):
        check_capture(model, routers)


def test_a_weight_that_deepspeed_spreads_over_processes_has_its_shape() -> None:
    model = tiny_moe("mixtral")
    weight: Any = weight_of(find_routers(model)[0])
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    assert [router.num_experts for router in find_routers(model)] == [EXPERTS] * 3


def jetmoe() -> nn.Module:
    return hf.JetMoeForCausalLM(hf.JetMoeConfig(**{**SHARED, **LOCAL, "kv_channels": 16}))


def deepseek_v4() -> nn.Module:
    return hf.DeepseekV4ForCausalLM(hf.DeepseekV4Config(**{**SHARED, **WIDTHS, **NAMED}, n_routed_experts=8))


def gemma4() -> nn.Module:
    own = {"num_experts": 4, "top_k_experts": 2, "enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY}
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**{**SHARED, **WIDTHS, **own}, layer_types=layers))


def no_experts() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**SHARED, **NAMED, "mlp_only_layers": [0, 1, 2]}))


REFUSALS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SHARED)), "Qwen3ForCausalLM has no routers that could be trained"),
    (no_experts, "Qwen3MoeForCausalLM has no layer with experts: its config makes every layer dense"),
    (jetmoe, "the routers of JetMoeForCausalLM cannot be trained: its attention chooses experts too"),
    (deepseek_v4, "the routers of DeepseekV4ForCausalLM cannot be trained: its first layers choose experts by a hash"),
    (gemma4, "the routers of Gemma4ForCausalLM cannot be trained: it puts out probabilities"),
    (
        lambda: hf.AfmoeForCausalLM(hf.AfmoeConfig(**{**SHARED, **NAMED, **WIDTHS})),
        "the routers of AfmoeForCausalLM cannot be trained: how AfmoeTokenChoiceRouter weighs experts is not known",
    ),
]


@pytest.mark.parametrize(("build", "why"), REFUSALS, ids=["dense", "no_experts", "jetmoe", "hash", "gemma4", "afmoe"])
def test_what_is_not_understood_is_refused_by_name(build: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ModelError, match=rf"{why}.*\. Routers are known for OLMoE.*with parametrization: lora\."):
        find_routers(build())


def test_of_fewer_layers_than_asked_for_all_are_taken() -> None:
    model = tiny_moe("jamba")
    routers = find_routers(model)
    assert last_routers(model, 1) == routers[1:] and last_routers(model, 2) == last_routers(model, 5) == routers


def test_copies_that_an_adapter_makes_of_routers_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp.gate"])
    with pytest.raises(
        ModelError, match=r"copy of a router that modules_to_save trains.*write parametrization: router"
    ):
        find_routers(get_peft_model(tiny_moe("olmoe"), config))
