"""What the checks of losses without a reference have in common: one batch with all kinds of padding, judged by pair."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from alignkit.losses.types import CandidateBatch, LossOutput
from tests import oracles
from tests.losses.batches import batch_of, gradient
from tests.losses.test_dpo import TIGHT, awkward_pairs, check_gradient, check_metrics
from tests.oracles import Pair
from tests.reference_free_oracles import Outcome

Metrics = Callable[[list[Outcome]], dict[str, float]]


def without_reference(pairs: list[Pair], **how: Any) -> CandidateBatch:
    """The padded batch of some pairs, of which no reference log-probs are known."""
    return dataclasses.replace(batch_of(pairs, **how), ref_token_logps=None)


def with_zero_reference(pairs: list[Pair], **how: Any) -> CandidateBatch:
    """The same under a reference that gives every token the log-prob 0, so that log-ratios are log-probs."""
    batch = batch_of(pairs, **how)
    return dataclasses.replace(batch, ref_token_logps=batch.ref_token_logps * 0.0)


def check_against(
    loss: Callable[..., LossOutput],
    judge: Callable[[Pair], Outcome],
    options: dict[str, Any],
    *,
    more: list[Pair] = [],  # noqa: B006
    term: tuple[str, float] = ("preference", 1.0),
    likelihood: float = 0.0,
    metrics: Metrics = lambda outcomes: {},
    gradient_ratio: bool = True,
) -> None:
    """Values, gradients and metrics of a loss on one batch.

    Args:
        judge: The oracle.
        options: What the loss is called with.
        more: Pairs beside the usual ones, in front.
        term: Name and weight of the term on pairs.
        likelihood: Weight of the term on the likelihood of chosen responses; 0 expects none.
        metrics: Those that differ from the metrics of every pair.
        gradient_ratio: Whether it is logged.
    """
    pairs, present, trains = awkward_pairs(seed=20)
    pairs, present, trains = more + pairs, [(True, True)] * len(more) + present, [True] * len(more) + trains
    batch = without_reference(pairs, present=present)
    output = loss(batch, **options)
    outcomes = [judge(p) if real else None for p, real in zip(pairs, trains, strict=True)]
    real = [(p, o) for p, o in zip(pairs, outcomes, strict=True) if o is not None]
    assert (output.terms[0].name, output.terms[0].weight) == term
    assert (output.terms[0].item, output.terms[0].num_items.item()) == ("group", len(pairs))
    assert output.terms[0].values.tolist() == pytest.approx([0.0 if o is None else o.loss for o in outcomes], **TIGHT)
    slopes = [(0.0, 0.0) if o is None else o.slopes for o in outcomes]
    slopes = [(term[1] * w / len(pairs), term[1] * r / len(pairs)) for w, r in slopes]
    if likelihood:
        there = [p if is_there[0] else Pair([], [], [], []) for p, is_there in zip(pairs, present, strict=True)]
        tokens = oracles.sft_items(pairs, "token")
        (_, nll) = output.terms
        assert (nll.name, nll.item, nll.weight, nll.num_items.item()) == ("sft", "chosen_token", likelihood, tokens)
        assert nll.values.tolist() == pytest.approx([oracles.sft_sum([p]) for p in there], **TIGHT)
        slopes = [
            (w - likelihood / tokens if p.policy_chosen else w, r) for (w, r), p in zip(slopes, there, strict=True)
        ]
    assert len(output.terms) == (2 if likelihood else 1)
    check_gradient(gradient(output, batch), pairs, slopes)
    of_pairs, of_outcomes = [p for p, _ in real], [o for _, o in real]
    check_metrics(output, _metrics(of_pairs, of_outcomes, gradient_ratio) | metrics(of_outcomes))


def mean(values: list[float]) -> float:
    """The mean of some numbers."""
    return math.fsum(values) / len(values)


def _metrics(pairs: list[Pair], outcomes: list[Outcome], gradient_ratio: bool) -> dict[str, float]:
    plain = oracles.pair_metrics(pairs, 1.0, 1.0)
    kept = {key: value for key, value in plain.items() if key.startswith(("logps", "mean_logps"))}
    if gradient_ratio:
        # Of z by the probabilities of the sequences: dz/dpi = (dz/dlog pi) / pi.
        log_pi = [(math.fsum(p.policy_chosen), math.fsum(p.policy_rejected)) for p in pairs]
        kept["grad_ratio_log"] = mean(
            [math.log(o.rise_l / o.rise_w) + w - r for o, (w, r) in zip(outcomes, log_pi, strict=True)]
        )
        kept["grad_ratio_log_per_token"] = plain["grad_ratio_log_per_token"]
    return kept | {
        "rewards/chosen": mean([o.reward_w for o in outcomes]),
        "rewards/rejected": mean([o.reward_l for o in outcomes]),
        "rewards/margins": mean([o.reward_w - o.reward_l for o in outcomes]),
        "rewards/accuracies": mean([float(o.reward_w > o.reward_l) for o in outcomes]),
        "effective_weight": mean([abs(o.slope) for o in outcomes]),
    }
