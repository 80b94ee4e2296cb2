"""``flow_guard_loss`` against its equation, and on the Gaussians whose ratios the paper normalises."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from alignkit.losses.flow_guard import FlowStepBatch, flow_guard_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import metric_mean
from tests.losses.mutants import loaded, mutants_of
from tests.losses.test_grpo import TIGHT
from tests.losses.test_mutations import CAUGHT

Sample = tuple[list[float], list[float], list[float]]
"""x, mu and mu_old of one sample."""


def log_density(x: list[float], mu: list[float], s: float) -> float:
    """Mean over the dimensions of log N(x; mu, s^2)."""
    terms = [
        -((a - b) ** 2) / (2 * s * s) - math.log(s) - math.log(math.sqrt(2 * math.pi))
        for a, b in zip(x, mu, strict=True)
    ]
    return math.fsum(terms) / len(terms)


def oracle(
    samples: list[Sample], noise: list[float], steps: list[float], advantages: list[float], epsilon: float, bias: str
) -> tuple[list[float], list[list[float]], list[float]]:
    """Losses, slopes in mu and ratios; ``bias`` is ``none`` for Flow-GRPO."""
    count, width = len(samples), len(samples[0][0])
    moved = [math.fsum((m - o) ** 2 for m, o in zip(mu, old, strict=True)) / width for _, mu, old in samples]
    if bias == "batch":
        moved = [math.fsum(moved) / count] * count
    values, ratios, slopes = [], [], [[0.0] * width for _ in samples]
    for i, (x, mu, old) in enumerate(samples):
        s, a = noise[i], max(-5.0, min(5.0, advantages[i]))
        log_ratio = log_density(x, mu, s) - log_density(x, old, s)
        weight = 1.0
        if bias != "none":
            log_ratio, weight = s * (log_ratio + moved[i] / (2 * s * s)), 1 / steps[i]
        r = math.exp(log_ratio)
        ratios.append(r)
        held = (a > 0 and r > 1 + epsilon) or (a < 0 and r < 1 - epsilon)
        values.append(-weight * a * (max(min(r, 1 + epsilon), 1 - epsilon) if held else r))
        if held:
            continue
        factor = -weight * a * r * (1.0 if bias == "none" else s) / count
        for d in range(width):
            slopes[i][d] += factor * (x[d] - mu[d]) / (s * s * width)
            if bias == "sample":
                slopes[i][d] += factor * (mu[d] - old[d]) / (s * s * width)
        if bias == "batch":
            for j, (_, other, older) in enumerate(samples):
                for d in range(width):
                    slopes[j][d] += factor * (other[d] - older[d]) / (s * s * width * count)
    return values, slopes, ratios


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one step."""
    rng = random.Random(0)
    samples, width = [], 3
    for _ in range(20):
        old = [rng.gauss(0, 1) for _ in range(width)]
        mu = [o + rng.gauss(0, 0.1) for o in old]
        samples.append(([o + rng.gauss(0, 0.3) for o in old], mu, old))
    noise, steps = [rng.uniform(0.2, 0.5) for _ in samples], [rng.uniform(0.05, 0.2) for _ in samples]
    advantages = [rng.gauss(0, 1) for _ in samples[:-2]] + [7.0, -9.0]
    x, mu, old = (torch.tensor([sample[i] for sample in samples], dtype=torch.float64) for i in range(3))
    mu.requires_grad_()
    rest = [torch.tensor(values, dtype=torch.float64) for values in (noise, steps, advantages)]
    for bias in ("sample", "batch", "none"):
        given = {"ratio_norm": False} if bias == "none" else {"bias": bias}
        output = loss(FlowStepBatch(x, mu, old, *rest), epsilon=0.02, **given)
        (term,) = output.terms
        values, slopes, ratios = oracle(samples, noise, steps, advantages, 0.02, bias)
        assert (term.name, term.item, term.weight, term.num_items.item()) == ("policy", "sample", 1.0, len(samples))
        assert term.values.tolist() == pytest.approx(values, **TIGHT)
        (grad,) = torch.autograd.grad(output.mean(), mu)
        assert grad.flatten().tolist() == pytest.approx([v for row in slopes for v in row], **TIGHT)
        pairs = list(zip(ratios, advantages, strict=True))
        expected = {
            "ratio/mean": math.fsum(ratios) / len(ratios),
            "ratio/mean_square": math.fsum(r * r for r in ratios) / len(ratios),
            "clip_ratio/low_mean": sum(r < 0.98 and a < 0 for r, a in pairs) / len(ratios),
            "clip_ratio/high_mean": sum(r > 1.02 and a > 0 for r, a in pairs) / len(ratios),
        }
        assert {key: metric_mean(metric) for key, metric in output.metrics.items()} == pytest.approx(expected, **TIGHT)
        assert not any(metric.values.requires_grad for metric in output.metrics.values())


def test_agrees_with_the_equation() -> None:
    check_loss(flow_guard_loss)


def test_every_small_edit_is_noticed() -> None:
    """As for the losses of methods; no method has this one."""
    module = "alignkit.losses.flow_guard"
    alive = []
    for mutant in mutants_of(module):
        with loaded(mutant, module) as broken:
            try:
                check_loss(broken.flow_guard_loss)
            except CAUGHT:
                continue
        alive.append(mutant.description)
    assert not alive, "\n".join(alive)


def gaussian_step(s: float, moved: float = 0.05, count: int = 4000, width: int = 512) -> FlowStepBatch:
    """Samples of N(mu_old, s^2) and a policy whose means are ``moved`` away in every dimension."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    signs = torch.randn(width, generator=generator, dtype=torch.float64).sign()
    old = torch.zeros(count, width, dtype=torch.float64)
    every = torch.ones(count, dtype=torch.float64)
    return FlowStepBatch(old + s * noise, old + moved * signs, old, s * every, 0.1 * every, every)


@pytest.mark.parametrize(
    ("s", "raw_mean", "raw_spread"), [(0.05, 0.607, 0.0442), (0.2, 0.969, 0.01105), (0.8, 0.998, 0.00276)]
)
def test_noise_scales_are_made_comparable(s: float, raw_mean: float, raw_spread: float) -> None:
    """The plain ratio is below 1, the lower the less noise, and spreads by 1/s; the normalised one does neither."""
    batch = gaussian_step(s)

    def log_ratios(**given: bool) -> torch.Tensor:
        return flow_guard_loss(batch, **given).metrics["ratio/mean"].values.log()

    raw, normalized = log_ratios(ratio_norm=False), log_ratios()
    assert raw.exp().mean().item() == pytest.approx(raw_mean, abs=2e-3)
    assert raw.std().item() == pytest.approx(raw_spread, rel=0.05)
    assert normalized.exp().mean().item() == pytest.approx(1.0, abs=2e-4)
    assert normalized.std().item() == pytest.approx(0.05 / math.sqrt(512), rel=0.05)


def test_advantage_positive_samples_reach_the_clip_alone_after_normalisation() -> None:
    """At little noise the plain ratio of every sample is below 1 + eps: a better sample is never clipped."""
    batch = gaussian_step(0.05, count=500)
    plain, guarded = (flow_guard_loss(batch, epsilon=1e-3, ratio_norm=on) for on in (False, True))
    assert metric_mean(plain.metrics["clip_ratio/high_mean"]) == 0.0
    assert metric_mean(guarded.metrics["clip_ratio/high_mean"]) == pytest.approx(0.33, abs=0.07)


def test_an_unknown_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="bias is step; write one of: sample, batch"):
        flow_guard_loss(gaussian_step(0.2, count=2), bias="step")
