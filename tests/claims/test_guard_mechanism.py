"""The mechanism of GRPO-Guard-style clipping shows on drawn ratios, whatever the seed."""

from __future__ import annotations

from functools import cache

import pytest

from scripts.claims.guard_mechanism import Drawn, draw, ratio, sequences, token_facts, tokens

SEEDS = (1, 2)


@cache
def drawn(seed: int) -> Drawn:
    return draw(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tokens_ratio_has_the_mean_one_and_the_variance_of_twice_the_divergence(seed: int) -> None:
    facts = token_facts(drawn(seed))
    assert facts["largest |E r - 1|"] < 1e-5
    assert facts["2 KL / Var log r"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_completions_are_clipped_evenly_on_both_sides_and_at_every_length(seed: int) -> None:
    found = sequences(drawn(seed))
    plain, guard = found["plain"], found["guard"]
    assert plain["mean ratio"] < 0.99 and guard["mean ratio"] == pytest.approx(1.0, abs=2e-3)
    assert plain["above 1"] < 0.4 and guard["above 1"] == pytest.approx(0.5, abs=0.02)
    better, worse = plain["sides"]
    assert worse > 2 * better and ratio(guard["sides"]) < 1.2
    assert ratio(guard["groups"]) < 1.2 < 1.5 < ratio(plain["groups"])


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_of_any_entropy_spread_alike(seed: int) -> None:
    found = tokens(drawn(seed))
    assert ratio(found["plain"]["spread"]) > 1.4
    assert ratio(found["fisher"]["spread"]) < 1.1 and ratio(found["pooled"]["spread"]) < 1.1
    assert ratio(found["pooled"]["outside"]) < ratio(found["plain"]["outside"])
