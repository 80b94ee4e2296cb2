"""Dynamic fine-tuning: the negative log-likelihood of a token, weighed by the probability that the policy gives it."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, Metric, TokenBatch, count_items


def dft_loss(batch: TokenBatch) -> LossOutput:
    r"""Dynamic fine-tuning on supervised rows.

    Equation (Wu et al. 2025, arXiv 2508.05629)::

        L_DFT = -(1/N) * sum over trained tokens of sg( pi(y_t | y_<t) ) * log pi(y_t | y_<t)

    Symbols: sg(.) is a constant to the gradient; which tokens of a row are trained is ``label_mask``; N is their number
    in the global batch, over ranks and accumulation steps.

    The gradient of the log-likelihood of a token has a factor 1 / pi(y_t), which makes unlikely tokens rule it; the
    weight takes that factor away. A token the policy thinks impossible is then not learnt at all: this sharpens what a
    model half knows and teaches it nothing new.

    Deviations: none.

    Fidelity: paper text. It is, operation for operation, ``loss_type="dft"`` of TRL 1.16.

    Args:
        batch: Rows [B, T].

    Returns:
        One term, ``weighted_nll`` [B * T] over tokens, in nats, and the weights as ``dft/probability``.
    """
    values, weights = _weighted(batch.policy_token_logps, batch.label_mask)
    metric = Metric(weights.flatten(), batch.label_mask.flatten().to(weights.dtype))
    term = LossTerm("weighted_nll", values.flatten(), batch.label_mask.sum(), item="token")
    return LossOutput((term,), {"dft/probability": metric})


def dft_term(batch: CandidateBatch) -> LossTerm:
    """The same on the chosen responses, as a term of a preference loss.

    Args:
        batch: Candidates [B, K, T], the chosen one first.

    Returns:
        The term ``dft``: one value a row [B], divided by the chosen tokens of the global batch.
    """
    values, _ = _weighted(batch.policy_token_logps[:, 0], batch.completion_mask[:, 0] & batch.candidate_mask[:, :1])
    return LossTerm("dft", values.sum(-1), count_items(batch.completion_mask)["chosen_token"], item="chosen_token")


def _weighted(
    token_logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """- sg(pi) * log pi of every token, and sg(pi), 0 where masked."""
    logps = token_logps.masked_fill(~mask, 0.0)
    weights = logps.detach().exp()
    return -logps * weights, weights * mask
