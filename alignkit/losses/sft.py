"""Negative log-likelihood: of supervised rows, and of the chosen response as an additive regulariser."""

from __future__ import annotations

from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, TokenBatch, count_items

SFT_ITEMS = {"token": "chosen_token", "sequence_sum": "group"}
"""What each ``sft_normalization`` divides the negative log-likelihood by."""


def sft_loss(batch: TokenBatch) -> LossOutput:
    r"""Supervised fine-tuning: the negative log-likelihood of the trained tokens.

    Equation (next-token cross-entropy, as for the demonstrations of Ouyang et al. 2022, arXiv 2203.02155, step 1)::

        L_SFT = -(1/N) * sum over trained tokens of log pi(y_t | y_<t)

    Symbols: ``y`` is a whole row, prompt and answer; which of its tokens are trained is ``label_mask``; N is their
    number in the global batch, over ranks and accumulation steps, so that every token weighs the same.

    Deviations: none.

    Fidelity: the loss has one accepted form. It is, operation for operation, ``loss_type="nll"`` of TRL 1.16.

    Args:
        batch: Rows [B, T].

    Returns:
        One term, ``nll`` [B * T] over tokens, in nats.
    """
    values = -batch.policy_token_logps.masked_fill(~batch.label_mask, 0.0)
    return LossOutput((LossTerm("nll", values.flatten(), batch.label_mask.sum(), item="token"),))


def sft_term(batch: CandidateBatch, *, eta: float, sft_normalization: str) -> LossTerm:
    r"""The SFT term on the chosen responses, with a denominator of its own.

    Equation::

        L_sft = -(1/N) * sum over chosen response tokens of log pi(y_t | x, y_<t),   added as  eta * L_sft

    with N the number of chosen tokens (``token``) or of pairs (``sequence_sum``) in the global batch.

    Symbols: ``eta`` is ``eta``; N follows from ``sft_normalization``.

    Fidelity: reconstruction. The text of arXiv 2406.07327 that fixes N was not available. ``token`` is TRL's ``sft``
    loss type, so that ``eta`` compares with ``loss_weights: [1.0, eta]`` there.

    Args:
        batch: Candidates [B, K, T], the chosen one first.
        eta: Weight of the term.
        sft_normalization: ``token`` or ``sequence_sum``.

    Returns:
        The term ``sft``: one value a row [B], its summed negative log-likelihood in nats.
    """
    item = SFT_ITEMS[sft_normalization]
    values = (-batch.policy_logps[:, 0]).masked_fill(~batch.candidate_mask[:, 0], 0.0)
    return LossTerm("sft", values, count_items(batch.completion_mask)[item], item=item, weight=eta)
