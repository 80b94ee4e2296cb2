"""The oracle of ``spare_mean``, which the suite of all rules compares it with."""

from __future__ import annotations

from alignkit.parts.rule import load_rule
from tests.gradients import oracles

EDIT = ({"spare_share": 0.25}, oracles.mixed(0.75, 0.25))


def test_half_is_the_default() -> None:
    assert load_rule("spare_mean").options().spare_share == 0.5
