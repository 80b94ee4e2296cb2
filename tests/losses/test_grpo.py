"""``grpo_loss`` against its equations, and against TRL's own code."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.losses.grpo import CLIPPED, ITEMS, Regularizers, grpo_loss
from alignkit.losses.types import LossOutput, PolicyBatch, count_policy_items
from tests import policy_oracles as oracles
from tests.losses.batches import metric_mean
from tests.losses.policies import changed, on_tokens, policy_batch, random_completions, slopes
from tests.policy_oracles import Completion, Settings

TIGHT = {"rel": 1e-12, "abs": 1e-12}
EDGES = [oracles.Token(-1.0, -1.0, -1.2, a, entropy=0.3) for a in (1.0, -1.0)]
"""On-policy tokens, r = 1 exactly."""
UNCLIPPED = [oracles.Token(p, o, -1.2, 0.0, entropy=0.4) for p, o in ((-0.5, -2.0), (-2.0, -0.5))]
"""Far from r = 1, but neither better nor worse than expected."""
EXTREMES = [oracles.Token(p, o, r, -1.0) for p, o, r in ((0.0, -60.0, -60.0), (-1e4, 0.0, 0.0), (-60.0, -1e8, 0.0))]
"""Log-ratios far beyond the cut at 20 nats."""


def arguments(s: Settings) -> dict[str, Any]:
    """The same settings as arguments of the loss."""
    return {
        "epsilon_low": s.low,
        "epsilon_high": s.high,
        "level": s.level,
        "aggregation": s.aggregation,
        "delta": None if s.delta == float("inf") else s.delta,
        "sapo_temperatures": s.temperatures,
        "regularizers": Regularizers(s.beta, s.corrects_kl, s.entropy_coef),
    }


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equations say about one batch; the mutation check calls it with broken losses."""
    by_row = random_completions(seed=3, count=9)
    by_token = [*by_row, EDGES, UNCLIPPED]
    plain = [
        Settings(aggregation, level, low=0.1, high=1.1 if aggregation == "cispo" else 0.15, temperatures=(0.8, 1.3))
        for level, aggregation in itertools.product(("token", "sequence"), ITEMS)
    ]
    for s in plain:  # the widest check first: most broken losses are found out by it
        check_case(loss, by_row, replace(s, beta=0.2, entropy_coef=0.3, delta=1.2), by_row=True)
    for s in plain:
        check_case(loss, by_token, replace(s, beta=0.2, corrects_kl=False))
    for s in plain[:: len(ITEMS) + 1]:
        check_case(loss, by_row, replace(s, entropy_coef=0.1), by_row=True, without=("kept", "correction"))
    for s in plain[: len(ITEMS)]:
        check_case(loss, [EDGES[:1]], replace(s, entropy_coef=0.1))
        check_nothing(loss, replace(s, beta=0.1, entropy_coef=0.1))
        check_extremes(loss, s)
    check_on_policy(loss, plain[0])
    for aggregation in (*CLIPPED, "cispo"):
        width = {"epsilon_low": 0.0, "epsilon_high": float(aggregation == "cispo")}
        output = loss(policy_batch([EDGES]), aggregation=aggregation, **width)
        assert not any(metric_mean(m) for key, m in output.metrics.items() if "clip_ratio" in key)


def check_nothing(loss: Callable[..., LossOutput], s: Settings) -> None:
    """No completion has a token."""
    batch = changed(policy_batch(random_completions(seed=3, count=3)), lambda n, t: t & False if "mask" in n else t)
    output = loss(batch, **arguments(s))
    assert output.mean().item() == 0.0 and not slopes(output, batch).any()
    assert all(not term.values.any() for term in output.terms)


def check_on_policy(loss: Callable[..., LossOutput], s: Settings) -> None:
    """Without old log-probs r is 1 and carries the gradient; the same as with those of the policy itself."""
    completions = [[replace(t, old=t.policy) for t in c] for c in random_completions(seed=8, count=4)]
    for given in (policy_batch(completions), policy_batch(completions, without=("old_token_logps",))):
        output, expected = loss(given, **arguments(s)), oracles.grpo(completions, s)
        assert output.mean().item() == pytest.approx(expected.loss, **TIGHT)
        for got, wanted in zip(on_tokens(slopes(output, given), completions), expected.gradient, strict=True):
            assert got == pytest.approx(wanted, **TIGHT)


