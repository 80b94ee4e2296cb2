"""Properties that every objective on routed rows has, whatever its equation. A new method joins by its file alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from alignkit.losses.types import ROUTED_ITEM_KINDS, RoutedBatch, count_routed_items
from alignkit.parts.method import Method, load_method, method_names
from tests.losses.batches import loss_value, metric_mean, option_variants
from tests.losses.routed import BY_TOKEN, LEAVES, pulls, random_rows, rerouted, routed_batch

ROUTED_METHODS = [name for name in method_names() if load_method(name).program == "router"]
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=15, deadline=None, derandomize=True)
of_methods = pytest.mark.parametrize("name", ROUTED_METHODS)


def draw(name: str, seed: int, variant: int, count: int = 5) -> tuple[Method, Any, RoutedBatch]:
    """A method, options that it accepts, and a batch."""
    method = load_method(name)
    variants = option_variants(method)
    return method, variants[variant % len(variants)], routed_batch(random_rows(seed, count), step=3)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), scale=st.sampled_from([0.0, 1e-30, 50.0, 1e4, 1e8]))
def test_finite_for_extreme_log_probs(name: str, seed: int, variant: int, scale: float) -> None:
    method, options, batch = draw(name, seed, variant)
    scaled = {"policy_token_logps": scale}
    batch = rerouted(batch, lambda k, t: (t * scaled.get(k, 1.0)).float() if t.is_floating_point() else t)
    output = method.objective(batch, options)
    assert all(bool(term.values.isfinite().all()) for term in output.terms)
    assert all(bool(pull.isfinite().all()) for pull in pulls(output, batch))
    assert all(bool(metric.values.isfinite().all()) for metric in output.metrics.values())


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), extra=st.integers(1, 5))
def test_appended_masked_positions_change_nothing(name: str, seed: int, variant: int, extra: int) -> None:
    method, options, batch = draw(name, seed, variant)
    wide = rerouted(batch, lambda key, t: torch.nn.functional.pad(t, (0, extra)) if key in BY_TOKEN else t)
    before, after = method.objective(batch, options), method.objective(wide, options)
    torch.testing.assert_close(after.mean(), before.mean(), rtol=1e-12, atol=1e-12)
    (by_token, by_expert), (wide_token, wide_expert) = pulls(before, batch), pulls(after, wide)
    assert torch.equal(wide_token[:, : by_token.shape[1]], by_token) and torch.equal(wide_expert, by_expert)
    for key, metric in before.metrics.items():
        assert metric_mean(after.metrics[key]) == pytest.approx(metric_mean(metric), rel=1e-12, abs=1e-12)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), order=st.permutations(range(5)))
def test_permuting_the_batch_permutes_the_losses(name: str, seed: int, variant: int, order: list[int]) -> None:
    method, options, batch = draw(name, seed, variant)
    shuffled = rerouted(batch, lambda _, tensor: tensor[order])
    before, after = method.objective(batch, options), method.objective(shuffled, options)
    torch.testing.assert_close(after.mean(), before.mean(), rtol=1e-12, atol=1e-12)
    for one, other in zip(before.terms, after.terms, strict=True):
        assert torch.equal(other.values.view(5, -1), one.values.view(5, -1)[order])


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), cut=st.integers(1, 5))
def test_micro_batches_over_the_global_count_are_the_full_batch(name: str, seed: int, variant: int, cut: int) -> None:
    method, options, batch = draw(name, seed, variant, count=6)
    full, counts = method.objective(batch, options), count_routed_items(batch.label_mask)
    parts = [rerouted(batch, lambda _, t, rows=rows: t[rows]) for rows in (slice(0, cut), slice(cut, None))]
    losses = [loss_value(method.objective(part, options), counts) for part in parts]
    torch.testing.assert_close(sum(losses), loss_value(full, counts), rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, [getattr(p, n) for n in LEAVES]) for loss, p in zip(losses, parts, strict=True)]
    for both, whole in zip(zip(*grads, strict=True), pulls(full, batch), strict=True):
        torch.testing.assert_close(torch.cat(both), whole, rtol=1e-12, atol=1e-12)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63), row=st.integers(0, 3))
def test_a_row_without_trained_tokens_is_none(name: str, seed: int, variant: int, row: int) -> None:
    """Though its routing and its target are known: it has no gradient, and the others have the loss they have alone."""
    method, options, batch = draw(name, seed, variant)
    blank = rerouted(batch, lambda key, t: t.index_fill(0, torch.tensor([row]), 0) if key == "label_mask" else t)
    others = rerouted(batch, lambda _, t: t[[i for i in range(5) if i != row]])
    output = method.objective(blank, options)
    assert not any(pull[row].any() for pull in pulls(output, blank))
    torch.testing.assert_close(output.mean(), method.objective(others, options).mean(), rtol=1e-12, atol=1e-12)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_what_stands_where_nothing_is_read_is_never_read(name: str, seed: int, variant: int) -> None:
    method, options, batch = draw(name, seed, variant)
    clean = rerouted(batch, lambda _, t: t.nan_to_num(nan=0.25) if t.is_floating_point() else t)
    assert any(
        getattr(batch, f.name).isnan().any() for f in dataclasses.fields(batch) if f.name not in ("step", "num_layers")
    )
    before, after = method.objective(batch, options), method.objective(clean, options)
    for one, other in zip(before.terms, after.terms, strict=True):
        assert torch.equal(one.values, other.values)
    assert all(torch.equal(*pair) for pair in zip(pulls(before, batch), pulls(after, clean), strict=True))
    assert all(torch.equal(before.metrics[key].values, after.metrics[key].values) for key in before.metrics)


@of_methods
@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_bfloat16_is_accumulated_in_float32(name: str, seed: int, variant: int) -> None:
    """The loss of a bfloat16 batch has the bits of the loss of the same numbers held in float32."""
    method, options, batch = draw(name, seed, variant)
    half = rerouted(batch, lambda _, t: t.bfloat16() if t.is_floating_point() else t)
    single = rerouted(half, lambda _, t: t.float() if t.is_floating_point() else t)
    low, high = method.objective(half, options), method.objective(single, options)
    for one, other in zip(low.terms, high.terms, strict=True):
        assert one.values.dtype == torch.float32 and torch.equal(one.values, other.values)
    for key, metric in low.metrics.items():
        assert torch.equal(metric.values, high.metrics[key].values), key


@of_methods
def test_terms_items_and_metrics_are_those_documented(name: str) -> None:
    """Under any options every documented metric and no other, none with a gradient; counts as the bridge counts."""
    method, _, batch = draw(name, 1, 0)
    counts = count_routed_items(batch.label_mask)
    assert set(counts) == set(ROUTED_ITEM_KINDS)
    for options in option_variants(method):
        output = method.objective(batch, options)
        assert set(output.metrics) == set(method.metrics)
        assert output.terms[0].values.requires_grad
        assert not any(metric.values.requires_grad for metric in output.metrics.values())
        assert all(term.num_items == counts[term.item] for term in output.terms)


@of_methods
def test_every_option_changes_something(name: str) -> None:
    """The loss, what it pulls at or what it logs, where its ``only_with`` says that it has an effect."""
    method, _, batch = draw(name, 4, 0)

    def effects(**options: Any) -> list[Any]:
        output = method.objective(batch, method.options(**options))
        metrics = {key: metric_mean(metric) for key, metric in output.metrics.items()}
        return [output.mean().item(), [pull.tolist() for pull in pulls(output, batch)], metrics]

    for item in dataclasses.fields(method.options):
        info, base = item.metadata["option"], effects()
        values = info.choices or ([0.0, 0.3] if isinstance(item.default, float) else [9])
        assert all(effects(**{item.name: v}) != base for v in values if v != item.default), item.name
        if info.only_with is not None:
            off = {info.only_with.key: 0.0}
            assert all(effects(**off, **{item.name: v}) == effects(**off) for v in values), item.name


@of_methods
def test_wrong_shapes_are_refused(name: str) -> None:
    """The import hook of the test run checks every annotated shape; this fails if the hook is not active."""
    _, _, batch = draw(name, 2, 0)
    with pytest.raises(TypeCheckError):
        rerouted(batch, lambda key, tensor: tensor[:, :2] if key == "target_routing" else tensor)
    with pytest.raises(TypeCheckError):
        rerouted(batch, lambda key, tensor: tensor.float() if key == "has_target" else tensor)
