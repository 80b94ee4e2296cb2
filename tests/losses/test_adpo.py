"""``adpo_loss`` against its equation: every target, ragged groups, ties, the temperature rule, the extra terms."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from alignkit.losses.adpo import AdaptiveTau, adpo_loss
from alignkit.losses.targets import TARGETS
from alignkit.losses.types import LossOutput
from alignkit.objectives.adpo import ADPOOptions, anchor, needs
from tests import list_oracles
from tests.list_oracles import Candidate, Row
from tests.losses.batches import VOCABULARY, batch_loss, list_batch, metric_mean
from tests.losses.test_d2o import candidate
from tests.losses.test_dpo import TIGHT, check_metrics

RULE = AdaptiveTau(base=0.8, entropy_coef=0.7, error_coef=1.5, minimum=1.15, maximum=1.9)


def awkward_rows(seed: int) -> list[Row]:
    """Groups of two to four, with ties, outliers, holes and padding; the best candidate first."""
    rng = random.Random(seed)

    def group(*scores: float) -> Row:
        return [candidate(rng, score) for score in scores]

    at_reference = [Candidate([-1.0, -2.5], [-1.0, -2.5], s) for s in (0.7, 0.2, -0.3)]
    surprising = [Candidate([-9.0, -8.0], [-8.5, -7.0], -0.6), Candidate([-10.0], [-7.0], -0.8)]
    cut = [Candidate([-31.0, -1.0], [-4.0, -1.2], 1.0), Candidate([-0.5], [-1.5], 0.5)]
    with_hole = [*group(2.0, 1.5), candidate(rng, 1.2, tokens=0), *group(1.0)]
    padded = [*group(0.9, 0.4), candidate(rng, 3.0, present=False)]
    # Lower and higher than any group that trains: they must not enter the scale of the rewards.
    padding = [
        group(-50.0),
        group(60.0),
        [candidate(rng, 5.0, present=False)],
        [candidate(rng, 0.0, tokens=0, present=False)],
    ]
    return [
        group(1.0, 0.6, 0.1, -0.4),
        group(1.0, 0.0),
        group(0.5, 0.5, 0.2),
        group(0.3, 0.3, 0.3, 0.3),
        group(40.0, 1.0, 0.5, 0.0),
        group(1.0, 0.0, 0.0, 0.0),
        at_reference,
        surprising,
        cut,
        with_hole,
        padded,
        *padding,
    ]


@dataclass(frozen=True)
class Case:
    """Options of one check."""

    target: str
    reduction: str = "sum"
    tau: float | AdaptiveTau = 0.9
    beta_reward: float = 0.6
    uniform: bool = False
    coefficient: float = 0.0
    eta: float = 0.0
    sft: str = "token"


CASES = [
    *(Case(target) for target in TARGETS),
    Case("listwise_zscore", reduction="mean", coefficient=0.3),
    Case("listwise_raw", reduction="mean", tau=RULE),
    Case("plackett_luce", uniform=True, eta=0.2),
    Case("listwise_zscore", tau=RULE, eta=0.2, sft="sequence_sum"),
]


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about some batches; the mutation check calls it with broken losses."""
    rows = awkward_rows(seed=30)
    for case in CASES:
        check_case(loss, rows, case)
    check_case(loss, scored(rows, (0.75, 0.5, 0.5, 0.25), (1.0, 0.0)), Case("listwise_raw", tau=RULE))
    # A candidate with the score that padding has is not tied with padding.
    check_case(loss, scored(rows, (0.75, 0.5, 0.5, 0.25), (0.0, -1.0)), Case("plackett_luce"))
    check_ties(loss)


def check_ties(loss: Callable[..., LossOutput]) -> None:
    """The third candidate has the tokens of the first, whose log-probs it has but for the last digits.

    Scores 3 > 2 > 1 > 0.5 > 0.5: u is 1, 2, 1 + rounding, 1 / 2, 1 / 2 in turn. By hand, of the nine pairs of unequal
    score: (0, 1) wrong, (0, 2) tied, (0, 3) and (0, 4) right, (1, 2), (1, 3), (1, 4) right, (2, 3) and (2, 4) right.
    """
    for rounding in (-1e-6, 0.0, 1e-6):
        values = [(1.0, 3.0), (2.0, 2.0), (1.0 + rounding, 1.0), (0.5, 0.5), (0.5, 0.5)]
        batch = list_batch([[Candidate([u - 3.0], [-3.0], score) for u, score in values]])
        known = replace(batch, first_equal=torch.tensor([[0, 1, 0, 3, 4]]))
        right = metric_mean(loss(known).metrics["rewards/accuracies"])
        assert right == pytest.approx(7.5 / 9, **TIGHT), rounding


