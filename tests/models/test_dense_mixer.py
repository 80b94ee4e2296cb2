"""DenseMixer: outputs as they were, gradients as if every expert had answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.errors import ModelError
from alignkit.models._routers import Router, find_routers
from alignkit.models.dense_mixer import DenseMixer

WIDTH, EXPERTS, CHOSEN = 8, 4, 2
SIZES = {
    "vocab_size": 24, "hidden_size": WIDTH, "intermediate_size": 12, "moe_intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
    "experts_implementation": "eager",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """How a family weighs its experts, as its equations say.

    Attributes:
        family: Its model type.
        divides: Whether the scores of the chosen are divided by their sum.
        score: What the logits go through, ``softmax`` or ``sigmoid``.
        scale: What all weights are multiplied by.
        settings: Keys of its configuration.
    """

    family: str
    divides: bool
    score: str
    scale: float
    settings: dict[str, Any]


def of(family: str, score: str = "softmax", *, divides: bool = True, scale: float = 1.0, **settings: Any) -> Rule:
    return Rule(family, divides, score, scale, settings)


_LATENT = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
_ONE_GROUP = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_GROUPS = {**_LATENT, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
_SPARSE = {**_GROUPS, "mlp_layer_types": ["sparse", "sparse"], "norm_topk_prob": True}
RULES = {
    "olmoe": of("olmoe", divides=False),
    "olmoe, divided": of("olmoe", norm_topk_prob=True),
    "mixtral": of("mixtral"),
    "qwen2_moe": of("qwen2_moe", divides=False),
    "qwen3_moe": of("qwen3_moe", divides=False, norm_topk_prob=False),
    "qwen3_moe, divided": of("qwen3_moe", norm_topk_prob=True),
    "qwen3_5_moe": of("qwen3_5_moe_text"),
    "qwen3_next": of("qwen3_next", norm_topk_prob=True),
    "deepseek_v2, groups": of("deepseek_v2", divides=False, scale=2.5, **_GROUPS, topk_method="group_limited_greedy"),
    "gpt_oss": of("gpt_oss"),
    "granitemoe": of("granitemoe"),
    "granitemoeshared": of("granitemoeshared"),
    "granitemoehybrid": of("granitemoehybrid", layer_types=["attention", "attention"], mamba_n_heads=4, mamba_d_head=4),
    "ernie4_5_moe": of("ernie4_5_moe"),
    "hunyuan_v1_moe": of("hunyuan_v1_moe", moe_topk=CHOSEN),
    "jamba": of("jamba", divides=False, expert_layer_offset=1, expert_layer_period=2),
    "flex_olmo": of("flex_olmo", divides=False),
    "minimax": of("minimax"),
    "minimax_m2": of("minimax_m2", "sigmoid"),
    "deepseek_v3, groups": of("deepseek_v3", "sigmoid", scale=2.5, **_GROUPS),
    "deepseek_v3, undivided": of("deepseek_v3", "sigmoid", divides=False, scale=2.5, **_GROUPS, norm_topk_prob=False),
    "deepseek_v32": of("deepseek_v32", "sigmoid", scale=2.5, **_SPARSE),
    "glm_moe_dsa": of("glm_moe_dsa", "sigmoid", scale=2.5, **_SPARSE),
    "glm4_moe_lite": of("glm4_moe_lite", "sigmoid", scale=2.5, **_SPARSE),
    "glm4_moe": of("glm4_moe", "sigmoid", first_k_dense_replace=1),
    "kimi_linear": of("kimi_linear", "sigmoid", scale=2.5, **_GROUPS),
    "dots1": of("dots1", "sigmoid", **_ONE_GROUP, norm_topk_prob=True),
    "exaone_moe": of("exaone_moe", "sigmoid", scale=2.5, **_ONE_GROUP, norm_topk_prob=True, routed_scaling_factor=2.5),
    "solar_open": of("solar_open", "sigmoid", **_ONE_GROUP, norm_topk_prob=True),
    "mimo_v2_flash": of("mimo_v2_flash", "sigmoid", n_group=1, topk_group=1),
    "lfm2_moe": of("lfm2_moe", "sigmoid", num_dense_layers=0, layer_types=["full_attention"] * 2, norm_topk_prob=True),
}


def mixture(rule: Rule, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model of the family in training mode, with weights large enough for unlike experts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(rule.family, **{**SIZES, **rule.settings})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in name and tensor.is_floating_point() and "inv_freq" not in name:
                tensor.normal_(std=0.3)
    return model.train()


def block_of(model: nn.Module, router: Router) -> nn.Module:
    return model.get_submodule(router.name.rpartition(".")[0])


def answer(experts: Any, expert: int, x: list[float]) -> list[float]:
    """What one expert says to one token, number by number."""
    up = experts.gate_up_proj[expert].tolist()
    down = experts.down_proj[expert].tolist()
    if type(experts).__name__ == "GptOssExperts":  # [in, out], gate and up in turns, biases, clipped
        joint = [sum(x[h] * up[h][i] for h in range(len(x))) for i in range(len(up[0]))]
        joint = [a + b for a, b in zip(joint, experts.gate_up_proj_bias[expert].tolist(), strict=True)]
        gates, ups = [min(a, 7.0) for a in joint[::2]], [max(min(a, 7.0), -7.0) for a in joint[1::2]]
        inner = [(u + 1) * g / (1 + math.exp(-1.702 * g)) for g, u in zip(gates, ups, strict=True)]
        said = [sum(inner[i] * down[i][h] for i in range(len(inner))) for h in range(len(x))]
        return [a + b for a, b in zip(said, experts.down_proj_bias[expert].tolist(), strict=True)]
    joint = [sum(w * v for w, v in zip(row, x, strict=True)) for row in up]
    half = len(joint) // 2
    inner = [g / (1 + math.exp(-g)) * u for g, u in zip(joint[:half], joint[half:], strict=True)]
    return [sum(w * v for w, v in zip(row, inner, strict=True)) for row in down]


def logit_gradient(
    rule: Rule, logits: list[float], chosen: list[int], gains: list[float]
) -> tuple[list[float], list[float]]:
    """Weights of the chosen and the straight-through gradient of one token's logits, by the equations.

    Args:
        rule: The family's.
        logits: One an expert.
        chosen: The experts that answer.
        gains: <dL/dy, E_i(x)> of every expert i.
    """
    if rule.score == "softmax":
        largest = max(logits)
        powers = [math.exp(v - largest) for v in logits]
        scores = [p / sum(powers) for p in powers]
    else:
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    share = sum(scores[i] for i in chosen) if rule.divides else 1.0
    weights = [scores[i] / share for i in chosen]
    # Before the division each score passes as it is; what it adds to the sum lowers the weights of the chosen.
    lowered = sum(w * gains[i] for w, i in zip(weights, chosen, strict=True)) if rule.divides else 0.0
    of_scores = [rule.scale * (gain - lowered) / share for gain in gains]
    if rule.score == "softmax":
        mean = sum(p * d for p, d in zip(scores, of_scores, strict=True))
        gradient = [p * (d - mean) for p, d in zip(scores, of_scores, strict=True)]
    else:
        gradient = [s * (1 - s) * d for s, d in zip(scores, of_scores, strict=True)]
    return [rule.scale * w for w in weights], gradient


@contextmanager
def seen(router: Router, experts: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the router put out and what the experts were given."""
    found: dict[str, Tensor] = {}

    def of_router(module: nn.Module, args: Any, output: Any) -> None:
        found["logits"] = output[router.logits_index].detach()

    def of_experts(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            found.update(hidden=args[0].detach(), chosen=args[1], weights=args[2].detach())

    handles = [router.module.register_forward_hook(of_router), experts.register_forward_pre_hook(of_experts)]
    yield found
    for handle in handles:
        handle.remove()


def run(block: nn.Module, x: Tensor) -> Tensor:
    output = block(x)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", RULES)
def test_gradient_is_that_of_a_loop_over_all_experts(name: str) -> None:
    rule = RULES[name]
    model = mixture(rule)
    router = find_routers(model)[-1]
    block, parameter = block_of(model, router), router.module.get_parameter(router.parameter)
    experts: Any = block.get_submodule("experts")
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    direction = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    plain = run(block, x)
    with DenseMixer(model, [router]), seen(router, experts) as found:
        mixed = run(block, x)
        (mixed * direction).sum().backward()
    assert torch.equal(mixed, plain)

    expected = torch.zeros(EXPERTS, WIDTH, dtype=torch.float64)
    for token in range(3):
        hidden = found["hidden"][token].tolist()
        gains = [
            sum(a * b for a, b in zip(answer(experts, i, hidden), direction[0, token].tolist(), strict=True))
            for i in range(EXPERTS)
        ]
        chosen = found["chosen"][token].tolist()
        weights, gradient = logit_gradient(rule, found["logits"][token].tolist(), chosen, gains)
        assert len(chosen) == CHOSEN
        assert weights == pytest.approx(found["weights"][token].tolist(), rel=1e-5), "the rule is not the family's"
        expected += torch.tensor([[g * h for h in hidden] for g in gradient], dtype=torch.float64)
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)


