"""The toy study of 3D-Properties: the directions that are safe to assert, with few seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.claims.three_d_toy import (
    PROMPTS,
    SCENARIOS,
    Parameters,
    Trajectory,
    fit_initial_policies,
    initial_parameters,
    response_logps,
    scenario_distribution,
    train,
)

SEEDS = 12
PROGRAM = Path(__file__).parents[2] / "scripts" / "claims" / "three_d_properties.py"


@cache
def starts() -> dict[str, Parameters]:
    return fit_initial_policies(initial_parameters(SEEDS))


@cache
def run(scenario: str, beta_neg: float = 0.1, eta: float = 0.0) -> Trajectory:
    return train(starts()[scenario], beta_pos=0.1, beta_neg=beta_neg, eta=eta)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_initial_policy_has_the_masses_of_its_scenario(scenario: str) -> None:
    fitted = response_logps(starts()[scenario]).exp()
    assert (fitted - scenario_distribution(scenario)).abs().max().item() < 2e-3
    assert fitted.shape == (SEEDS, PROMPTS, 10)


def test_seeds_do_not_interact() -> None:
    """The same seeds trained alone follow the same course."""
    few = [p[:2] for p in starts()["S1"]]
    alone = train(few, steps=20, beta_pos=0.1, beta_neg=0.1, eta=0.1)
    together = train(starts()["S1"], steps=20, beta_pos=0.1, beta_neg=0.1, eta=0.1)
    np.testing.assert_allclose(together.chosen[:, :2], alone.chosen, rtol=1e-9)


def test_dpo_shows_the_three_properties() -> None:
    dpo = run("S1")
    assert (dpo.log10_rejected[-1] < -6.0).all(), "1: the rejected likelihood drops"
    assert (dpo.grad_ratio_log[-1] > 20.0).all(), "1: the push on it outgrows the push on the chosen response"
    assert dpo.chosen[-1].mean() < 0.9 * dpo.chosen.mean(1).max(), "2: the chosen likelihood degrades"
    assert (dpo.effective_weight[-1] < 0.01).all(), "2: nothing is left to stop it"
    assert dpo.other[-1].mean() > dpo.other.mean(1).min() + 0.1, "3: the mass disperses"


def test_a_smaller_beta_neg_keeps_more_of_the_chosen_likelihood() -> None:
    ends = [run("S1", beta_neg).chosen[-1] for beta_neg in (0.1, 0.08, 0.05)]
    assert ends[0].mean() + 0.1 < ends[1].mean() and ends[1].mean() + 0.03 < ends[2].mean()
    slower = run("S1", 0.08).log10_rejected[50] - run("S1").log10_rejected[50]
    assert (slower > 0).all(), "the early fall of the rejected side is slower"


def test_the_sft_term_removes_the_decline() -> None:
    assert (run("S1", eta=0.1).decline < 0.01).all()
    assert run("S1").decline.mean() > 0.1


def test_rejected_on_policy_ends_with_more_chosen_mass() -> None:
    """With the chosen responses equally likely at the start. Across them (S1 against S4) it does not hold."""
    for on_policy, off_policy in (("S1", "S3"), ("S2", "S4")):
        assert run(on_policy).chosen[-1].mean() > run(off_policy).chosen[-1].mean()


def test_program_writes_its_page_and_keeps_other_sections(tmp_path: Path) -> None:
    page = tmp_path / "three_d_properties.md"
    page.write_text("# Title\n<!-- toy: begin -->\nold\n<!-- toy: end -->\nkept\n", encoding="utf-8")
    command = [sys.executable, str(PROGRAM), "--seeds", "2", "--steps", "50", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n<!-- toy: begin -->\n## Toy model") and text.endswith("<!-- toy: end -->\nkept\n")
    assert "old" not in text.splitlines() and f"torch {torch.__version__}" in text
    assert "{" not in text, "a placeholder was not filled in"
    assert (tmp_path / "three_d_properties.png").stat().st_size > 10_000
