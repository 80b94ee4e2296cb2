"""PRO: the best of a list against all others, the second against the rest, and so on, without a reference."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.lists import candidate_metrics, existing_candidates, masked_log_softmax
from alignkit.losses.pairs import masked_metric
from alignkit.losses.sft import sft_term
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items


def pro_loss(
    batch: CandidateBatch, *, temperature: str = "scores", eta: float = 0.05, sft_normalization: str = "token"
) -> LossOutput:
    r"""PRO on groups of scored candidates, any number of them in a group.

    Equation (Song et al. 2024, arXiv 2306.17492; y_1 has the highest score, y_2 the next one ...)::

        m_i   = 1/|y_i| * log pi(y_i|x)
        L_PRO = - E sum_{k=1}^{K-1} log [ exp(m_k / T_k^k) / sum_{i>=k} exp(m_i / T_k^i) ]
        T_k^i = 1 / (r_k - r_i)  for i > k,     T_k^k = min over i > k of T_k^i
        L     = L_PRO + eta * L_SFT(y_1)

    Symbols: |y| is the number of completion tokens with EOS; r are the ``scores``; ``temperature="none"`` puts every T
    at 1; ``eta`` is the paper's beta, renamed because beta is a scale elsewhere; L_SFT is
    :func:`alignkit.losses.sft.sft_term`; the expectation is the mean over groups, taken by the caller.

    A candidate that is much worse than the k-th is pushed harder. Scores are used in their unit: twice the scores halve
    every T.

    Deviations: a candidate competes with those of strictly lower score, so that equal ones are not told apart; in the
    paper there are none. A group with fewer than two candidates is left out of L_PRO.

    Fidelity: secondary source: the equation as the paper's summaries and third parties give it, with its temperatures.
    How the paper divides L_SFT is not known to us.

    Args:
        batch: Groups [B, K, T], nats; the best candidate first; reference log-probs are not looked at.
        temperature: ``scores`` or ``none``.
        eta: Weight of the SFT term on the first candidate; 0 leaves it out.
        sft_normalization: Denominator of the SFT term, ``token`` or ``sequence_sum``.

    Returns:
        The terms ``preference`` [B] over groups and, when ``eta`` > 0, ``sft`` [B], in nats; and metrics.
    """
    exists = existing_candidates(batch)
    means = batch.policy_logps / batch.completion_mask.sum(-1).clamp(min=1)
    scores = batch.scores.to(means.dtype)
    gaps = scores.unsqueeze(2) - scores.unsqueeze(1)
    rivals = exists.unsqueeze(2) & exists.unsqueeze(1) & (gaps > 0)
    places = rivals.any(-1)
    log_p = _log_places(means, rivals, gaps if temperature == "scores" else torch.ones_like(gaps))
    values = -log_p.sum(-1)
    terms = [
        LossTerm("preference", values, count_items(batch.completion_mask)["group"]),
        *([sft_term(batch, eta=eta, sft_normalization=sft_normalization)] if eta > 0 else []),
    ]
    left = (1 - log_p.exp()).sum(-1)
    metrics = {
        **candidate_metrics(batch, scores, exists, means),
        "effective_weight": masked_metric(left, places.any(-1), places.sum(-1)),
    }
    return LossOutput(tuple(terms), metrics)


def _log_places(
    means: Float[Tensor, "B K"], rivals: Bool[Tensor, "B K K"], inverse_temperatures: Float[Tensor, "B K K"]
) -> Float[Tensor, "B K"]:
    """Log-probability of each candidate among itself and its rivals; 0 of one without."""
    itself = torch.eye(means.shape[1], dtype=torch.bool, device=means.device)
    own = inverse_temperatures.masked_fill(~rivals, 0.0).amax(-1, keepdim=True)
    logits = means.unsqueeze(1) * torch.where(itself, own, inverse_temperatures)
    return masked_log_softmax(logits, rivals | itself).diagonal(dim1=1, dim2=2)