def scored(rows: list[Row], *scores: tuple[float, ...]) -> list[Row]:
    """The first rows with other scores."""
    return [
        [Candidate(c.policy, c.ref, score) for c, score in zip(row, own, strict=True)]
        for row, own in zip(rows, scores, strict=False)
    ]


def check_case(loss: Callable[..., LossOutput], rows: list[Row], case: Case) -> None:
    batch = list_batch(rows, reference=not case.uniform)
    output = loss(
        batch,
        target=case.target,
        tau=case.tau,
        beta_reward=case.beta_reward,
        logp_reduction=case.reduction,
        anchor_kl_coef=case.coefficient,
        eta=case.eta,
        sft_normalization=case.sft,
    )
    existing = [[c for c in row if c.exists] for row in rows]
    taus = [case.tau] * len(rows)
    if isinstance(case.tau, AdaptiveTau):
        rule = tuple(getattr(case.tau, f.name) for f in fields(AdaptiveTau))
        taus = list_oracles.adaptive_taus(existing, rule, VOCABULARY)
    us = [
        list_oracles.anchored(row, tau, case.reduction, case.uniform) for row, tau in zip(existing, taus, strict=True)
    ]
    targets = [list_oracles.adpo_choices([c.score for c in row], case.target, case.beta_reward) for row in existing]
    outcomes = [list_oracles.adpo(u, choices) for u, choices in zip(us, targets, strict=True)]
    shares = [list_oracles.adpo(u, shared(choices)) for u, choices in zip(us, targets, strict=True)]
    check_terms(output, rows, case, [o.loss for o in outcomes])
    check_metrics(output, expected_metrics(existing, us, shares, taus, case))
    grad = torch.autograd.grad(batch_loss(output, batch), batch.policy_token_logps)[0].tolist()
    for b, row in enumerate(rows):
        gradient = iter(outcomes[b].gradient)
        for k, one in enumerate(row):
            share = next(gradient) / taus[b] / list_oracles.length(one, case.reduction) if one.exists else 0.0
            wanted = [share / groups_of(rows) + e for e in extra_gradient(rows, case, b, k)]
            assert grad[b][k][: len(one.policy)] == pytest.approx(wanted, **TIGHT)
            assert not any(grad[b][k][len(one.policy) :])


def shared(choices: list[dict[int, float]]) -> list[dict[int, float]]:
    """The mean target of all choices among the same candidates, in the place of each: equals share a place."""
    alike = [[other for other in choices if other.keys() == choice.keys()] for choice in choices]
    return [{i: list_oracles.mean([one[i] for one in ones]) for i in ones[0]} for ones in alike]


def groups_of(rows: list[Row]) -> int:
    """Rows with a token."""
    return sum(any(c.policy for c in row) for row in rows)


def sft_items(rows: list[Row], case: Case) -> int:
    return groups_of(rows) if case.sft == "sequence_sum" else sum(len(row[0].policy) for row in rows)


def check_terms(output: LossOutput, rows: list[Row], case: Case, losses: list[float]) -> None:
    """Names, denominators and values of all terms."""
    tokens = sum(len(c.policy) for row in rows for c in row)
    wanted: dict[str, tuple[Any, ...]] = {"preference": ("group", 1.0, groups_of(rows), losses)}
    if case.coefficient:
        gaps = [list_oracles.k3([c for c in row if c.present]) for row in rows]
        wanted["anchor_kl"] = ("completion_token", case.coefficient, tokens, gaps)
    if case.eta:
        nll = [-math.fsum(row[0].policy) * row[0].present for row in rows]
        item = {"token": "chosen_token", "sequence_sum": "group"}[case.sft]
        wanted["sft"] = (item, case.eta, sft_items(rows, case), nll)
    assert [term.name for term in output.terms] == list(wanted)
    for term, (item, weight, count, values) in zip(output.terms, wanted.values(), strict=True):
        assert (term.item, term.weight, term.num_items.item()) == (item, weight, count)
        assert term.values.tolist() == pytest.approx(values, **TIGHT), (term.name, case)


def extra_gradient(rows: list[Row], case: Case, b: int, k: int) -> list[float]:
    """Of the divergence from the anchor and the SFT term, in every token of one candidate."""
    one = rows[b][k]
    tokens = sum(len(c.policy) for row in rows for c in row)
    pull = case.eta / sft_items(rows, case) if k == 0 and one.present else 0.0
    share = case.coefficient / tokens if one.present else 0.0
    return [share * list_oracles.k3_slope(p, r) - pull for p, r in zip(one.policy, one.ref, strict=True)]


