"""What every loss on (chosen, rejected) pairs shares: which pairs count, and what is logged about them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from alignkit.losses.types import CandidateBatch, Metric


def pair_mask(batch: CandidateBatch) -> Bool[Tensor, " B"]:
    """True where both candidates exist and have at least one token; any other row is padding and trains nothing."""
    return batch.candidate_mask.all(-1) & batch.completion_mask.any(-1).all(-1)


@torch.no_grad()
def pair_metrics(
    batch: CandidateBatch,
    *,
    chosen_rewards: Float[Tensor, " B"],
    rejected_rewards: Float[Tensor, " B"],
    beta_pos: float = 1.0,
    beta_neg: float = 0.0,
    length_normalized: bool = False,
) -> dict[str, Metric]:
    """Likelihoods, implicit rewards and the 3D diagnostics of a batch of pairs, detached.

    The gradient ratio is that of the probability space, Corollary 1 of arXiv 2406.07327 with split betas::

        log |(dl/dpi_l) / (dl/dpi_w)| = L_w - L_l + log(beta_neg / beta_pos)

    where each coefficient is divided by its number of tokens if the log-ratios are, which adds log(n_w / n_l). It is a
    sensitivity analysis: the gradient in the parameters carries further factors of the softmax. The ratio is left out
    when ``beta_neg`` is 0, where nothing pushes on the rejected response and its logarithm does not exist; the
    log-ratios to the reference are left out when the batch carries none.

    Args:
        batch: Pairs [B, 2, T].
        chosen_rewards: Implicit reward of the chosen response [B]; the loss is a function of the difference z.
        rejected_rewards: The same of the rejected response.
        beta_pos: Coefficient of the chosen log-ratio.
        beta_neg: Coefficient of the rejected log-ratio; the default leaves the gradient ratio out.
        length_normalized: Whether the rewards are made of log-ratios divided by their numbers of tokens.
    """
    mask, chosen, rejected = pair_mask(batch), batch.chosen, batch.rejected
    chosen_logps, rejected_logps = chosen.policy_logps, rejected.policy_logps
    chosen_tokens, rejected_tokens = chosen.num_tokens, rejected.num_tokens
    margins = chosen_rewards - rejected_rewards
    per_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "effective_weight": torch.sigmoid(-margins),
    }
    if batch.ref_token_logps is not None:
        per_pair["logratio/chosen"] = chosen_logps - chosen.ref_logps
        per_pair["logratio/rejected"] = rejected_logps - rejected.ref_logps
    if beta_neg > 0:
        constant = math.log(beta_neg / beta_pos)
        ratio = chosen_logps - rejected_logps + constant
        if length_normalized:
            ratio = ratio + (chosen_tokens.to(ratio.dtype) / rejected_tokens).log()
        per_pair["grad_ratio_log"] = ratio
        # The 0 / 0 of a response without tokens is masked below, with the rest of its row.
        per_pair["grad_ratio_log_per_token"] = (
            chosen_logps / chosen_tokens - rejected_logps / rejected_tokens + constant
        )
    values = torch.stack([*per_pair.values(), chosen_logps, rejected_logps]).masked_fill(~mask, 0.0)
    pairs, tokens = mask.to(values.dtype), torch.stack([chosen_tokens, rejected_tokens]).masked_fill(~mask, 0.0)
    counts = [*[pairs] * len(per_pair), *tokens.to(values.dtype)]
    names = [*per_pair, "mean_logps/chosen", "mean_logps/rejected"]
    return {name: Metric(value, count) for name, value, count in zip(names, values, counts, strict=True)}


def masked_metric(
    values: Float[Tensor, " B"], mask: Bool[Tensor, " B"], counts: Num[Tensor, " B"] | None = None
) -> Metric:
    """A metric over the rows of ``mask``, detached.

    Args:
        values: One numerator a row [B].
        mask: Rows that count.
        counts: One denominator a row [B]; None counts every row once.
    """
    counts = torch.ones_like(values) if counts is None else counts.to(values.dtype)
    return Metric(values.detach().masked_fill(~mask, 0.0), counts.masked_fill(~mask, 0.0))
