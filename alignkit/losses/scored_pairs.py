"""What the losses of the DPO family share: a score for each response of a pair, and what may modify it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.pairs import masked_metric, pair_mask, pair_metrics
from alignkit.losses.types import CandidateBatch, CandidateSide, LossOutput, LossTerm, count_items, sequence_logps

LARGEST_EXPONENT = 40.0
"""Above it ``exp`` is cut off, so that a loss and its gradient stay finite in float32, even squared."""


class LengthModifier(TypedDict, total=False):
    """What every loss of the family takes.

    Attributes:
        ld_alpha: Weight of the tokens beyond the length of the shorter response, in [0, 1]; None weighs all alike
            (LD-DPO, Liu et al. 2024, arXiv 2409.06411).
    """

    ld_alpha: float | None


class Modifiers(LengthModifier, total=False):
    """What a loss takes that is a value for each pair.

    Attributes:
        use_weighting: Weigh a pair by how likely the policy is to write it (WPO, Zhou et al. 2024, arXiv 2406.11827,
            Eq. 2, aligned to what the policy would sample), as TRL 1.16 has it.
    """

    use_weighting: bool


class ScoreModifiers(Modifiers, total=False):
    """What a loss takes that is a function of the difference of two scores alone.

    Attributes:
        f_divergence_type: Divergence from the reference that the scores stand for: ``reverse_kl``, ``forward_kl``,
            ``js_divergence`` or ``alpha_divergence`` (f-DPO, Wang et al. 2024, arXiv 2309.16240).
        f_alpha_divergence_coef: alpha of the last; 1 is the reverse KL, 0 the forward KL.
    """

    f_divergence_type: str
    f_alpha_divergence_coef: float


@dataclass(frozen=True)
class ResponseLogps:
    """Log-prob of each response under the policy and under the reference, nats."""

    policy: Float[Tensor, " B"]
    ref: Float[Tensor, " B"]

    @property
    def logratio(self) -> Float[Tensor, " B"]:
        """``log pi - log pi_ref``."""
        return self.policy - self.ref


@dataclass(frozen=True)
class ScoredPairs:
    """A batch of pairs with the scores that a loss is made of.

    Attributes:
        batch: Pairs [B, 2, T].
        chosen: Score of each chosen response, nats: its log-ratio to the reference, or what stands for it.
        rejected: The same of the rejected response.
        weights: What the loss of each pair is multiplied by, without gradient, or None.
        are_logratios: Whether scores are log-ratios in which all tokens of a response weigh the same.
        per_token: Whether scores are divided by the number of tokens.
    """

    batch: CandidateBatch
    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]
    weights: Float[Tensor, " B"] | None = None
    are_logratios: bool = True
    per_token: bool = False

    @property
    def margin(self) -> Float[Tensor, " B"]:
        """How much the chosen response scores above the rejected one, nats."""
        return self.chosen - self.rejected

    def divided_by_length(self) -> ScoredPairs:
        """The same pairs with every score divided by the number of tokens of its response."""
        chosen = self.chosen / self.batch.chosen.num_tokens.clamp(min=1)
        rejected = self.rejected / self.batch.rejected.num_tokens.clamp(min=1)
        return replace(self, chosen=chosen, rejected=rejected, per_token=True)

    def output(
        self,
        values: Float[Tensor, " B"],
        *,
        beta: float,
        of_margin: bool = True,
        effective_weight: Float[Tensor, " B"] | None = None,
    ) -> LossOutput:
        """The loss output of pairs whose losses are ``values``.

        Args:
            values: Loss of each pair; what stands where no pair is does not count.
            beta: What makes an implicit reward of a score.
            of_margin: Whether the loss of a pair is a function of its ``margin`` alone, so that the gradients of its
                two responses have a known ratio.
            effective_weight: Share of the gradient that is left, where the loss has such a thing.
        """
        batch, mask = self.batch, pair_mask(self.batch)
        if self.weights is not None:
            values = values * self.weights
        values = values.masked_fill(~mask, 0.0)
        metrics = pair_metrics(
            batch,
            chosen_rewards=beta * self.chosen,
            rejected_rewards=beta * self.rejected,
            beta_pos=beta,
            # Otherwise the ratio of the two gradients varies from pair to pair, and has no constant part.
            beta_neg=beta if of_margin and self.are_logratios else 0.0,
            length_normalized=self.per_token,
        )
        del metrics["effective_weight"]
        if effective_weight is not None:
            metrics["effective_weight"] = masked_metric(effective_weight, mask)
        return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)


def scored_pairs(
    batch: CandidateBatch,
    *,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> ScoredPairs:
    """The scores of a batch of pairs with reference log-probs; the arguments are those of :class:`ScoreModifiers`."""
    chosen, rejected = response_logps(batch, ld_alpha=ld_alpha)
    divergence = (f_divergence_type, f_alpha_divergence_coef)
    return ScoredPairs(
        batch,
        divergence_score(chosen.logratio, *divergence),
        divergence_score(rejected.logratio, *divergence),
        policy_weights(batch) if use_weighting else None,
        are_logratios=ld_alpha is None and f_divergence_type == "reverse_kl",
    )


def smoothed_logistic(margin: Float[Tensor, " B"], beta: float, label_smoothing: float) -> Float[Tensor, " B"]:
    """``-(1 - epsilon) log sigma(z) - epsilon log sigma(-z)`` of ``z = beta * margin``.

    A share epsilon, ``label_smoothing``, of the labels is taken for flipped. Each z is a product of its own, as TRL has
    it: the order of a sum of gradients decides their last bit.
    """
    return -F.logsigmoid(beta * margin) * (1 - label_smoothing) - F.logsigmoid(-beta * margin) * label_smoothing


def smoothed_slope(z: Float[Tensor, " B"], label_smoothing: float) -> Float[Tensor, " B"]:
    """Size of the derivative of :func:`smoothed_logistic` in z, ``|sigma(-z) - epsilon|``."""
    return (torch.sigmoid(-z) - label_smoothing).abs()


def divergence_score(logratio: Float[Tensor, " B"], kind: str, alpha: float) -> Float[Tensor, " B"]:
    """``f'(pi / pi_ref)`` of the f-divergence that ties the policy to the reference, up to a constant.

    With t the ratio: log t (reverse KL), 1 - 1/t (forward KL), log(2t / (t + 1)) (Jensen-Shannon) and
    (t^(alpha - 1) - 1) / (alpha - 1), each as TRL 1.16 has it, short of ``LARGEST_EXPONENT``: TRL cuts off the last
    one's exponent at 80 and lets that of the forward KL overflow.

    Args:
        logratio: ``log pi - log pi_ref`` of each response, nats.
        kind: ``f_divergence_type``.
        alpha: ``f_alpha_divergence_coef``.
    """
    if kind == "forward_kl":
        return 1 - torch.exp((-logratio).clamp(max=LARGEST_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)
    if kind == "alpha_divergence" and abs(alpha - 1.0) >= 1e-6:
        exponent = ((alpha - 1.0) * logratio).clamp(max=LARGEST_EXPONENT)
        return (torch.exp(exponent) - 1.0) * (1.0 / (alpha - 1.0))
    return logratio


def policy_weights(batch: CandidateBatch) -> Float[Tensor, " B"]:
    """WPO's weight of each pair, without gradient: the product of those of its responses.

    That of a response is ``exp(mean over its tokens of log pi(y_t) - log sum_v pi(v)^2)``: how likely its tokens are
    against tokens that the policy draws by itself.
    """
    if batch.policy_log_sum_sq_probs is None:
        raise ValueError("use_weighting needs what the policy gives all tokens (policy_log_sum_sq_probs is None)")
    wide = torch.promote_types(batch.policy_token_logps.dtype, torch.float32)
    aligned = batch.policy_token_logps.detach().to(wide) - batch.policy_log_sum_sq_probs.to(wide)
    lengths = batch.completion_mask.sum(-1).clamp(min=1)
    weights = torch.exp(sequence_logps(aligned, batch.completion_mask) / lengths)
    return weights[:, 0] * weights[:, 1]


def of_equal_rank(
    values: Float[Tensor, " B"], others: Float[Tensor, " B"], mask: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """For each of ``values`` that one of ``others`` which has its rank: the smallest goes with the smallest.

    Args:
        values: Numbers whose order counts.
        others: Numbers that are dealt out; they carry the gradient.
        mask: Rows that count; what the others get is of no use.
    """
    last = torch.finfo(values.dtype).max
    order = values.masked_fill(~mask, last).argsort(stable=True)
    ascending = others.masked_fill(~mask, last).sort(stable=True).values
    return torch.zeros_like(values).scatter(0, order, ascending)


def response_logps(batch: CandidateBatch, *, ld_alpha: float | None = None) -> tuple[ResponseLogps, ResponseLogps]:
    """Log-probs of the chosen and of the rejected responses of a batch, nats.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs.
        ld_alpha: See :class:`LengthModifier`.
    """
    chosen, rejected = batch.chosen, batch.rejected
    if ld_alpha is None:
        return ResponseLogps(chosen.policy_logps, chosen.ref_logps), ResponseLogps(
            rejected.policy_logps, rejected.ref_logps
        )
    shared = torch.minimum(chosen.num_tokens, rejected.num_tokens)
    return _desensitised(chosen, shared, ld_alpha), _desensitised(rejected, shared, ld_alpha)


def _desensitised(side: CandidateSide, shared: Float[Tensor, " B"], ld_alpha: float) -> ResponseLogps:
    """Of responses whose tokens after the first ``shared`` ones weigh ``ld_alpha``."""
    mask = side.completion_mask
    is_shared = mask & (mask.cumsum(-1) <= shared.unsqueeze(-1))
    parts = (is_shared, mask & ~is_shared, ld_alpha)
    if side.ref_token_logps is None:
        raise ValueError("this batch carries no reference log-probs (ref_token_logps is None)")
    return ResponseLogps(_weighed(side.policy_token_logps, *parts), _weighed(side.ref_token_logps, *parts))


def _weighed(
    token_logps: Float[Tensor, "B T"], whole: Bool[Tensor, "B T"], rest: Bool[Tensor, "B T"], share: float
) -> Float[Tensor, " B"]:
    """Sum over the ``whole`` positions, and ``share`` of that over the ``rest``."""
    return sequence_logps(token_logps, whole) + share * sequence_logps(token_logps, rest)