def expected_metrics(
    rows: list[Row], us: list[list[float]], outcomes: list[Any], taus: list[float], case: Case
) -> dict[str, float]:
    """Means over the groups of at least two, each figure with its own denominator."""
    mean = list_oracles.mean
    kept = [i for i, row in enumerate(rows) if len(row) > 1]
    metrics = {
        "adpo/target_entropy": mean([outcomes[i].entropy for i in kept]),
        "adpo/target_kl": mean([outcomes[i].loss - outcomes[i].entropy for i in kept]),
        "effective_weight": mean([0.5 * math.fsum(map(abs, outcomes[i].gradient)) for i in kept]),
        "adpo/tau": mean([taus[i] for i in kept]),
        "rewards/margins": mean([us[i][0] - us[i][-1] for i in kept]),
    }
    for role, place in (("chosen", 0), ("rejected", -1)):
        metrics[f"rewards/{role}"] = mean([us[i][place] for i in kept])
        metrics[f"logps/{role}"] = mean([math.fsum(rows[i][place].policy) for i in kept])
        metrics[f"mean_logps/{role}"] = mean([t for i in kept for t in rows[i][place].policy])
        if not case.uniform:
            metrics[f"logratio/{role}"] = mean([rows[i][place].logratio for i in kept])
    if not case.uniform:
        gaps = [abs(c.logratio) / list_oracles.length(c, case.reduction) for i in kept for c in rows[i]]
        metrics["adpo/anchor_drift"] = mean(gaps)
    verdicts = []
    for i in kept:
        for a, u_a in zip(rows[i], us[i], strict=True):
            for other, u_other in zip(rows[i], us[i], strict=True):
                if a.score > other.score:
                    verdicts.append(0.5 if u_a == u_other else float(u_a > u_other))
    metrics["rewards/accuracies"] = mean(verdicts)
    return metrics


def test_agrees_with_the_equation() -> None:
    check_loss(adpo_loss)


def test_defaults_of_the_loss_are_those_of_the_method() -> None:
    options = ADPOOptions()
    defaults = {p.name: p.default for p in inspect.signature(adpo_loss).parameters.values() if p.name != "batch"}
    assert defaults.pop("tau") == options.base_tau == 1.0
    assert defaults == {name: getattr(options, name) for name in defaults}
    assert (options.target, options.beta_reward, options.anchor, options.adaptive_tau) == (
        "listwise_zscore",
        0.5,
        "fixed",
        False,
    )


def test_tau_can_be_given_as_beta() -> None:
    assert ADPOOptions(beta=0.1).base_tau == pytest.approx(10.0, **TIGHT)
    assert ADPOOptions(tau=0.8).base_tau == 0.8


def test_only_the_uniform_anchor_needs_no_reference() -> None:
    choices = next(f for f in fields(ADPOOptions) if f.name == "anchor").metadata["option"].choices
    assert {a: needs(ADPOOptions(anchor=a)) for a in choices} == {
        a: set() if a == "uniform" else {"reference"} for a in choices
    }


def test_moving_anchors_have_a_schedule() -> None:
    assert anchor(ADPOOptions()) is None and anchor(ADPOOptions(anchor="uniform")) is None
    for kind in ("ema", "periodic", "kl_triggered"):
        schedule = anchor(ADPOOptions(anchor=kind))
        assert schedule is not None and schedule.kind == kind
        assert (schedule.decay, schedule.threshold, schedule.window) == (0.99, 0.1, 10)
        assert schedule.drift_metric == "adpo/anchor_drift"


def test_a_whole_number_is_a_temperature() -> None:
    rng = random.Random(2)
    batch = list_batch([[candidate(rng, score) for score in (1.0, 0.5, 0.0)]])
    whole, fraction = (adpo_loss(batch, tau=tau).mean().item() for tau in (2, 2.0))
    assert whole == fraction != adpo_loss(batch).mean().item()


def test_what_is_missing_is_named() -> None:
    batch = list_batch([[candidate(random.Random(1), s) for s in (1.0, 0.0)]], reference=False)
    with pytest.raises(ValueError, match="ref_token_logps is None"):
        adpo_loss(batch, anchor_kl_coef=0.1)
    unknown = type(batch)(**{**vars(batch), "vocabulary_size": None})
    with pytest.raises(ValueError, match="vocabulary_size is None"):
        adpo_loss(unknown, tau=RULE)


def test_equal_candidates_are_a_tie_however_they_round() -> None:
    check_ties(adpo_loss)
