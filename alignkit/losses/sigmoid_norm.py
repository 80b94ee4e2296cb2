"""DPO with log-ratios per token, as Tulu 3 was trained."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F

from alignkit.losses.scored_pairs import ScoreModifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def sigmoid_norm_loss(batch: CandidateBatch, *, beta: float, **modifiers: Unpack[ScoreModifiers]) -> LossOutput:
    r"""Length-normalised DPO on a batch of (chosen, rejected) pairs.

    Equation (Lambert et al. 2024, "Tulu 3", arXiv 2411.15124, preference tuning)::

        z = beta/|y_w| log pi(y_w|x)/pi_ref(y_w|x)  -  beta/|y_l| log pi(y_l|x)/pi_ref(y_l|x)
        L = -E log sigma(z)

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``, ``|y|`` their numbers of tokens; ``beta`` is
    ``beta``; the expectation is the mean over pairs, taken by the caller.

    This is ``flex_dpo`` with two equal betas and ``length_normalize``.

    Deviations: none. A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16
    ``loss_type="sigmoid_norm"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat a token; > 0.
        **modifiers: See :class:`~alignkit.losses.scored_pairs.ScoreModifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics`.
    """
    pairs = scored_pairs(batch, **modifiers).divided_by_length()
    z = beta * pairs.margin
    return pairs.output(-F.logsigmoid(z), beta=beta, effective_weight=torch.sigmoid(-z))