def test_hidden_states_hear_of_the_others_through_the_router_alone() -> None:
    model = mixture(RULES["mixtral"])
    router = find_routers(model)[-1]
    block = block_of(model, router)
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    kept: list[Tensor] = []
    with DenseMixer(model, [router]), seen(router, block.get_submodule("experts")) as found:
        handle = router.module.register_forward_hook(lambda m, args, out: kept.append(out[0]) or out[0].retain_grad())
        (block(x) * direction).sum().backward()
        handle.remove()
    assert x.grad is not None and kept[0].grad is not None

    alone = x.detach().requires_grad_()
    answered = block.get_submodule("experts")(alone.view(3, WIDTH), found["chosen"], found["weights"])
    (answered * direction[0]).sum().backward()
    through_router = kept[0].grad @ router.module.get_parameter("weight")
    torch.testing.assert_close(x.grad[0], alone.grad[0] + through_router)


def of_sentence(model: nn.Module, ids: list[list[int]], mask: list[list[int]] | None = None) -> Tensor:
    """The loss of the last real token of each row but one; a mean of nothing else."""
    tokens = torch.tensor(ids)
    output: Any = model(input_ids=tokens, attention_mask=torch.tensor(mask or [[1] * len(row) for row in ids]))
    return output.logits.float().log_softmax(-1)[:, 1].gather(-1, tokens[:, 2:3]).mean().neg()


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_experts_that_were_never_chosen_are_heard() -> None:
    model = mixture(RULES["mixtral"], torch.float32)
    router = find_routers(model)[-1]
    name, experts = f"{router.name}.weight", block_of(model, router).get_submodule("experts")
    with seen(router, experts) as found:
        before = gradients(model, lambda: of_sentence(model, [[3, 7, 5]]))
    # Of the last layer only the token whose prediction counts has a gradient.
    idle = [i for i in range(EXPERTS) if i not in found["chosen"][1].tolist()]
    with DenseMixer(model, [router]):
        after = gradients(model, lambda: of_sentence(model, [[3, 7, 5]]))
    assert len(idle) == EXPERTS - CHOSEN
    assert before[name][idle].abs().max() < 1e-8, "the division leaves them none"
    assert (after[name][idle].norm(dim=-1) > 1e-3).all()
    for other in before:
        if "layers.1.mlp.experts" in other or other == "lm_head.weight":
            assert torch.equal(before[other], after[other]), "experts and what comes after learn as before"


