"""Properties that every online objective has, whatever its equation. A new method joins by its file alone.

Two properties of the preference losses are not here for all: losses of micro-batches add up to that of the whole, and a
change of one completion leaves the others alone, only where no statistics are taken over the micro-batch, which is what
makes a guard one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from alignkit.losses.types import POLICY_ITEM_KINDS, LossOutput, PolicyBatch, count_policy_items
from alignkit.parts.method import Method, load_method, method_names
from tests.losses.batches import loss_value, metric_mean, option_variants
from tests.losses.policies import changed, policy_batch, random_completions, slopes

ONLINE_METHODS = [name for name in method_names() if load_method(name).program == "online"]
LOOK_ACROSS_COMPLETIONS = {"grpo_guard"}
"""Methods whose statistics span the micro-batch."""
SMALL = {"grpo_guard": {"min_count": 2}}
"""Options for small batches."""
FLOATS = ("policy_token_logps", "old_token_logps", "ref_token_logps")

pytestmark = pytest.mark.parametrize("name", ONLINE_METHODS)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=8, deadline=None, derandomize=True)


def draw(name: str, seed: int, variant: int, count: int = 5) -> tuple[Method, Any, PolicyBatch]:
    """A method, options that it accepts, and a batch with all that any of them needs."""
    method = load_method(name)
    variants = options_of(name)
    return method, variants[variant % len(variants)], policy_batch(random_completions(seed, count))


def options_of(name: str) -> list[Any]:
    """Options that a method accepts, for small batches."""
    return [dataclasses.replace(options, **SMALL.get(name, {})) for options in option_variants(load_method(name))]


def by_completion(output: LossOutput) -> list[Tensor]:
    """The values of terms with one for each completion."""
    return [term.weight * term.values for term in output.terms if term.item != "micro_batch"]


@quick
@given(seed=seeds, variant=st.integers(0, 63), scale=st.sampled_from([0.0, 1e-30, 50.0, 1e4, 1e8]))
def test_finite_for_extreme_log_probs(name: str, seed: int, variant: int, scale: float) -> None:
    method, options, batch = draw(name, seed, variant)
    batch = changed(batch, lambda key, t: (t * scale if key in FLOATS else t).float() if t.is_floating_point() else t)
    output = method.objective(batch, options)
    assert all(bool(term.values.isfinite().all()) for term in output.terms)
    assert bool(slopes(output, batch).isfinite().all())
    assert all(bool(metric.values.isfinite().all()) for metric in output.metrics.values())


@quick
@given(seed=seeds, variant=st.integers(0, 63), extra=st.integers(1, 5))
def test_appended_masked_positions_change_nothing(name: str, seed: int, variant: int, extra: int) -> None:
    method, options, batch = draw(name, seed, variant)
    wide = changed(batch, lambda key, t: torch.nn.functional.pad(t, (0, extra)) if t.dim() == 2 else t)
    before, after = method.objective(batch, options), method.objective(wide, options)
    torch.testing.assert_close(after.mean(), before.mean(), rtol=1e-12, atol=1e-12)
    width = batch.completion_mask.shape[1]
    torch.testing.assert_close(slopes(after, wide)[:, :width], slopes(before, batch), rtol=1e-12, atol=1e-12)
    for key, metric in before.metrics.items():
        assert metric_mean(after.metrics[key]) == pytest.approx(metric_mean(metric), rel=1e-12, abs=1e-12)


@quick
@given(seed=seeds, variant=st.integers(0, 63), order=st.permutations(range(5)))
def test_permuting_the_batch_permutes_the_losses(name: str, seed: int, variant: int, order: list[int]) -> None:
    method, options, batch = draw(name, seed, variant)
    shuffled = changed(batch, lambda _, tensor: tensor[order])
    before, after = method.objective(batch, options), method.objective(shuffled, options)
    torch.testing.assert_close(after.mean(), before.mean(), rtol=1e-11, atol=1e-12)
    for one, other in zip(by_completion(before), by_completion(after), strict=True):
        torch.testing.assert_close(other, one[order], rtol=1e-11, atol=1e-12)


@quick
@given(seed=seeds, variant=st.integers(0, 63), cut=st.integers(1, 5))
def test_micro_batches_over_the_global_count_are_the_full_batch(name: str, seed: int, variant: int, cut: int) -> None:
    if name in LOOK_ACROSS_COMPLETIONS:
        return
    method, options, batch = draw(name, seed, variant, count=6)
    full, counts = method.objective(batch, options), count_policy_items(batch.completion_mask)
    if any(term.item == "micro_batch" for term in full.terms):
        return  # a mean within each micro-batch
    parts = [changed(batch, lambda _, t, rows=rows: t[rows]) for rows in (slice(0, cut), slice(cut, None))]
    losses = [loss_value(method.objective(part, options), counts) for part in parts]
    torch.testing.assert_close(sum(losses), loss_value(full, counts), rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x, p.policy_token_logps)[0] for x, p in zip(losses, parts, strict=True)]
    torch.testing.assert_close(torch.cat(grads), slopes(full, batch), rtol=1e-12, atol=1e-12)


@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_what_stands_at_masked_positions_is_never_read(name: str, seed: int, variant: int) -> None:
    method, options, batch = draw(name, seed, variant)
    hidden = ~batch.completion_mask
    clean = changed(batch, lambda _, t: t.masked_fill(hidden, 0) if t.is_floating_point() and t.dim() == 2 else t)
    before, after = method.objective(batch, options), method.objective(clean, options)
    assert torch.equal(before.mean(), after.mean())
    gradient = slopes(before, batch)
    assert torch.equal(gradient, slopes(after, clean)) and not gradient[hidden].any()


@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_bfloat16_is_accumulated_in_float32(name: str, seed: int, variant: int) -> None:
    """The loss of a bfloat16 batch has the bits of the loss of the same numbers held in float32."""
    method, options, batch = draw(name, seed, variant)
    half = changed(batch, lambda _, t: t.bfloat16() if t.is_floating_point() else t)
    single = changed(half, lambda _, t: t.float() if t.is_floating_point() else t)
    low, high = method.objective(half, options), method.objective(single, options)
    for one, other in zip(low.terms, high.terms, strict=True):
        assert one.values.dtype == torch.float32 and torch.equal(one.values, other.values)
    for key, metric in low.metrics.items():
        assert torch.equal(metric.values, high.metrics[key].values), key


def test_terms_items_and_metrics_are_those_documented(name: str) -> None:
    """By default every documented metric and no other, none with a gradient; counts as the bridge counts them."""
    method, _, batch = draw(name, 1, 0)
    assert set(method.objective(batch, method.options()).metrics) == set(method.metrics)
    counts = count_policy_items(batch.completion_mask)
    assert set(counts) == set(POLICY_ITEM_KINDS)
    for options in options_of(name):
        output = method.objective(changed(batch, lambda _, t: t), options)
        assert output.terms[0].values.requires_grad
        assert not any(metric.values.requires_grad for metric in output.metrics.values())
        for term in output.terms:
            assert term.num_items == counts[term.item]


def test_wrong_shapes_are_refused(name: str) -> None:
    """The import hook of the test run checks every annotated shape; this fails if the hook is not active."""
    _, _, batch = draw(name, 2, 0)
    with pytest.raises(TypeCheckError):
        changed(batch, lambda key, tensor: tensor[:2] if key == "advantages" else tensor)
    with pytest.raises(TypeCheckError):
        changed(batch, lambda key, tensor: tensor.float() if key == "completion_mask" else tensor)
