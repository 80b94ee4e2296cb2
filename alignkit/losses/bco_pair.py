"""BCO on pairs: a classifier of chosen and rejected responses, whose logit is the implicit reward."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F

from alignkit.losses.scored_pairs import Modifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def bco_pair_loss(batch: CandidateBatch, *, beta: float, **modifiers: Unpack[Modifiers]) -> LossOutput:
    r"""Binary classifier optimisation on a batch of (chosen, rejected) pairs.

    Equation (Jung et al. 2024, arXiv 2404.04656, Section 4, with delta = 0)::

        r_w = beta * log pi(y_w|x)/pi_ref(y_w|x),   r_l = beta * log pi(y_l|x)/pi_ref(y_l|x)
        L   = -E [ log sigma(r_w - delta)  +  log sigma(-(r_l - delta)) ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta`` is ``beta``; the expectation is the
    mean over pairs, taken by the caller.

    Deviations: ``delta``, the paper's running mean of the rewards of both sides, is left out, as TRL leaves it out of
    its loss on pairs (its BCOTrainer, for rows without partner, has it). A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16 ``loss_type="bco_pair"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        **modifiers: See :class:`~alignkit.losses.scored_pairs.Modifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics` without those of the gradient.
    """
    pairs = scored_pairs(batch, **modifiers)
    values = -F.logsigmoid(beta * pairs.chosen) - F.logsigmoid(-(beta * pairs.rejected))
    return pairs.output(values, beta=beta, of_margin=False)
