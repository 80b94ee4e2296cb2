"""Properties that every preference objective has, whatever its equation. A new method joins by its file alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from alignkit.losses.types import CandidateBatch, LossOutput, count_items
from alignkit.parts.method import Method, load_method
from tests.losses.batches import (
    HELD_CONSTANT,
    PER_TOKEN,
    PREFERENCE_METHODS,
    batch_loss,
    gradient,
    looks_across_groups,
    loss_value,
    metric_mean,
    option_variants,
    random_batch,
    replace,
)

pytestmark = pytest.mark.parametrize("name", PREFERENCE_METHODS)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=12, deadline=None, derandomize=True)


def draw_options(method: Method, index: int) -> Any:
    variants = option_variants(method)
    return variants[index % len(variants)]


def values_of(output: LossOutput) -> Tensor:
    """The unreduced values of all terms, one row a group."""
    return torch.stack([term.weight * term.values for term in output.terms], dim=-1)


@quick
@given(seed=seeds, variant=st.integers(0, 63), scale=st.sampled_from([0.0, 1e-30, 1.0, 50.0, 1e4, 1e8]))
def test_finite_for_extreme_log_probs(name: str, seed: int, variant: int, scale: float) -> None:
    method = load_method(name)
    options = draw_options(method, variant)
    batch = random_batch(method, seed, size=4, options=options, scale=scale, dtype=torch.float32)
    output = method.objective(batch, options)
    assert bool(values_of(output).isfinite().all())
    assert bool(gradient(output, batch).isfinite().all())
    assert all(bool(m.values.isfinite().all()) for m in output.metrics.values())


@quick
@given(seed=seeds, variant=st.integers(0, 63), extra=st.integers(1, 7))
def test_appended_masked_positions_change_nothing(name: str, seed: int, variant: int, extra: int) -> None:
    method = load_method(name)
    options = draw_options(method, variant)
    batch = random_batch(method, seed, size=4, options=options)
    wide = replace(batch, lambda key, t: torch.nn.functional.pad(t, (0, extra)) if key in PER_TOKEN else t)
    before, after = method.objective(batch, options), method.objective(wide, options)
    torch.testing.assert_close(values_of(after), values_of(before), rtol=1e-12, atol=1e-12)
    width = batch.completion_mask.shape[-1]
    torch.testing.assert_close(gradient(after, wide)[..., :width], gradient(before, batch), rtol=1e-12, atol=1e-12)
    for key, metric in before.metrics.items():
        assert metric_mean(after.metrics[key]) == pytest.approx(metric_mean(metric), rel=1e-12, abs=1e-12)


@quick
@given(seed=seeds, variant=st.integers(0, 63), order=st.permutations(range(5)))
def test_permuting_the_batch_permutes_the_losses(name: str, seed: int, variant: int, order: list[int]) -> None:
    method = load_method(name)
    options = draw_options(method, variant)
    batch = random_batch(method, seed, size=5, options=options)
    shuffled = replace(batch, lambda _, tensor: tensor[order])
    before, after = (values_of(method.objective(b, options)) for b in (batch, shuffled))
    assert before.shape[0] == 5, "a preference objective returns one value a group"
    torch.testing.assert_close(after, before[order], rtol=1e-12, atol=1e-12)


@quick
@given(seed=seeds, variant=st.integers(0, 63), cut=st.integers(1, 5))
def test_micro_batches_over_the_global_count_are_the_full_batch(name: str, seed: int, variant: int, cut: int) -> None:
    """But where a method says that it compares the groups of a micro-batch with each other."""
    method = load_method(name)
    variants = [options for options in option_variants(method) if not looks_across_groups(method, options)]
    if not variants:
        pytest.skip("it always does")
    options = variants[variant % len(variants)]
    batch = random_batch(method, seed, size=6, options=options)
    counts = count_items(batch.completion_mask)
    full = method.objective(batch, options)
    parts = [replace(batch, lambda _, t, rows=rows: t[rows]) for rows in (slice(0, cut), slice(cut, None))]
    outputs = [method.objective(part, options) for part in parts]
    losses = [loss_value(output, counts) for output in outputs]
    torch.testing.assert_close(sum(losses), loss_value(full, counts), rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x, p.policy_token_logps)[0] for x, p in zip(losses, parts, strict=True)]
    torch.testing.assert_close(torch.cat(grads), gradient(full, batch), rtol=1e-12, atol=1e-12)
    for term, first, second in zip(full.terms, outputs[0].terms, outputs[1].terms, strict=True):
        assert first.num_items + second.num_items == term.num_items == counts[term.item]


def test_what_looks_across_groups_does(name: str) -> None:
    """A method that says so under some options is no sum over groups there, or it would be refused for nothing."""
    method = load_method(name)
    saying_so = [options for options in option_variants(method) if looks_across_groups(method, options)]
    differences = []
    for options in saying_so:
        batch = random_batch(method, seed=11, size=6, options=options)
        first = replace(batch, lambda _, t: t[:3])
        whole, part = (values_of(method.objective(b, options)) for b in (batch, first))
        differences.append((whole[:3] - part).abs().max().item())
    assert not saying_so or max(differences) > 1e-3


@quick
@given(seed=seeds, variant=st.integers(0, 63), row=st.integers(0, 3), absent=st.booleans())
def test_a_fully_masked_row_has_zero_gradient(name: str, seed: int, variant: int, row: int, absent: bool) -> None:
    """Also with ``candidate_mask`` still set: a row without a token is padding however it is marked."""
    method = load_method(name)
    options = draw_options(method, variant)
    batch = random_batch(method, seed, size=4, options=options)

    def blank(key: str, tensor: Tensor) -> Tensor:
        if key == "scores" or (key == "candidate_mask" and not absent):
            return tensor
        return tensor.index_fill(0, torch.tensor([row]), 0)

    masked = replace(batch, blank)
    output = method.objective(masked, options)
    grad = gradient(output, masked)
    assert torch.equal(grad[row], torch.zeros_like(grad[row]))
    assert bool(grad.isfinite().all())
    others = [i for i in range(4) if i != row]
    expected = values_of(method.objective(replace(batch, lambda _, t: t[others]), options))
    torch.testing.assert_close(values_of(output)[others], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(values_of(output)[row], torch.zeros_like(values_of(output)[row]))


def test_what_stands_at_masked_positions_is_never_read(name: str) -> None:
    method = load_method(name)
    for options in option_variants(method):
        batch = random_batch(method, seed=5, size=6, options=options)
        hidden = ~batch.completion_mask
        assert hidden.any()
        dirty = replace(
            batch, lambda key, t, h=hidden: t.masked_fill(h, -7.0) if key in PER_TOKEN - {"completion_mask"} else t
        )
        before, after = method.objective(batch, options), method.objective(dirty, options)
        assert torch.equal(values_of(after), values_of(before))
        grad = gradient(after, dirty)
        assert torch.equal(grad, gradient(before, batch))
        assert not grad[hidden].any()


@quick
@given(seed=seeds, variant=st.integers(0, 63))
def test_bfloat16_is_accumulated_in_float32(name: str, seed: int, variant: int) -> None:
    """The loss of a bfloat16 batch has the bits of the loss of the same numbers held in float32."""
    method = load_method(name)
    options = draw_options(method, variant)
    half = random_batch(method, seed, size=4, options=options, scale=20.0, dtype=torch.bfloat16)
    single = replace(half, lambda _, tensor: tensor.float() if tensor.is_floating_point() else tensor)
    low, high = method.objective(half, options), method.objective(single, options)
    assert all(term.values.dtype == torch.float32 for term in low.terms)
    assert torch.equal(values_of(low), values_of(high))
    for key, metric in low.metrics.items():
        assert torch.equal(metric.values, high.metrics[key].values), key


def test_gradcheck(name: str) -> None:
    method = load_method(name)
    for options in option_variants(method, HELD_CONSTANT):
        if vars(options).get("form") == "kto":
            continue  # The divergence that answers are measured against is held constant.
        batch = random_batch(method, seed=0, size=3, options=options)

        def loss(logps: Tensor, options: Any = options, batch: CandidateBatch = batch) -> Tensor:
            fields = {**vars(batch), "policy_token_logps": logps}
            moved = CandidateBatch(**fields)
            return batch_loss(method.objective(moved, options), moved)

        assert torch.autograd.gradcheck(
            loss, (batch.policy_token_logps,), eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=True
        )


def test_no_gradient_reaches_the_reference(name: str) -> None:
    method = load_method(name)
    for options in option_variants(method):
        batch = random_batch(method, seed=1, size=3, options=options)
        output = method.objective(batch, options)
        assert all(not m.values.requires_grad for m in output.metrics.values())
        assert output.terms[0].values.requires_grad


def test_metrics_are_those_documented(name: str) -> None:
    """By default every documented key and no other; never an undocumented one."""
    method = load_method(name)
    batch = random_batch(method, seed=2, size=3)
    assert set(method.objective(batch, method.options()).metrics) == set(method.metrics)
    for options in option_variants(method):
        batch = random_batch(method, seed=2, size=3, options=options)
        assert set(method.objective(batch, options).metrics) <= set(method.metrics)


def test_mean_is_what_the_bridge_minimises(name: str) -> None:
    method = load_method(name)
    for options in option_variants(method):
        batch = random_batch(method, seed=3, size=3, options=options)
        output = method.objective(batch, options)
        torch.testing.assert_close(output.mean(), batch_loss(output, batch), rtol=1e-12, atol=1e-12)


def test_wrong_shapes_are_refused(name: str) -> None:
    """The import hook of the test run checks every annotated shape; this fails if the hook is not active."""
    method = load_method(name)
    batch = random_batch(method, seed=4, size=3)
    with pytest.raises(TypeCheckError):
        replace(batch, lambda key, tensor: tensor[:2] if key == "scores" else tensor)
    with pytest.raises(TypeCheckError):
        replace(batch, lambda key, tensor: tensor.float() if key == "completion_mask" else tensor)
