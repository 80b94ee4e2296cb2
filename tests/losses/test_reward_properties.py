"""Properties that every objective on rewards has, whatever its equation. A new method joins by its file alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.losses.types import REWARD_ITEM_KINDS, RewardBatch, count_reward_items
from alignkit.parts.method import Method, load_method, method_names
from tests.losses.batches import loss_value, metric_mean, option_variants
from tests.losses.rewards import BY_ROW, changed, drawn, leaves_of, pull

REWARD_METHODS = [name for name in method_names() if load_method(name).program == "reward"]
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=15, deadline=None, derandomize=True)
of_methods = pytest.mark.parametrize("name", REWARD_METHODS)


def draw(name: str, seed: int, variant: int, count: int = 5) -> tuple[Method, Any, RewardBatch]:
    """A method, options that it accepts, and a batch of which the last row is not there."""
    method = load_method(name)
    variants = option_variants(method)
    return method, variants[variant % len(variants)], drawn(method, seed, count)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), scale=st.sampled_from([0.0, 1e-30, 50.0, 1e4, 1e8]))
def test_finite_for_extreme_rewards(name: str, seed: int, variant: int, scale: float) -> None:
    method, options, batch = draw(name, seed, variant)
    far = changed(
        batch, lambda key, t: (t * scale if key in leaves_of(batch) else t).float() if t.is_floating_point() else t
    )
    output = method.objective(far, options)
    assert all(bool(term.values.isfinite().all()) for term in output.terms)
    assert all(bool(gradient.isfinite().all()) for gradient in pull(output, far))
    assert all(bool(metric.values.isfinite().all()) for metric in output.metrics.values())


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), order=st.permutations(range(5)))
def test_permuting_the_batch_permutes_the_losses(name: str, seed: int, variant: int, order: list[int]) -> None:
    method, options, batch = draw(name, seed, variant)
    shuffled = changed(batch, lambda key, tensor: tensor[order] if key in BY_ROW else tensor)
    before, after = method.objective(batch, options), method.objective(shuffled, options)
    torch.testing.assert_close(after.mean(), before.mean(), rtol=1e-12, atol=1e-12)
    for one, other in zip(before.terms, after.terms, strict=True):
        assert torch.equal(other.values.view(5, -1), one.values.view(5, -1)[order])


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), cut=st.integers(1, 4))
def test_micro_batches_over_the_global_count_are_the_full_batch(name: str, seed: int, variant: int, cut: int) -> None:
    method, options, batch = draw(name, seed, variant)
    full, counts = method.objective(batch, options), count_reward_items(batch.candidate_mask, batch.labels)
    parts = [
        changed(batch, lambda key, t, rows=rows: t[rows] if key in BY_ROW else t)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    losses = [loss_value(method.objective(part, options), counts) for part in parts]
    torch.testing.assert_close(sum(losses), loss_value(full, counts), rtol=1e-12, atol=1e-12)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_a_row_that_is_not_there_changes_nothing(name: str, seed: int, variant: int) -> None:
    method, options, batch = draw(name, seed, variant)
    others = changed(batch, lambda key, tensor: tensor[:4] if key in BY_ROW else tensor)
    with_it, without = method.objective(batch, options), method.objective(others, options)
    torch.testing.assert_close(with_it.mean(), without.mean(), rtol=1e-12, atol=1e-12)
    for key, gradient in zip(leaves_of(batch), pull(with_it, batch), strict=True):
        if key in BY_ROW:
            assert not gradient[4].any()
    for key, metric in with_it.metrics.items():
        assert metric_mean(metric) == pytest.approx(metric_mean(without.metrics[key]), rel=1e-12, abs=1e-12)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_what_stands_where_nothing_is_read_is_never_read(name: str, seed: int, variant: int) -> None:
    method, options, batch = draw(name, seed, variant)
    assert batch.rewards.isnan().any()
    clean = changed(batch, lambda _, t: t.nan_to_num(nan=0.25) if t.is_floating_point() else t)
    before, after = method.objective(batch, options), method.objective(clean, options)
    for one, other in zip(before.terms, after.terms, strict=True):
        assert torch.equal(one.values, other.values)
    assert all(torch.equal(*pair) for pair in zip(pull(before, batch), pull(after, clean), strict=True))
    assert all(torch.equal(before.metrics[key].values, after.metrics[key].values) for key in before.metrics)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_bfloat16_is_accumulated_in_float32(name: str, seed: int, variant: int) -> None:
    method, options, batch = draw(name, seed, variant)
    half = changed(batch, lambda _, t: t.bfloat16() if t.is_floating_point() else t)
    single = changed(half, lambda _, t: t.float() if t.is_floating_point() else t)
    low, high = method.objective(half, options), method.objective(single, options)
    for one, other in zip(low.terms, high.terms, strict=True):
        assert one.values.dtype == torch.float32 and torch.equal(one.values, other.values)


@of_methods
def test_terms_items_and_metrics_are_those_documented(name: str) -> None:
    method, _, batch = draw(name, 1, 0)
    counts = count_reward_items(batch.candidate_mask, batch.labels)
    assert set(counts) == set(REWARD_ITEM_KINDS)
    for options in option_variants(method):
        output = method.objective(batch, options)
        assert set(output.metrics) == set(method.metrics)
        assert not any(metric.values.requires_grad for metric in output.metrics.values())
        assert all(term.num_items == counts[term.item] for term in output.terms)


@of_methods
def test_every_option_changes_something(name: str) -> None:
    method, _, batch = draw(name, 4, 0)

    def effects(**options: Any) -> list[Any]:
        output = method.objective(batch, method.options(**options))
        return [output.mean().item(), [gradient.tolist() for gradient in pull(output, batch)]]

    # What the rows and the head are made of is seen before there is a batch.
    given = {"dimensions", "projection_dim", "step_separator", "train_on_last_step_only"}
    for item in dataclasses.fields(method.options):
        if item.name in given:
            continue
        values = item.metadata["option"].choices or ([0.0, 0.3] if isinstance(item.default, float) else [])
        assert all(effects(**{item.name: v}) != effects() for v in values if v != item.default), item.name
