"""Verdicts on routers: on synthetic logs, both ways, and on routers that were broken by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor

from alignkit.models.full_rank import settle
from alignkit.models.router_watch import watch_adapter
from alignkit.parametrizations._routers import prepare
from alignkit.reports import router_verdicts
from alignkit.reports.series import Verdict
from alignkit.runs.health import HealthMonitor
from tests.moe import VOCABULARY, tiny_moe

Log = tuple[int, Mapping[str, float]]
Curve = Callable[[float], float]
SETTINGS = {"learning_rate": 6e-5, "router_layers": 5, "manifold_coef": 3.0}


def logs(count: int = 30, held_out: Curve | None = None, seed: int = 0, **curves: Curve) -> Iterator[Log]:
    """Logs of routers that move a little, but for some curves over 0..1, and an evaluation every ten logs."""
    draw = random.Random(seed)
    usual: dict[str, Curve] = {
        "entropy": lambda t: 2.5 - 0.5 * t + draw.gauss(0, 0.05),
        "busiest_expert": lambda t: 0.5 + 0.2 * t + draw.gauss(0, 0.03),
        "dead_experts": lambda t: 0.05 + abs(draw.gauss(0, 0.02)),
        "churn": lambda t: 0.2 * t,
    }
    for i in range(1, count + 1):
        found = {f"routing/{name}": curve(i / count) for name, curve in (usual | curves).items()}
        yield i * 5, {"loss": 2.0 + draw.gauss(0, 0.1), "grad_norm": 1.0, **found}
        if held_out and i % 10 == 0:
            yield i * 5, {"eval_loss": 2.0 - i / 100, "eval_mean_token_accuracy": held_out(i / count)}


def verdicts(found: Iterator[Log], settings: Mapping[str, Any] = SETTINGS) -> list[Verdict]:
    monitor = HealthMonitor(settings)
    for step, log in found:
        monitor.observe(step, log)
    return monitor.verdicts


@pytest.mark.parametrize("seed", range(3))
def test_routers_that_move_a_little_are_healthy(seed: int) -> None:
    assert verdicts(logs(seed=seed, held_out=lambda t: 0.5 + 0.1 * t)) == []


def test_entropy_that_is_lost() -> None:
    (verdict,) = verdicts(logs(entropy=lambda t: 2.5 * (1 - t) ** 2))
    assert verdict.name == "router_collapse" and "fell from 2.03 to 0.469 nats a token" in verdict.evidence, (
        "2.5 * 0.9^2 and 2.5 * (13/30)^2"
    )
    assert verdict.fixes[:3] == (
        "learning_rate: 2e-05   # slower",
        "router_layers: 2   # fewer routers",
        "manifold_coef: 1   # a weaker pull to the neighbours",
    )
    assert verdicts(logs(entropy=lambda t: 0.05)) == [], "it began there"
    assert verdicts(logs(9, entropy=lambda t: 2.5 * (1 - t))) == [], "too few logs"


def test_one_expert_for_every_token() -> None:
    (verdict,) = verdicts(logs(busiest_expert=lambda t: min(1.0, 0.4 + t)), settings={})
    assert verdict.name == "router_collapse" and "goes to one expert" in verdict.evidence
    assert len(verdict.fixes) == 3 and verdict.fixes[0].startswith("learning_rate: ...")
    assert verdicts(logs(busiest_expert=lambda t: 0.95)) == [], "the model came so"
    assert verdicts(logs(busiest_expert=lambda t: 0.5 + 0.35 * t)) == []


def test_experts_that_die() -> None:
    (verdict,) = verdicts(logs(dead_experts=lambda t: 0.3 * t))
    assert verdict.name == "experts_died" and "of the experts" in verdict.evidence
    assert verdict.fixes[0].startswith("dense_mixer: true")
    assert verdicts(logs(dead_experts=lambda t: 0.4)) == [], "they were dead before"


def test_churn_counts_where_held_out_rows_suffer() -> None:
    falls: Curve = lambda t: 0.6 - 0.1 * t  # noqa: E731
    (verdict,) = verdicts(logs(churn=lambda t: 0.6 * t, held_out=falls))
    assert verdict.name == "harmful_churn" and "routing/churn is 0.36" in verdict.evidence
    assert "fell from 0.567 at step 50 to 0.533" in verdict.evidence and verdict.step == 100
    assert verdicts(logs(churn=lambda t: 0.6 * t, held_out=lambda t: 0.6)) == []
    assert verdicts(logs(held_out=falls)) == [], "few choices are others"


def broken(change: Callable[[Tensor, float], Tensor]) -> list[Verdict]:
    """Verdicts on what is measured of a tiny mixture whose routers are changed by hand, from log to log."""
    model = tiny_moe("olmoe")
    wrapped = get_peft_model(model, prepare(SimpleNamespace(router_layers=2, dense_mixer=False), model)).eval()
    settle(wrapped)
    watch = watch_adapter(wrapped)
    assert watch is not None
    moved = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    starts = [router.module.weight.detach().clone() for router in watch.routers]  # type: ignore[operator]
    monitor, accelerator = HealthMonitor(SETTINGS), Accelerator(cpu=True)
    torch.manual_seed(0)
    for i in range(14):
        for parameter, start in zip(moved, starts, strict=True):
            parameter.data = change(start, i / 13)
        with watch.looking():
            wrapped(torch.randint(2, VOCABULARY, (8, 16)), use_cache=False)
        monitor.observe(i + 1, {"loss": 2.0, **watch.read(accelerator)[0]})
    return monitor.verdicts


def test_routers_broken_by_hand_are_found_and_others_not() -> None:
    assert broken(lambda start, t: 0.1 * t * start.roll(1, 0)) == []

    (certain,) = broken(lambda start, t: 40 * t**4 * start)
    assert certain.name == "router_collapse" and "routing/entropy fell" in certain.evidence

    # Of the first experts one of each pair always likes a token, as they are opposites; to the rest all is alike.
    def silence(start: Tensor, t: float) -> Tensor:
        pairs = torch.stack([start[0], -start[0], start[2], -start[2]])
        return min(1.0, 1.5 * t) * (torch.cat([pairs, torch.zeros_like(start[4:])]) - start)

    (died,) = broken(silence)
    assert died.name == "experts_died" and "to 0.5 of the experts" in died.evidence


def test_names_are_those_that_are_logged() -> None:
    from alignkit.models.router_watch import METRICS

    names = (router_verdicts.ENTROPY, router_verdicts.BUSIEST, router_verdicts.DEAD, router_verdicts.CHURN)
    assert set(names) <= set(METRICS)
