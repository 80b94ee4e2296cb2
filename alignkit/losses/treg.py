"""T-REG: a preference loss with a regulariser on the implicit reward of every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alignkit.losses.pairs import masked_metric, pair_mask, pair_metrics
from alignkit.losses.types import CandidateBatch, CandidateSide, LossOutput, LossTerm, count_items, sequence_logps

LENGTH_NORMALIZED = {"dpo": False, "simpo": True}
"""Whether a ``form`` divides by the number of tokens and does without a reference."""


def treg_loss(
    batch: CandidateBatch,
    *,
    form: str = "dpo",
    beta: float,
    alpha: float,
    gamma: float = 0.5,
    detach_weight: bool = True,
    static_weight: bool = False,
) -> LossOutput:
    r"""T-REG on a batch of (chosen, rejected) pairs whose tokens carry a reward.

    Equation (Zhou et al. 2025, "T-REG", arXiv 2412.02685; for ``form="dpo"``)::

        z        = beta * (rho_w - rho_l),      rho = log pi(y|x) - log pi_ref(y|x)
        L_reg(y) = - sum_t beta * r_hat(y_t) * log pi(y_t | x, y_<t)
        w        = sigma(-z)
        L        = E[ -log sigma(z)  +  alpha * w * ( L_reg(y_w) + L_reg(y_l) ) ]

        r_hat(y_t) = sigma( log pi_ref(y_t | x_better, y_<t) - log pi_ref(y_t | x_worse, y_<t) ) - 1/2

    and for ``form="simpo"``, without a reference, with beta/|y| in place of beta in each response's share::

        z        = beta/|y_w| * log pi(y_w|x) - beta/|y_l| * log pi(y_l|x) - gamma
        L_reg(y) = - sum_t beta/|y| * r_hat(y_t) * log pi(y_t | x, y_<t)

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``r_hat`` is ``batch.token_rewards``, made
    before training (the prompts x_better and x_worse are not seen here); |y| is the number of tokens. L_reg is the
    negative inner product of r_hat and the implicit token reward beta * log pi/pi_ref, without its constant part.

    With w held constant the gradient is DPO's with one factor a token, 1 + alpha * r_hat on the chosen side and
    1 - alpha * r_hat on the rejected one. As w falls with the margin, the regulariser fades on solved pairs.

    Deviations: ``detach_weight`` keeps w out of the gradient; no source says whether the authors do. ``static_weight``
    puts w = 1, which is the paper's ablation. A pair without both responses trains nothing.

    Fidelity: secondary source, two independent summaries of the paper that agree. The paper applies its regulariser to
    SimPO too, but no source gives the form: ``simpo`` is our reading.

    Args:
        batch: Pairs [B, 2, T] with token rewards in (-1/2, 1/2), and with reference log-probs under ``dpo``; nats.
        form: ``dpo`` or ``simpo``.
        beta: Strength of the leash, per nat (``dpo``); scale of the log-likelihood per token (``simpo``); > 0.
        alpha: Weight of the regulariser; 0 leaves the preference loss alone.
        gamma: Target margin of ``simpo``; ``dpo`` has none.
        detach_weight: Whether w is a constant to the gradient.
        static_weight: Whether w is 1.

    Returns:
        The terms ``preference`` [B] and ``token_regularizer`` [B] over pairs, the second weighted by ``alpha``; the
        metrics of :func:`alignkit.losses.pairs.pair_metrics`, without gradient ratio under ``simpo``, and those under
        ``treg/``.

    Raises:
        ValueError: The batch carries no token rewards.
    """
    mask, chosen, rejected = pair_mask(batch), batch.chosen, batch.rejected
    length_normalized = LENGTH_NORMALIZED[form]
    chosen_rewards, rejected_rewards = (beta * _reward(side, length_normalized) for side in (chosen, rejected))
    z = chosen_rewards - rejected_rewards
    if length_normalized:
        z = z - gamma
    fading = torch.sigmoid(-z)
    weight = torch.ones_like(fading) if static_weight else fading
    if detach_weight:
        weight = weight.detach()
    regularizer = _regularizer(chosen, beta, length_normalized) + _regularizer(rejected, beta, length_normalized)
    groups = count_items(batch.completion_mask)["group"]
    terms = (
        LossTerm("preference", (-F.logsigmoid(z)).masked_fill(~mask, 0.0), groups),
        LossTerm("token_regularizer", (weight * regularizer).masked_fill(~mask, 0.0), groups, weight=alpha),
    )
    metrics = pair_metrics(
        batch,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        beta_pos=beta,
        # Under simpo the coefficient of a response varies with its length, so the ratio has no constant part.
        beta_neg=0.0 if length_normalized else beta,
    )
    metrics["effective_weight"] = masked_metric(fading, mask)
    metrics["treg/regularizer"] = masked_metric(regularizer, mask)
    for role, side in (("chosen", chosen), ("rejected", rejected)):
        for name, totals in _token_totals(side, beta, length_normalized).items():
            metrics[f"treg/{name}_{role}"] = masked_metric(totals, mask, side.num_tokens)
    return LossOutput(terms, metrics)


def _reward(side: CandidateSide, length_normalized: bool) -> Float[Tensor, " B"]:
    """Implicit reward of a response over beta: its log-ratio, or its mean log-prob a token."""
    return side.policy_mean_logps if length_normalized else side.logratio


def _token_rewards(side: CandidateSide) -> Float[Tensor, "B T"]:
    """r_hat without gradient."""
    if side.token_rewards is None:
        raise ValueError("this batch carries no token rewards (token_rewards is None)")
    return side.token_rewards.detach()


def _regularizer(side: CandidateSide, beta: float, length_normalized: bool) -> Float[Tensor, " B"]:
    """L_reg of one response."""
    return -beta * _alignment(side, side.policy_token_logps, length_normalized)


def _alignment(side: CandidateSide, token_logps: Float[Tensor, "B T"], length_normalized: bool) -> Float[Tensor, " B"]:
    """Inner product of r_hat and token log-probs, over the length if asked; computed in at least float32."""
    wide = torch.promote_types(token_logps.dtype, torch.float32)
    total = sequence_logps(_token_rewards(side).to(wide) * token_logps.to(wide), side.completion_mask)
    return total / side.num_tokens.clamp(min=1) if length_normalized else total


@torch.no_grad()
def _token_totals(side: CandidateSide, beta: float, length_normalized: bool) -> dict[str, Float[Tensor, " B"]]:
    """Over the tokens of a response: the sum of r_hat, and of r_hat times the implicit token reward."""
    implicit = _alignment(side, side.policy_token_logps, length_normalized)
    if not length_normalized:
        assert side.ref_token_logps is not None, "the log-ratio has refused this before"
        implicit = implicit - _alignment(side, side.ref_token_logps, length_normalized)
    hats = sequence_logps(_token_rewards(side), side.completion_mask)
    return {"token_reward": hats, "similarity": beta * implicit}
