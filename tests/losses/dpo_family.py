"""What every loss of the DPO family is checked by: values, gradients and metrics against the oracle."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from alignkit.losses.types import CandidateBatch, LossOutput
from alignkit.parts.method import load_method
from tests import dpo_oracles as oracles
from tests.dpo_oracles import Modifiers
from tests.losses.batches import batch_of, gradient, metric_mean, random_pairs
from tests.oracles import Pair

TIGHT = {"rel": 1e-12, "abs": 1e-12}
GOLDEN = Pair([-4.0, -6.0], [-12.0], [-5.0, -6.0], [-11.5])
"""Log-ratios 1 and -0.5, with two tokens and one."""
FAR = [Pair([-1.0, -120.0], [-3.0, -2.0], [-1.0, -1.5], [-2.0, -130.0]), GOLDEN]
"""Log-ratios beyond the largest exponent, of either sign, in a pair out of order; and a usual one."""
SHARED: Sequence[Modifiers] = (Modifiers(), Modifiers(ld_alpha=0.3))
WEIGHTED: Sequence[Modifiers] = (*SHARED, Modifiers(use_weighting=True))
SCORED: Sequence[Modifiers] = (
    *WEIGHTED,
    Modifiers(f_divergence_type="forward_kl", ld_alpha=0.6, use_weighting=True),
    Modifiers(f_divergence_type="js_divergence"),
    *(Modifiers(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha) for alpha in (0.5, 1.0, 1.7)),
)
MEET_LARGE_EXPONENTS = ("hinge", "discopop")
"""Losses that are tried on these: the first with the exponents of divergences, the second has one of its own."""
LogSums = list[tuple[list[float], list[float]]]


def awkward_pairs(seed: int) -> tuple[list[Pair], list[tuple[bool, bool]], list[bool]]:
    """Ordinary pairs, and all kinds of padding between them: (pairs, candidate mask, whether the pair trains)."""
    first, second = random_pairs(seed, count=3), [*random_pairs(seed + 1, count=2), GOLDEN]
    padding = [Pair([], [-1.0], [], [-2.0]), Pair([-3.0, -1.0], [], [-2.0, -2.5], []), *random_pairs(seed + 2, 2)]
    present = [(True, True)] * 5 + [(True, False), (False, True)] + [(True, True)] * 3
    return [*first, *padding, *second], present, [True] * 3 + [False] * 4 + [True] * 3


def log_sums_of(pairs: Sequence[Pair], seed: int = 0) -> LogSums:
    """A log of a sum of squared probabilities for every token."""
    draw = random.Random(seed)
    return [
        tuple([-draw.uniform(0.1, 3.0) for _ in side] for side in (pair.policy_chosen, pair.policy_rejected))
        for pair in pairs
    ]


def family_batch(
    pairs: list[Pair],
    present: list[tuple[bool, bool]] | None = None,
    log_sums: LogSums | None = None,
    dtype: torch.dtype = torch.float64,
) -> CandidateBatch:
    """The padded batch of some pairs with all that the family reads, and junk where nothing is."""
    batch = batch_of(pairs, dtype, present)
    if log_sums is not None:
        # The same padding: what is squared stands where log-probs of the policy stand.
        squares = batch_of([Pair(*sums, *sums) for sums in log_sums], dtype).policy_token_logps.detach()
        batch = dataclasses.replace(batch, policy_log_sum_sq_probs=squares.masked_fill(~batch.completion_mask, 5.0))
    junk = batch.policy_token_logps.detach().masked_fill(~batch.completion_mask, -7.0)
    ref = batch.ref_token_logps.masked_fill(~batch.completion_mask, -3.0)
    return dataclasses.replace(batch, policy_token_logps=junk.requires_grad_(), ref_token_logps=ref)


def check_family(
    loss: Callable[..., LossOutput], name: str, modifiers: Sequence[Modifiers], *options: dict[str, float]
) -> None:
    """Everything the equation says, under each set of options; the mutation check calls it with broken losses.

    The first set meets every modifier, the others none.
    """
    pairs, present, trains = awkward_pairs(seed=0)
    cases = [(options[0], each) for each in modifiers] + [(others, Modifiers()) for others in options[1:]]
    for chosen, each in cases:
        check_batch(loss, name, (pairs, present, trains), each, chosen)
        if name in MEET_LARGE_EXPONENTS and (each.f_divergence_type == "reverse_kl") is (name == "discopop"):
            check_batch(loss, name, (FAR, [(True, True)] * 2, [True] * 2), each, chosen, with_metrics=False)


def check_batch(
    loss: Callable[..., LossOutput],
    name: str,
    rows: tuple[list[Pair], list[tuple[bool, bool]], list[bool]],
    modifiers: Modifiers,
    options: dict[str, float],
    *,
    with_metrics: bool = True,
) -> None:
    """One batch against the oracle."""
    pairs, present, trains = rows
    log_sums, per_token = log_sums_of(pairs), name in oracles.PER_TOKEN
    batch = family_batch(pairs, present, log_sums)
    output = loss(batch, **options, **_taken(name, modifiers))
    complete = [i for i, real in enumerate(trains) if real]
    found = [oracles.scored(pairs[i], log_sums[i], modifiers, per_token=per_token) for i in complete]
    outcomes = oracles.LOSSES[name](found, **options)
    values, grad = [0.0] * len(pairs), torch.zeros_like(batch.policy_token_logps)
    for i, own, outcome in zip(complete, found, outcomes, strict=True):
        values[i] = own.weight * outcome.loss
        for side, (slope, slopes) in enumerate(
            ((outcome.chosen, own.chosen_slopes), (outcome.rejected, own.rejected_slopes))
        ):
            row = [own.weight * slope * each / len(pairs) for each in slopes]
            grad[i, side, : len(row)] = torch.tensor(row, dtype=grad.dtype)
    (term,) = output.terms
    assert (term.name, term.item, term.weight, term.num_items.item()) == ("preference", "group", 1.0, len(pairs))
    assert term.values.tolist() == pytest.approx(values, **TIGHT)
    torch.testing.assert_close(gradient(output, batch), grad, rtol=1e-12, atol=1e-12)
    if with_metrics:
        wanted = oracles.metrics([pairs[i] for i in complete], found, outcomes, options["beta"], per_token=per_token)
        check_metrics(output, wanted, name, modifiers)


def check_metrics(output: LossOutput, wanted: dict[str, float], name: str, modifiers: Modifiers) -> None:
    """Every metric of the record has its value; a ratio of gradients is left out where it has no constant part."""
    keys = set(load_method(name).metrics)
    if modifiers.ld_alpha is not None or modifiers.f_divergence_type != "reverse_kl":
        keys = {key for key in keys if not key.startswith("grad_ratio")}
    logged = {key: metric_mean(metric) for key, metric in output.metrics.items()}
    assert logged == pytest.approx({key: wanted[key] for key in keys}, **TIGHT)
    assert not any(metric.values.requires_grad for metric in output.metrics.values())


def _taken(name: str, modifiers: Modifiers) -> dict[str, Any]:
    """The modifiers that a loss takes."""
    own = {item.name for item in dataclasses.fields(load_method(name).options)}
    return {key: value for key, value in vars(modifiers).items() if key in own}


def golden(loss: Callable[..., LossOutput], **options: float) -> float:
    """The loss of ``GOLDEN``."""
    return loss(family_batch([GOLDEN]), **options).mean().item()


def random_family_batch(seed: int, count: int = 6, dtype: torch.dtype = torch.float64) -> CandidateBatch:
    """Random pairs with all that the family reads."""
    pairs = random_pairs(seed, count, max_tokens=9)
    return family_batch(pairs, log_sums=log_sums_of(pairs), dtype=dtype)


def agree(one: LossOutput, other: LossOutput, batch: CandidateBatch, *, scale: float = 1.0, shift: float = 0.0) -> None:
    """``one`` is ``scale`` times ``other``, plus ``shift``, pair by pair and in its gradient; both of one batch."""
    torch.testing.assert_close(one.terms[0].values, scale * other.terms[0].values + shift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(one, batch), scale * gradient(other, batch), rtol=1e-12, atol=1e-14)
