"""Golden values and invariants of ADPO, in the order of its specification."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from alignkit.losses.adpo import AdaptiveTau, adpo_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.targets import TARGETS, kde_logits
from alignkit.losses.types import CandidateBatch
from tests import list_oracles
from tests.list_oracles import Candidate
from tests.losses.batches import VOCABULARY, gradient, list_batch, metric_mean
from tests.losses.test_d2o import candidate
from tests.losses.test_dpo import TIGHT

GOLDEN_L, GOLDEN_REF = [-3.0, -5.0, -4.0], [-3.5, -4.5, -4.2]
# q = (.91425, .00681, .07893). The specification prints it 5e-9 off the q that its other figures were computed with.
LOG_Q = [2.0 * math.sqrt(1.5), -2.0 * math.sqrt(1.5), 0.0]


def group(logps: list[float], ref: list[float] | None, scores: list[float]) -> CandidateBatch:
    """One group of candidates of one token each; no reference is the uniform anchor."""
    row = [Candidate([lp], [r], s) for lp, r, s in zip(logps, ref or [0.0] * len(logps), scores, strict=True)]
    return list_batch([row], reference=ref is not None)


def grad_of(batch: CandidateBatch, **options: object) -> list[float]:
    return gradient(adpo_loss(batch, **options), batch)[0, :, 0].tolist()


def test_1_two_candidates_are_dpo_and_its_soft_form() -> None:
    batch = group([-10.0, -12.0], [-11.0, -11.5], [1.0, 0.0])
    hard = adpo_loss(batch, target="pairwise_hard", tau=10.0).mean().item()
    assert hard == pytest.approx(0.6209570478, abs=5e-11)
    assert hard == pytest.approx(dpo_loss(batch, beta=0.1).mean().item(), **TIGHT)
    soft = adpo_loss(batch, target="pairwise_soft", tau=10.0, beta_reward=1.0 / math.log(9.0))
    assert soft.mean().item() == pytest.approx(0.6359570478, abs=5e-11)


@pytest.mark.parametrize("target", TARGETS)
def test_2_a_constant_added_to_a_group_changes_nothing(target: str) -> None:
    rng = random.Random(40)
    logps, ref, scores = ([rng.uniform(-9.0, -1.0) for _ in range(4)] for _ in range(3))
    losses, gradients = [], []
    for here, there in ((0.0, 0.0), (2.5, 0.0), (0.0, -1.5)):
        batch = group([x + here for x in logps], [x + there for x in ref], scores)
        losses.append(adpo_loss(batch, target=target, tau=0.7).mean().item())
        gradients.append(grad_of(batch, target=target, tau=0.7))
        assert math.fsum(gradients[-1]) == pytest.approx(0.0, abs=1e-14)
    assert losses == pytest.approx([losses[0]] * 3, **TIGHT)
    assert gradients[1] == pytest.approx(gradients[0], **TIGHT)
    assert gradients[2] == pytest.approx(gradients[0], **TIGHT)


def test_3_golden_group_of_three() -> None:
    batch = group(GOLDEN_L, GOLDEN_REF, LOG_Q)
    output = adpo_loss(batch, target="listwise_raw", tau=0.8, beta_reward=1.0)
    assert list_oracles.softmax(LOG_Q) == pytest.approx([0.9142507606, 0.0068149999, 0.0789342395], abs=1e-8)
    assert output.mean().item() == pytest.approx(0.7180767030, abs=5e-11)
    assert metric_mean(output.metrics["adpo/target_kl"]) == pytest.approx(0.4016911701, abs=5e-11)
    wanted = [-0.5095153704, 0.1729241938, 0.3365911767]
    assert grad_of(batch, target="listwise_raw", tau=0.8, beta_reward=1.0) == pytest.approx(wanted, abs=5e-10)


def test_4_the_optimum_is_the_anchor_times_a_power_of_the_target() -> None:
    optimum = [r + 0.8 * q - 3.0 for r, q in zip(GOLDEN_REF, LOG_Q, strict=True)]
    batch = group(optimum, GOLDEN_REF, LOG_Q)
    assert grad_of(batch, target="listwise_raw", tau=0.8, beta_reward=1.0) == pytest.approx([0.0] * 3, abs=1e-14)
    assert metric_mean(adpo_loss(batch, target="listwise_raw", tau=0.8, beta_reward=1.0).metrics["adpo/target_kl"]) == (
        pytest.approx(0.0, abs=1e-12)
    )
    assert list_oracles.softmax(optimum) == pytest.approx([0.92826216, 0.00678104, 0.06495680], abs=1e-8)


def test_5_the_curvature_is_the_fisher_metric_over_tau_squared() -> None:
    batch = group(GOLDEN_L, GOLDEN_REF, LOG_Q)

    def loss(logps: Tensor) -> Tensor:
        fields = {**vars(batch), "policy_token_logps": logps.view(1, 3, 1)}
        return adpo_loss(CandidateBatch(**fields), target="listwise_raw", tau=0.8).mean()

    hessian = torch.autograd.functional.hessian(loss, torch.tensor(GOLDEN_L, dtype=torch.float64))
    p = torch.tensor([0.5066384, 0.1451544, 0.3482072], dtype=torch.float64)
    torch.testing.assert_close(hessian, (p.diag() - torch.outer(p, p)) / 0.64, rtol=0, atol=2e-7)


def test_6_first_step_from_the_anchor() -> None:
    """p is uniform and the loss log P, yet the gradient is not 0. The std is the unbiased one."""
    logps = [-3.0, -1.0, -7.0, -2.0]
    batch = group(logps, logps, [1.0, 0.0, 0.0, 0.0])
    options = {"target": "listwise_zscore", "tau": 0.8, "beta_reward": 0.5}
    assert adpo_loss(batch, **options).mean().item() == pytest.approx(math.log(4), **TIGHT)
    assert grad_of(batch, **options) == pytest.approx([-0.8723937, *[0.2907979] * 3], abs=1e-7)
    with_population_std = (0.25 - 0.971257) / 0.8
    assert abs(grad_of(batch, **options)[0] - with_population_std) > 0.02


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("score", [0.0, 0.1, 1e6])
def test_7_equal_rewards_pull_to_a_constant(target: str, score: float) -> None:
    """Except for hard pairs, which have no better side and train nothing."""
    apart, level = group(GOLDEN_L, GOLDEN_REF, [score] * 3), group(GOLDEN_REF, GOLDEN_REF, [score] * 3)
    u = [lp - r for lp, r in zip(GOLDEN_L, GOLDEN_REF, strict=True)]
    wanted = [0.0] * 3 if target == "pairwise_hard" else [p - 1.0 / 3.0 for p in list_oracles.softmax(u)]
    if target == "pairwise_soft":
        wanted = [sum(list_oracles.sigma(a - b) - 0.5 for b in u) / 3.0 for a in u]
    assert grad_of(apart, target=target) == pytest.approx(wanted, abs=1e-12)
    assert grad_of(level, target=target) == pytest.approx([0.0] * 3, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e3, 1e30])
def test_zscores_are_of_any_scale(scale: float, dtype: torch.dtype) -> None:
    """The scores 1, 2, 0 have a mean of 1 and a std of 1: q is the softmax of 0, 2, -2. Equal scores stay level."""
    exists = torch.tensor([[True, True, True, False], [True, True, True, False]])
    scores = scale * torch.tensor([[1.0, 2.0, 0.0, 1e7], [1.0, 1.0, 1.0, 1e7]], dtype=dtype)
    wanted = [list_oracles.softmax([0.0, 2.0, -2.0]), [1.0 / 3.0] * 3]
    q = TARGETS["listwise_zscore"](scores, exists, 0.5).q[:, 0, :3]
    torch.testing.assert_close(q, torch.tensor(wanted, dtype=dtype), rtol=1e-6, atol=1e-7)


def test_8_one_hot_over_everything_is_the_likelihood() -> None:
    """With the uniform anchor and tau 1; over part of the support it is a contrast, and smaller."""
    logps = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).log_softmax(-1).tolist()
    options = {"target": "listwise_raw", "beta_reward": 1e-3}
    everything = adpo_loss(group(logps, None, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]), **options).mean().item()
    assert everything == pytest.approx(-logps[0], **TIGHT)
    part = adpo_loss(group(logps[:3], None, [1.0, 0.0, 0.0]), **options).mean().item()
    assert part < everything - 0.1


def test_9_plackett_luce() -> None:
    """Two places are competed for: terms 0.4076059645 and 0.3132616875; their mean is the loss."""
    batch = group([1.0, 0.0, -1.0], None, [3.0, 2.0, 1.0])
    loss = adpo_loss(batch, target="plackett_luce").mean().item()
    assert loss == pytest.approx(0.3604338260, abs=5e-11)
    assert 2 * loss == pytest.approx(0.7208676520, abs=1e-10)
    last_two = adpo_loss(group([0.0, -1.0], None, [2.0, 1.0]), target="plackett_luce").mean().item()
    assert last_two == pytest.approx(0.3132616875, abs=5e-11)


def test_9_plackett_luce_is_a_product_of_factors_in_the_order_of_the_scores() -> None:
    rng = random.Random(41)
    u, scores = [rng.gauss(0, 2) for _ in range(5)], [0.3, 2.0, -1.0, 0.7, 5.0]
    places = sorted(range(5), key=lambda i: -scores[i])
    factors = [list_oracles.softmax([u[i] for i in places[k:]])[0] for k in range(4)]
    loss = adpo_loss(group(u, None, scores), target="plackett_luce").mean().item()
    assert loss == pytest.approx(-math.log(math.prod(factors)) / 4, **TIGHT)


def test_9_a_tie_that_is_kept_is_at_its_least() -> None:
    """Two equals at p = 1/2: gradient 0, so the loss log 2 is the least and nothing is left of the gradient."""
    batch = group([-2.0, -2.0], None, [1.0, 1.0])
    output = adpo_loss(batch, target="plackett_luce")
    assert grad_of(batch, target="plackett_luce") == [0.0, 0.0]
    assert output.mean().item() == pytest.approx(math.log(2), **TIGHT)
    found = {name: metric_mean(metric) for name, metric in output.metrics.items()}
    assert found["adpo/target_entropy"] == pytest.approx(math.log(2), **TIGHT)
    assert found["adpo/target_kl"] == pytest.approx(0.0, abs=1e-14) and found["effective_weight"] == 0.0


@pytest.mark.parametrize("target", TARGETS)
def test_the_effective_weight_is_half_the_gradient_in_u(target: str) -> None:
    """Where choices pull the middle candidate both ways, too, and where candidates are tied."""
    tau = 0.7
    batch = group([-3.0, -1.0, -2.5, -2.0], [-2.0, -2.5, -2.0, -1.0], [1.0, 0.5, 0.5, 0.0])
    metrics = adpo_loss(batch, target=target, tau=tau).metrics
    total = tau * math.fsum(map(abs, grad_of(batch, target=target, tau=tau)))
    assert metric_mean(metrics["effective_weight"]) == pytest.approx(0.5 * total, **TIGHT)


def test_10_kde_golden() -> None:
    scores, everyone = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    logits = kde_logits(scores, everyone, torch.ones(1, dtype=torch.float64))
    assert logits[0].tolist() == pytest.approx([-1.2656564, -0.1817051, 1.5526767], abs=1e-7)
    assert logits[0].sigmoid().tolist() == pytest.approx([0.22000172, 0.45469829, 0.82529999], abs=1e-8)
    q = TARGETS["listwise_raw"](logits, everyone, 1.0).q[0, 0]
    assert q.tolist() == pytest.approx([0.0482969, 0.1427821, 0.8089210], abs=1e-7)


def test_10_kde_ignores_a_constant_and_bounds_an_outlier() -> None:
    everyone = torch.ones(1, 4, dtype=torch.bool)
    q_of = lambda *r: TARGETS["kde"](torch.tensor([r], dtype=torch.float64), everyone, 0.5).q[0, 0]  # noqa: E731
    torch.testing.assert_close(q_of(5.0, 6.0, 8.5, 9.0), q_of(0.0, 1.0, 3.5, 4.0), rtol=1e-12, atol=1e-12)
    far, further = q_of(0.0, 1.0, 3.0, 1e3), q_of(0.0, 1.0, 3.0, 1e9)
    torch.testing.assert_close(far, further, rtol=0.05, atol=0.05)
    assert bool((further > 0).all())


def test_11_adaptive_temperature() -> None:
    """H = 0.2 and R = 0.25 give 0.8 * (1 + 0.2 + 5 * 0.8 * 0.75) = 3.36."""
    token = -0.2 * math.log(VOCABULARY)
    rows = [[Candidate([token] * 3, [-1.0] * 3, m + d) for d in (0.5, -0.5)] for m in (2.0, 1.0, 5.0)]
    rule = AdaptiveTau(base=0.8, entropy_coef=1.0, error_coef=5.0, minimum=0.1, maximum=10.0)
    taus = adpo_loss(list_batch(rows), tau=rule).metrics["adpo/tau"].values.tolist()
    assert taus == pytest.approx([0.8 * (1 + 0.2 + 5 * 0.8 * 0.75), 0.8 * 5.2, 0.8 * 1.2], **TIGHT)
    assert taus[0] == pytest.approx(3.36, **TIGHT)


def test_11_the_adaptive_temperature_depends_on_the_micro_batch() -> None:
    rng = random.Random(42)
    rows = [[candidate(rng, score + 1.0), candidate(rng, score)] for score in (0.0, 1.0, 2.0)]
    rule = AdaptiveTau(base=1.0, entropy_coef=0.5, error_coef=1.0, minimum=0.1, maximum=5.0)
    together, apart = (adpo_loss(list_batch(part), tau=rule).metrics["adpo/tau"].values for part in (rows, rows[:2]))
    assert not torch.isclose(together[1], apart[1])


@pytest.mark.parametrize("target", TARGETS)
def test_the_order_of_the_candidates_does_not_matter(target: str) -> None:
    rng = random.Random(43)
    row = [candidate(rng, score) for score in (1.0, 0.5, 0.5, -2.0)]
    losses = [adpo_loss(list_batch([list(p)]), target=target).mean().item() for p in itertools.permutations(row)]
    assert losses == pytest.approx([losses[0]] * 24, **TIGHT)


def test_hard_pairs_of_a_list_are_the_mean_of_dpo_over_them() -> None:
    rng = random.Random(44)
    row = [candidate(rng, score) for score in (1.0, 0.5, 0.5, -2.0)]
    decided = [[a, b] for a, b in itertools.combinations(row, 2) if a.score != b.score]
    assert len(decided) == 5
    ours = adpo_loss(list_batch([row]), target="pairwise_hard", tau=10.0).mean().item()
    assert ours == pytest.approx(dpo_loss(list_batch(decided), beta=0.1).mean().item(), **TIGHT)


def test_the_divergence_from_the_anchor_is_least_at_the_anchor() -> None:
    rng = random.Random(45)
    moved = [candidate(rng, 1.0, tokens=3), candidate(rng, 0.0, tokens=2)]
    still = [Candidate(c.ref, c.ref, c.score) for c in moved]
    terms = [adpo_loss(list_batch([row]), anchor_kl_coef=0.5).terms[1] for row in (still, moved)]
    assert terms[0].values.item() == 0.0
    assert terms[1].values.item() > 0.0 and terms[1].num_items.item() == 5
