"""The bandits of ADPO are what they claim to be, and the anchor helps under noise with few seeds."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import DPOTrainer

from scripts.claims.adpo_noise import COLOURS, FREE, RAW, best_rows, claim_rows, of_family
from scripts.claims.adpo_toy import (
    CONDITIONS,
    FAMILIES,
    ITEMS,
    OBJECTIVES,
    Bandits,
    batch_indices,
    corrupt,
    dpo_extremes,
    flip_rate,
    make_bandits,
    robust_dpo,
    robust_loss,
    train,
    win_mass,
)

SEEDS = 3
SMALL: tuple[tuple[str, int], ...] = (("clean", 0), ("gauss + outliers", 3), ("heavy tails", 3), ("adversarial", 3))


@cache
def bandits() -> Bandits:
    return make_bandits(SEEDS, SMALL)


def noise(family: str, severity: int) -> tuple[torch.Tensor, torch.Tensor]:
    true = torch.randn(2, 4000, ITEMS, generator=torch.Generator().manual_seed(1))
    return true, corrupt(true, family, severity, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["clean", "shift"])
def test_clean_and_shifted_rewards_are_seen_as_they_are(family: str) -> None:
    true, seen = noise(family, 1)
    assert torch.equal(true, seen) and (flip_rate(true, seen) == 0).all()


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_noise_has_the_stated_size(severity: int) -> None:
    true, seen = noise("adversarial", severity)
    share = FAMILIES["adversarial"][severity - 1]
    negated = (seen == -true).all(-1)
    assert torch.equal(seen[~negated], true[~negated]) and negated.float().mean().item() == pytest.approx(
        share, abs=0.02
    )
    assert torch.allclose(flip_rate(true, seen), negated.float().mean(1), atol=1e-4), (
        "a negated context flips every pair"
    )
    true, seen = noise("heavy tails", severity)
    quartiles = torch.quantile((seen - true)[0].flatten()[:16000], torch.tensor([0.25, 0.75]))
    scale = FAMILIES["heavy tails"][severity - 1]
    assert quartiles.tolist() == pytest.approx([-scale, scale], rel=0.08), "the quartiles of a Cauchy are its scale"
    true, seen = noise("gauss + outliers", severity)
    spread, share = FAMILIES["gauss + outliers"][severity - 1]
    assert (seen - true).std().item() == pytest.approx((spread**2 + 25.0 * share) ** 0.5, rel=0.05)


def test_the_conditions_of_a_seed_share_what_they_should() -> None:
    found = make_bandits(2, (("clean", 0), ("adversarial", 2), ("shift", 3)))
    clean, adversarial, shift = found.contexts.unflatten(0, (3, 2))
    assert torch.equal(clean, adversarial) and torch.equal(found.test_contexts[:2], found.test_contexts[4:])
    torch.testing.assert_close(shift[..., 4:], 0.1 * clean[..., 4:])
    assert torch.equal(shift[..., :4], clean[..., :4])
    reference = win_mass(found, found.reference).reshape(3, 2)
    assert (reference[0] == reference[1]).all() and (reference[2] < reference[0]).all()


def test_batches_run_through_the_contexts_without_repetition() -> None:
    epoch = torch.cat([batch_indices(step) for step in range(32)])
    assert sorted(epoch.tolist()) == list(range(512)) and not torch.equal(batch_indices(0), batch_indices(32))


def test_dpo_takes_the_extremes_and_equals_a_closed_form() -> None:
    policy = torch.tensor([[-1.0, -2.0, -3.0]]).log_softmax(-1)
    reference = torch.zeros(1, 3).log_softmax(-1)
    loss = dpo_extremes(policy, reference, torch.tensor([[0.1, 7.0, -3.0]]), torch.zeros(1))
    assert loss.item() == pytest.approx(float(np.log1p(np.exp(-1.0))), abs=1e-6), "item 1 against item 2: z = 1"


def test_robust_without_flips_is_dpo_on_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(5, ITEMS, generator=generator).log_softmax(-1) for _ in range(2))
    scores = torch.randn(5, ITEMS, generator=generator)
    expected = OBJECTIVES["DPO, all pairs (= ADPO hard)"](policy, reference, scores, torch.zeros(5))
    torch.testing.assert_close(robust_dpo(None)(policy, reference, scores, torch.zeros(5)), expected)
    torch.testing.assert_close(robust_dpo(0.0)(policy, reference, scores, torch.ones(5)), expected)


def test_robust_is_unbiased() -> None:
    """The mean over flips of its rate is the loss of the true label: what the correction is for."""
    z, rate = torch.linspace(-3, 3, 7), 0.3
    mean = (1 - rate) * robust_loss(z, rate) + rate * robust_loss(-z, rate)
    torch.testing.assert_close(mean, -torch.nn.functional.logsigmoid(z))


def trl_robust(logps: torch.Tensor, reference: torch.Tensor, beta: float, label_smoothing: float) -> float:
    """``trl.DPOTrainer._compute_loss`` itself, fed with log-probs [2 B] of one-token responses, the chosen first."""
    ones = torch.ones(len(logps), 1)
    zeros = torch.zeros(len(logps), 1)
    outputs = SimpleNamespace(
        log_probs=logps.unsqueeze(-1), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["robust"],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        beta=beta,
        use_weighting=False,
        state=SimpleNamespace(num_input_tokens_seen=0),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    chosen, rejected = reference.chunk(2)
    shifted = torch.cat([zeros, ones], dim=1).long()
    inputs = {
        "input_ids": torch.zeros_like(shifted),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return float(DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_robust_is_that_of_trl(rate: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logps, reference = (-5.0 * torch.rand(12, generator=generator) for _ in range(2))
    chosen, rejected = (logps - reference).chunk(2)
    ours = robust_loss(0.7 * (chosen - rejected), rate).mean().item()
    assert ours == pytest.approx(trl_robust(logps, reference, 0.7, rate), rel=1e-6)


@pytest.mark.parametrize("family", ["gauss + outliers", "heavy tails", "adversarial"])
def test_the_anchor_helps_under_noise(family: str) -> None:
    number = [name for name, _ in SMALL].index(family)
    free, raw = (results()[name][number] for name in (FREE, RAW))
    assert (raw > free + 0.1).all()
    assert (free < results()["reference"][number]).all(), "without it the policy ends below where it began"


@cache
def results() -> dict[str, np.ndarray]:
    found = {name: win_mass(bandits(), train(bandits(), OBJECTIVES[name], 400)) for name in (FREE, RAW)}
    return {name: values.reshape(-1, SEEDS) for name, values in found.items()} | {
        "reference": win_mass(bandits(), bandits().reference).reshape(-1, SEEDS)
    }


def test_clean_rewards_improve_on_the_reference() -> None:
    assert (results()[RAW][0] > results()["reference"][0] + 0.05).all()


def test_tables_take_the_right_conditions() -> None:
    """Figures made up so that each mean and difference is known."""
    made = {name: np.array([[10.0 * i, 10.0 * i + 1] for i in range(len(CONDITIONS))]) for name in OBJECTIVES}
    made["ADPO KDE"] = made["ADPO KDE"] + 0.5
    np.testing.assert_allclose(of_family(made, RAW, "gauss + outliers"), [20.0, 21.0])
    np.testing.assert_allclose(of_family(made, RAW, "shift"), [110.0, 111.0])
    kde = next(row for row in claim_rows(made) if row[0].startswith("KDE"))
    assert set(kde[1:]) == {"0.500 [0.500, 0.500] holds"}
    assert [row[1] for row in best_rows(made)] == ["ADPO KDE"] * len(CONDITIONS)
    assert {row[-1] for row in best_rows(made)} == {"ADPO"} and len(COLOURS) == len(OBJECTIVES)