def check_extremes(loss: Callable[..., LossOutput], s: Settings) -> None:
    """No ratio overflows, in float32 either."""
    batch = changed(policy_batch([EXTREMES] * 2), lambda _, t: t.float() if t.is_floating_point() else t)
    output = loss(batch, **arguments(replace(s, beta=0.1)))
    assert all(term.values.isfinite().all() for term in output.terms) and slopes(output, batch).isfinite().all()


def check_case(
    loss: Callable[..., LossOutput],
    completions: list[Completion],
    s: Settings,
    *,
    by_row: bool = False,
    without: tuple[str, ...] = (),
) -> None:
    batch = policy_batch(completions, longest=s.longest, by_row=by_row, without=without)
    if without:
        completions = [[replace(t, kept=True, correction=1.0) for t in c] for c in completions]
    output, expected = loss(batch, **arguments(s)), oracles.grpo(completions, s)
    check_terms(output, expected, completions, s)
    assert output.mean().item() == pytest.approx(expected.loss, **TIGHT)
    gradient = slopes(output, batch)
    wanted = [slope for row in expected.gradient for slope in row]
    assert gradient[batch.completion_mask].tolist() == pytest.approx(wanted, **TIGHT)
    assert not gradient[~batch.completion_mask].any()
    assert {key: metric_mean(m) for key, m in output.metrics.items()} == pytest.approx(
        oracles.metrics(completions, s, by_row), **TIGHT
    )
    for metric in output.metrics.values():
        assert not metric.values.requires_grad and len(metric.values) == len(metric.counts) == len(completions)


def check_terms(output: LossOutput, expected: oracles.Outcome, completions: list[Completion], s: Settings) -> None:
    """Names, weights, items and their counts, and the values completion by completion."""
    terms = {term.name: term for term in output.terms}
    assert set(terms) == {"policy"} | ({"kl"} if s.beta else set()) | ({"entropy"} if s.entropy_coef else set())
    tokens = sum(map(len, completions))
    items = {"completion": len(completions), "completion_token": tokens, "micro_batch": 1}
    sums = {"policy": (expected.policy_sums, 1.0), "kl": (expected.kl_sums, s.beta)}
    for name in terms.keys() & sums.keys():
        values, weight = sums[name]
        term = terms[name]
        assert (term.item, term.weight) == (ITEMS[s.aggregation], weight)
        assert term.num_items.item() == items[term.item]
        if s.aggregation in ("grpo", "sapo"):
            values = [v / max(len(c), 1) for v, c in zip(values, completions, strict=True)]
        elif s.aggregation == "dr_grpo":
            values = [v / s.longest for v in values]
        elif s.aggregation == "bnpo":
            values = [sum(values) / tokens]
        assert term.values.tolist() == pytest.approx(values, **TIGHT)
    if s.entropy_coef:
        term = terms["entropy"]
        assert (term.item, term.weight, term.num_items.item()) == ("micro_batch", -s.entropy_coef, 1)


def test_agrees_with_the_equations() -> None:
    check_loss(grpo_loss)


def test_item_counts() -> None:
    batch = policy_batch(random_completions(seed=0, count=4))
    counts = {name: int(count) for name, count in count_policy_items(batch.completion_mask).items()}
    assert counts == {"completion": 4, "completion_token": int(batch.completion_mask.sum()), "micro_batch": 1}
    assert set(counts) == set(ITEMS.values())