def test_an_adapter_on_the_router_learns_it_too_and_so_under_checkpointing_and_padding() -> None:
    ids, padded = [[3, 7, 5], [9, 2, 4]], [[3, 7, 5, 0, 0], [9, 2, 4, 0, 0]]
    mask = [[1, 1, 1, 0, 0]] * 2
    plain = mixture(RULES["qwen3_moe, divided"], torch.float32)
    name = "model.layers.1.mlp.gate"
    with DenseMixer(plain, find_routers(plain)):
        full = gradients(plain, lambda: of_sentence(plain, ids))[f"{name}.weight"]

    lora = LoraConfig(r=EXPERTS, lora_alpha=EXPERTS, target_modules=[], target_parameters=["mlp.gate.weight"])
    model = get_peft_model(mixture(RULES["qwen3_moe, divided"], torch.float32), lora).train()
    a, b = f"base_model.model.{name}.lora_A.default.weight", f"base_model.model.{name}.lora_B.default.weight"
    with torch.no_grad():  # a start at the base's own router, from which A moves
        for key, tensor in model.named_parameters():
            if "lora_" in key:
                tensor.copy_(torch.eye(EXPERTS) if "lora_B" in key else torch.zeros_like(tensor))
    with DenseMixer(model, find_routers(model)):
        bare = gradients(model, lambda: of_sentence(model, ids))
        longer = gradients(model, lambda: of_sentence(model, padded, mask))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients(model, lambda: of_sentence(model, ids))
    assert set(bare) == {key for key, p in model.named_parameters() if p.requires_grad} >= {a, b}
    torch.testing.assert_close(bare[a], full, rtol=1e-4, atol=1e-6)
    for key in bare:
        assert torch.equal(again[key], bare[key])
        torch.testing.assert_close(longer[key], bare[key], rtol=1e-4, atol=1e-6)


