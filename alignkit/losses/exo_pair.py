"""EXO on pairs: the reverse divergence from the smoothed preference, where DPO has the forward one."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F

from alignkit.losses.scored_pairs import ScoreModifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def exo_pair_loss(
    batch: CandidateBatch, *, beta: float, label_smoothing: float = 1e-3, **modifiers: Unpack[ScoreModifiers]
) -> LossOutput:
    r"""EXO-pref on a batch of (chosen, rejected) pairs.

    Equation (Ji et al. 2024, arXiv 2402.00856, Eq. 16, for K = 2)::

        z = beta * log pi(y_w|x)/pi_ref(y_w|x)  -  beta * log pi(y_l|x)/pi_ref(y_l|x)
        L = E [ sigma(z) log( sigma(z) / (1 - epsilon) )  +  sigma(-z) log( sigma(-z) / epsilon ) ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta`` is ``beta`` (the paper's beta_pi);
    ``epsilon`` is ``label_smoothing``; the expectation is the mean over pairs, taken by the caller.

    This is KL(q || p) of q = (sigma(z), sigma(-z)) from p = (1 - epsilon, epsilon); DPO with label smoothing is
    KL(p || q) but for a constant.

    Deviations: none. A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16 ``loss_type="exo_pair"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        label_smoothing: epsilon, in (0, 0.5).
        **modifiers: See :class:`~alignkit.losses.scored_pairs.ScoreModifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics` without ``effective_weight``.
    """
    pairs = scored_pairs(batch, **modifiers)
    margin = pairs.margin
    # In the precision of the scores, and each z a product of its own, as TRL has it, to the last bit.
    epsilon = torch.full((), label_smoothing, dtype=margin.dtype, device=margin.device)
    agreeing = torch.sigmoid(beta * margin) * (F.logsigmoid(beta * margin) - torch.log1p(-epsilon))
    opposing = torch.sigmoid(-beta * margin) * (F.logsigmoid(-beta * margin) - torch.log(epsilon))
    return pairs.output(agreeing + opposing, beta=beta)
