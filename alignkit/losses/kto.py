"""KTO: single answers that are called good or bad, each against what the policy does on the whole."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.lists import existing_candidates
from alignkit.losses.pairs import masked_metric
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, Metric, count_items, sequence_logps


def kto_loss(
    batch: CandidateBatch,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    form: str = "kto",
) -> LossOutput:
    r"""KTO on rows of one labelled answer, behind which stand answers to other prompts.

    Equation (Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 7)::

        r   = log pi(y|x) - log pi_ref(y|x)
        z_0 = max(0, mean over mismatched (x, y') of log pi(y'|x) - log pi_ref(y'|x))
        L   = E[ lambda_D * (1 - sigma(beta * (r - z_0))) ]   over desirable y
            + E[ lambda_U * (1 - sigma(beta * (z_0 - r))) ]   over undesirable y,   E the mean over all rows

    Symbols: y is the first candidate of a row, desirable where its score is above 0; the y' are the candidates behind
    it; ``beta`` is beta, lambda_D is ``desirable_weight``, lambda_U is ``undesirable_weight``. z_0 estimates
    KL(pi || pi_ref) and is a constant to the gradient; the mean is over the micro-batch of all ranks together.

    An answer gets the largest gradient where r is near z_0, and little where it is far on either side: KTO gives up on
    what it cannot turn round. ``form="apo_zero_unpaired"`` is the same with z_0 = 0 (D'Oosterlinck et al. 2024, arXiv
    2408.06266): desirable answers become likelier than under the reference, undesirable ones less likely.

    Deviations: with ranks of unequal numbers of rows TRL takes the mean of the ranks' means. A row without its answer
    trains nothing.

    Fidelity: paper text, as TRL 1.16's KTO trainer computes it for ``loss_type`` kto and apo_zero_unpaired.

    Args:
        batch: Rows [B, K, T] with reference log-probs, nats; scores are 1 or 0 for the answer, -1 behind it.
        beta: Strength of the leash to the reference, per nat; > 0.
        desirable_weight: Weight of an answer that is called good.
        undesirable_weight: Weight of one that is called bad.
        form: ``kto`` or ``apo_zero_unpaired``.

    Returns:
        One term, ``preference`` [B] over rows, and metrics, in which ``chosen`` are the good answers and ``rejected``
        the bad ones.

    Raises:
        ValueError: The batch carries no reference log-probs.
    """
    if batch.ref_token_logps is None:
        raise ValueError("this batch carries no reference log-probs (ref_token_logps is None)")
    exists = existing_candidates(batch)
    logratio = batch.policy_logps - sequence_logps(batch.ref_token_logps, batch.completion_mask)
    kl = _mean_mismatch(batch, logratio, exists)
    trains, is_good = exists[:, 0], batch.scores[:, 0] > 0
    z = beta * (logratio[:, 0] - (kl if form == "kto" else torch.zeros_like(kl)))
    good, bad = desirable_weight * (1 - torch.sigmoid(z)), undesirable_weight * (1 - torch.sigmoid(-z))
    values = torch.where(is_good, good, bad).masked_fill(~trains, 0.0)
    metrics = {
        "kl": Metric(kl.reshape(1)),
        "effective_weight": masked_metric(4 * torch.sigmoid(z) * torch.sigmoid(-z), trains),
        **_metrics_of("chosen", batch, beta * logratio[:, 0], trains & is_good),
        **_metrics_of("rejected", batch, beta * logratio[:, 0], trains & ~is_good),
    }
    return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)


@torch.no_grad()
def _mean_mismatch(
    batch: CandidateBatch, logratio: Float[Tensor, "B K"], exists: Bool[Tensor, "B K"]
) -> Float[Tensor, ""]:
    """z_0; 0 where there is no mismatched answer."""
    mismatched = exists[:, 1:]
    total = logratio[:, 1:].masked_fill(~mismatched, 0.0).sum()
    total, count = batch.gather(torch.stack([total, mismatched.sum().to(total.dtype)])).view(-1, 2).sum(0).unbind()
    return (total / count.clamp(min=1)).clamp(min=0)


@torch.no_grad()
def _metrics_of(
    role: str, batch: CandidateBatch, rewards: Float[Tensor, " B"], mask: Bool[Tensor, " B"]
) -> dict[str, Metric]:
    """Reward and likelihood of the answers with one label."""
    logps = batch.policy_logps[:, 0]
    return {
        f"rewards/{role}": masked_metric(rewards, mask),
        f"logps/{role}": masked_metric(logps, mask),
        f"mean_logps/{role}": masked_metric(logps, mask, batch.completion_mask[:, 0].sum(-1)),
    }
