"""``dpo_loss`` against the paper, its closed-form gradient, and TRL's own code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.losses.dpo import dpo_loss
from alignkit.losses.types import CandidateBatch, LossOutput
from tests.losses.batches import batch_loss, batch_of, metric_mean, random_pairs
from tests.losses.dpo_family import SCORED, check_family
from tests.oracles import Pair

TIGHT = {"rel": 1e-12, "abs": 1e-12}
GOLDEN = Pair([-4.0, -6.0], [-12.0], [-11.0], [-11.5])
AT_REFERENCE = Pair([-1.0, -2.0], [-3.0], [-1.0, -2.0], [-3.0])
EMPTY_CHOSEN, EMPTY_REJECTED = Pair([], [-1.0], [], [-2.0]), Pair([-3.0, -1.0], [], [-2.0, -2.5], [])


def awkward_pairs(seed: int) -> tuple[list[Pair], list[tuple[bool, bool]], list[bool]]:
    """Ordinary pairs first, then all kinds of padding: (pairs, candidate mask, whether the pair trains)."""
    ordinary = [*random_pairs(seed, count=5), GOLDEN, AT_REFERENCE]
    padding = [EMPTY_CHOSEN, EMPTY_REJECTED, *random_pairs(seed + 1, count=2)]
    present = [(True, True)] * (len(ordinary) + 2) + [(True, False), (False, True)]
    return [*ordinary, *padding], present, [True] * len(ordinary) + [False] * len(padding)


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    plain = [{"beta": beta, "label_smoothing": epsilon} for beta, epsilon in ((0.1, 0.0), (0.7, 0.0), (0.4, 0.45))]
    check_family(loss, "dpo", SCORED, *plain)


def check_metrics(output: LossOutput, expected: dict[str, float]) -> None:
    """Every metric has its value, and none holds the graph."""
    assert {key: metric_mean(metric) for key, metric in output.metrics.items()} == pytest.approx(expected, **TIGHT)
    assert not any(metric.values.requires_grad for metric in output.metrics.values())


def check_gradient(grad: torch.Tensor, pairs: list[Pair], wanted: list[tuple[float, float]]) -> None:
    """All tokens of a response share the gradient of its sequence log-prob."""
    for row, pair in enumerate(pairs):
        for side, response in enumerate((pair.policy_chosen, pair.policy_rejected)):
            got = grad[row, side, : len(response)].tolist()
            assert got == pytest.approx([wanted[row][side]] * len(response), **TIGHT)
            assert response or not grad[row, side].any(), "a response that is not there got a gradient"


def test_agrees_with_the_equation() -> None:
    check_loss(dpo_loss)


def test_golden_value() -> None:
    batch = batch_of([GOLDEN])
    output = dpo_loss(batch, beta=0.1)
    assert metric_mean(output.metrics["rewards/margins"]) == pytest.approx(0.15, **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(0.6209570478, abs=5e-11)


def test_gradient_in_probability_space() -> None:
    """Corollary 1: the two sides are pushed in the ratio -pi_w / pi_l."""
    pi = torch.tensor([[0.25, 0.01]], dtype=torch.float64, requires_grad=True)
    batch = CandidateBatch(
        policy_token_logps=pi.log().unsqueeze(-1),
        ref_token_logps=torch.tensor([[[0.3], [0.2]]], dtype=torch.float64).log(),
        completion_mask=torch.ones(1, 2, 1, dtype=torch.bool),
        candidate_mask=torch.ones(1, 2, dtype=torch.bool),
        scores=torch.tensor([[1.0, 0.0]], dtype=torch.float64),
    )
    output = dpo_loss(batch, beta=0.1)
    (grad,) = torch.autograd.grad(batch_loss(output, batch), pi)
    assert (grad[0, 1] / grad[0, 0]).item() == pytest.approx(-25.0, **TIGHT)
    assert metric_mean(output.metrics["grad_ratio_log"]) == pytest.approx(torch.tensor(25.0).double().log().item())


def trl_outcome(
    batch: CandidateBatch, beta: float, loss_type: str = "sigmoid", **settings: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Loss, gradient and metrics of ``trl.DPOTrainer._compute_loss`` itself, fed with given token log-probs.

    Args:
        batch: Pairs whose log-probs are 0 where masked.
        beta: TRL's.
        loss_type: TRL's.
        **settings: Further arguments of TRL that are no default.
    """
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")

    def both(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[:, 0], values[:, 1]]).detach()

    log_probs, zeros = both(batch.policy_token_logps).requires_grad_(), torch.zeros_like(both(batch.policy_token_logps))
    shifted = torch.nn.functional.pad(both(batch.completion_mask).long(), (1, 0))
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
    )
    if batch.policy_log_sum_sq_probs is not None:
        outputs.log_sum_sq_probs = both(batch.policy_log_sum_sq_probs)
    known = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, **settings}
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=model,
        ref_model=lambda **_: SimpleNamespace(log_probs=both(batch.ref_token_logps)),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.get("discopop_tau")),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        state=SimpleNamespace(num_input_tokens_seen=0),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
        **known,
    )
    inputs = {
        "input_ids": torch.zeros_like(shifted),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted,
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    (grad,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), grad, {key: values[0] for key, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("seed", range(5))
def test_bitwise_equal_to_trl(seed: int) -> None:
    """float32, eight pairs: per-pair losses have the same bits, and so have the gradients."""
    batch = batch_of(random_pairs(seed, count=8, max_tokens=9), dtype=torch.float32)
    output = dpo_loss(batch, beta=0.1)
    mean = output.terms[0].values.mean()
    (grad,) = torch.autograd.grad(mean, batch.policy_token_logps)

    loss, trl_grad, metrics = trl_outcome(batch, beta=0.1)
    assert mean.item() == loss.item()
    mask = batch.completion_mask
    assert torch.equal(grad[mask], torch.stack(trl_grad.chunk(2), dim=1)[mask])
    shared = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    shared |= {"logps/chosen", "logps/rejected"}
    for key in shared:
        assert metric_mean(output.metrics[key]) == pytest.approx(metrics[key], rel=1e-6)
