"""What is counted of routers, beside plain loops over their logits; in every family, beside the model switched off."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor

from alignkit.data.prefix import CandidateCollator
from alignkit.models._forward import add_completion_head, completion_logps, use_packed_attention
from alignkit.models._routers import Router, RouterCapture, find_routers
from alignkit.models.full_rank import settle
from alignkit.models.router_watch import METRICS, RouterWatch, watch_adapter
from alignkit.parametrizations._routers import prepare
from tests.moe import FAMILIES, VOCABULARY, tiny_moe

IDS = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 4, 6)
MASK = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()


def adapted(family: str, layers: int | None = None, moved: float = 0.0) -> tuple[Any, RouterWatch]:
    """A tiny model with an adapter of full rank that has moved its routers, and what looks at them."""
    model = tiny_moe(family)
    wrapped = get_peft_model(model, prepare(SimpleNamespace(router_layers=layers, dense_mixer=False), model)).eval()
    settle(wrapped)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert "lora_A" in name
            parameter.data += moved * torch.randn(parameter.shape)
    watch = watch_adapter(wrapped)
    assert watch is not None
    return wrapped, watch


def read(watch: RouterWatch) -> tuple[dict[str, float], dict[str, list[float]]]:
    return watch.read(Accelerator(cpu=True))


def best(logits: Tensor, count: int) -> set[int]:
    return set(sorted(range(len(logits)), key=lambda expert: -logits[expert].item())[:count])


def by_loops(routers: list[Router], live: list[Tensor], base: list[Tensor]) -> dict[str, float]:
    """Every metric from the logits [N, E] of softmax routers, token by token and expert by expert."""
    tokens = [row * 9 + place for row, length in enumerate(LENGTHS) for place in range(length)]
    found: dict[str, list[float]] = {}
    dead = experts = 0
    for router, now, before in zip(routers, live, base, strict=True):
        counts, entropy, changed = [0] * router.num_experts, 0.0, 0
        for token in tokens:
            chosen = best(now[token], router.top_k)
            changed += len(chosen - best(before[token], router.top_k))
            for expert in chosen:
                counts[expert] += 1
            weights = [math.exp(float(x)) for x in now[token]]
            shares = [weight / sum(weights) for weight in weights]
            entropy -= sum(share * math.log(share) for share in shares)
        mean = sum(counts) / len(counts)
        spread = math.sqrt(sum((count - mean) ** 2 for count in counts) / len(counts))
        layer = router.name.split(".")[2]
        dead, experts = dead + counts.count(0), experts + len(counts)
        for name, value in {
            "imbalance": max(counts) / mean,
            "load_variation": spread / mean,
            "busiest_expert": max(counts) / len(tokens),
            "entropy": entropy / len(tokens),
            "churn": changed / (len(tokens) * router.top_k),
        }.items():
            found.setdefault(f"routing/{name}", []).append(value)
            if name in ("imbalance", "entropy", "churn"):
                found[f"routing/{name}/layer_{layer}"] = [value]
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return means | {
        "routing/dead_experts": dead / experts,
        "routing/busiest_expert": max(found["routing/busiest_expert"]),
    }


def test_every_metric_is_that_of_plain_loops_and_padding_does_not_count() -> None:
    model, watch = adapted("olmoe", layers=2, moved=0.2)
    with watch.looking():
        model(IDS, attention_mask=MASK, use_cache=False)
    with RouterCapture(watch.routers) as live:
        model(IDS, attention_mask=MASK, use_cache=False)
    # The first router that trains sees what it saw before; the next one sees what the moved one before it makes of it.
    hidden: list[Tensor] = []
    handles = [r.module.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])) for r in watch.routers]
    model(IDS, attention_mask=MASK, use_cache=False)
    for handle in handles:
        handle.remove()
    base = [h @ router.module.weight.detach().T for h, router in zip(hidden, watch.routers, strict=True)]  # type: ignore[operator]

    metrics, loads = read(watch)
    expected = by_loops(list(watch.routers), live.logits, base)
    assert metrics == pytest.approx(expected, rel=1e-5) and list(metrics) == watch.metrics
    assert set(METRICS) <= set(metrics) and 0 < metrics["routing/churn"] < 1
    assert {layer: len(shares) for layer, shares in loads.items()} == {"1": 8, "2": 8}
    assert all(sum(layer) == pytest.approx(2) for layer in loads.values()), "a token goes to two experts"

    with watch.looking():
        model(IDS.masked_fill(MASK == 0, 3), attention_mask=MASK, use_cache=False)
    assert read(watch)[0] == pytest.approx(metrics, rel=1e-6), "other padding"
    with watch.looking():
        model(IDS, use_cache=False)
    assert read(watch)[0] != pytest.approx(metrics, rel=1e-3), "no padding"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_churn_is_against_the_router_before_training_in_every_family(family: str) -> None:
    model, watch = adapted(family)
    routers = find_routers(model)
    with watch.looking():
        model(IDS, use_cache=False)
    assert read(watch)[0]["routing/churn"] == 0
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    with watch.looking(), RouterCapture(routers) as live:
        model(IDS, use_cache=False)
    with torch.no_grad(), model.disable_adapter(), RouterCapture(routers) as base:
        model(IDS, use_cache=False)
    first, k = routers[0], routers[0].top_k
    pairs = list(zip(live.logits[0].reshape(27, -1), base.logits[0].reshape(27, -1), strict=True))
    changed = sum(len(best(now, k) - best(before, k)) for now, before in pairs)
    layer = next(part for part in first.name.split(".") if part.isdigit())
    assert changed > 0 and read(watch)[0][f"routing/churn/layer_{layer}"] == pytest.approx(changed / (27 * k))


def test_one_pass_with_gradients_is_counted_and_nothing_is_left_behind() -> None:
    model, watch = adapted("olmoe", moved=0.2)
    assert read(watch) == ({}, {})
    with watch.looking():
        model(IDS, attention_mask=MASK, use_cache=False)
        with torch.no_grad():
            model(IDS.flip(1), use_cache=False)
    with watch.looking():
        model(IDS.flip(0), use_cache=False)
    model(IDS.flip(1), use_cache=False)
    several = read(watch)
    with watch.looking():
        model(IDS, attention_mask=MASK, use_cache=False)
    assert several == read(watch) and several[0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_shared_prompts_count_once() -> None:
    model, watch = adapted("qwen3_moe", moved=0.2)
    base = model.get_base_model()
    add_completion_head(base)
    use_packed_attention(base)
    row = {"prompt_ids": [1, 2, 3, 4, 5], "completion_ids": [[6, 7, 8, 9], [9, 8, 1, 1]], "scores": [1.0, 0.0]}
    with watch.looking():
        completion_logps(model, CandidateCollator(0, "packed")([row]))
    packed = read(watch)
    whole = torch.tensor([[*row["prompt_ids"], *completion[:-1]] for completion in row["completion_ids"]])
    counted = torch.ones_like(whole)
    counted[1, :4] = 0  # of the second sequence, the prompt but for its last token
    handle = base.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    with watch.looking():
        model(whole, attention_mask=counted, use_cache=False)
    handle.remove()
    assert packed[0] == pytest.approx(read(watch)[0], rel=1e-5) and packed[0]


def test_without_an_adapter_of_full_rank_there_is_no_churn() -> None:
    model = tiny_moe("olmoe")
    assert watch_adapter(model) is None
    watch = RouterWatch(model, find_routers(model))
    with watch.looking():
        model(IDS, attention_mask=MASK, use_cache=False)
    metrics = read(watch)[0]
    assert list(metrics) == watch.metrics and not any("churn" in name for name in metrics)
    assert len(metrics) == 5 + 2 * 3


def test_every_metric_is_on_the_page_about_reading_a_run(repository: Path) -> None:
    page = (repository / "docs/howto/reading_router_runs.md").read_text()
    assert not [name for name in METRICS if f"| `{name}` |" not in page]