@pytest.mark.parametrize("aggregation", ITEMS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_is_that_of_the_likelihood(aggregation: str, level: str) -> None:
    """Without old log-probs r = 1: the gradient of a token is minus its advantage, or their mean, times its weight."""
    completions = random_completions(seed=4, count=5)
    batch = policy_batch(completions, without=("old_token_logps", "kept", "correction"))
    output = grpo_loss(batch, level=level, aggregation=aggregation, epsilon_high=1.0)
    weights = oracles.token_weights(completions, Settings(aggregation))
    expected = [[-w * t.advantage for t in c] for w, c in zip(weights, completions, strict=True)]
    for got, wanted in zip(on_tokens(slopes(output, batch), completions), expected, strict=True):
        assert got == pytest.approx(wanted, **TIGHT)
    assert metric_mean(output.metrics["ratio/mean"]) == 1.0


def test_an_advantage_a_completion_is_that_of_all_its_tokens() -> None:
    completions = random_completions(seed=5, count=6)
    by_token = policy_batch(completions)
    first = torch.tensor([c[0].advantage if c else float("nan") for c in completions], dtype=torch.float64)
    by_row = changed(by_token, lambda name, t: first if name == "advantages" else t)
    for level, aggregation in itertools.product(("token", "sequence"), ITEMS):
        options = {"level": level, "aggregation": aggregation}
        a, b = grpo_loss(by_token, **options), grpo_loss(by_row, **options)
        assert a.mean().item() == pytest.approx(b.mean().item(), **TIGHT)
        torch.testing.assert_close(slopes(a, by_token), slopes(b, by_row), rtol=1e-12, atol=1e-12)


def test_what_a_regulariser_needs_is_said() -> None:
    bare = policy_batch(random_completions(seed=6, count=4), without=("ref_token_logps", "entropies"))
    with pytest.raises(ValueError, match="reference log-probs.*ref_token_logps is None"):
        grpo_loss(bare, regularizers=Regularizers(beta=0.1))
    with pytest.raises(ValueError, match="entropies.*entropies is None"):
        grpo_loss(bare, regularizers=Regularizers(entropy_coef=0.1))
    assert "entropy" not in grpo_loss(bare).metrics


# TRL's own code.


def trl_loss(batch: PolicyBatch, s: Settings) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss and the metrics of ``GRPOTrainer._compute_loss``, called on an object with what it reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask = batch.completion_mask
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (batch.policy_token_logps, batch.entropies, None),
        aux_loss_enabled=False, top_entropy_quantile=0.7, get_high_entropy_mask=lambda *a: batch.kept & mask,
        off_policy_mask_threshold=None, importance_sampling_level=s.level, beta=s.beta, loss_type=s.aggregation,
        epsilon_low=s.low, epsilon_high=s.high, use_vllm=True, vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        max_completion_length=batch.max_completion_length, _entropy_bonus_enabled=s.entropy_coef != 0,
        entropy_coef=s.entropy_coef, use_adaptive_entropy=False, _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t, sync_gradients=True
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=s.corrects_kl, delta=arguments(s)["delta"], steps_per_generation=1,
            sapo_temperature_pos=s.temperatures[0], sapo_temperature_neg=s.temperatures[1],
        ),
    )  # fmt: skip
    empty = torch.zeros(mask.shape[0], 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": mask.long(), "completion_mask": mask.long(),
        "advantages": batch.advantages, "old_per_token_logps": batch.old_token_logps,
        "ref_per_token_logps": batch.ref_token_logps, "importance_sampling_ratio": batch.correction,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {key: values[0] for key, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("aggregation", ITEMS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_it_is_the_loss_of_trl(aggregation: str, level: str) -> None:
    completions = [c for c in random_completions(seed=7, count=9) if c]
    clean = changed(policy_batch(completions), lambda _, t: t.nan_to_num(0.0, 0.0, 0.0))
    rows = torch.tensor([c[0].advantage for c in completions], dtype=torch.float64)
    clean = changed(clean, lambda name, t: rows if name == "advantages" else t)
    # TRL holds the temperatures of sapo in float32, where these are exact.
    base = Settings(aggregation, level, high=1.3 if aggregation == "cispo" else 0.25, temperatures=(0.75, 1.25))
    for s in (base, replace(base, beta=0.1, entropy_coef=0.2, delta=1.5), replace(base, beta=0.1, corrects_kl=False)):
        output = grpo_loss(clean, **arguments(s))
        theirs, logged = trl_loss(clean, s)
        torch.testing.assert_close(output.mean(), theirs, rtol=1e-13, atol=1e-13)
        leaves = (clean.policy_token_logps, clean.entropies)
        ours = torch.autograd.grad(output.mean(), leaves, allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad(theirs, leaves, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-14)
        shared = logged.keys() & output.metrics.keys()
        assert shared >= {"entropy"} | ({"kl"} if s.beta else set())
        assert (aggregation not in CLIPPED) or "clip_ratio/region_mean" in shared
        assert {k: metric_mean(output.metrics[k]) for k in shared} == pytest.approx(
            {k: logged[k] for k in shared}, rel=1e-6
        )