def counted(model: nn.Module, router: Router) -> tuple[list[bool], Any]:
    """Whether autocast was on, at each call of the experts beside ``router``."""
    calls: list[bool] = []
    experts = block_of(model, router).get_submodule("experts")
    return calls, experts.register_forward_pre_hook(lambda *_: calls.append(torch.is_autocast_enabled("cpu")))


def test_only_a_training_step_asks_the_others() -> None:
    model = mixture(RULES["olmoe"], torch.float32)
    router = find_routers(model)[-1]
    calls, _ = counted(model, router)
    mixer = DenseMixer(model, [router])
    of_sentence(model, [[3, 7, 5]]).backward()
    assert len(calls) == 1 + EXPERTS // CHOSEN
    calls.clear()
    with torch.no_grad():
        of_sentence(model, [[3, 7, 5]])
    model.eval()
    of_sentence(model, [[3, 7, 5]]).backward()
    model.generate(torch.tensor([[3, 7, 5]]), max_new_tokens=1, min_new_tokens=1)
    assert len(calls) == 3
    mixer.remove()
    model.train()
    before = len(calls)
    of_sentence(model, [[3, 7, 5]]).backward()
    assert len(calls) == before + 1
    assert not router.module._forward_hooks, "nothing of it is left"


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_kernels_and_autocast_change_no_more_than_rounding(kernel: str) -> None:
    model = mixture(RULES["mixtral"], torch.float32)
    routers = find_routers(model)[-1:]
    name = f"{routers[0].name}.weight"
    with DenseMixer(model, routers):
        exact = gradients(model, lambda: of_sentence(model, [[3, 7, 5]]))[name]
        model.set_experts_implementation(kernel)
        fused = gradients(model, lambda: of_sentence(model, [[3, 7, 5]]))[name]
        calls, _ = counted(model, routers[0])

        def in_bfloat16() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return of_sentence(model, [[3, 7, 5]])

        rounded = gradients(model, in_bfloat16)[name]
    torch.testing.assert_close(fused, exact, rtol=1e-4, atol=1e-6)
    assert calls == [True] * 3, "the backward pass computes as the forward pass did"
    assert torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", r"feed_forward\.router \(Llama4Router\): it multiplies what goes into an expert"),
        ("phimoe", r"mlp\.router \(PhimoeTopKRouter\): it estimates the gradient of its choice in its own way"),
    ],
)
def test_other_ways_to_mix_are_refused_by_name(family: str, reason: str) -> None:
    model = mixture(of(family), torch.float32)
    routers = find_routers(model)
    with pytest.raises(ModelError, match=rf"dense_mixer: true cannot be used with model\.layers\.\d\.{reason}.*Remove"):
        DenseMixer(model, routers)
    assert not any(module._forward_hooks for module in model.modules())


def test_packed_experts_are_refused() -> None:
    class PackedExperts(nn.Module):
        pass

    model = mixture(RULES["gpt_oss"], torch.float32)
    block_of(model, find_routers(model)[-1]).experts = PackedExperts()
    with pytest.raises(ModelError, match=r"are PackedExperts, not GptOssExperts.*Load the model with plain, unpacked"):
        DenseMixer(model, find_routers(model))
