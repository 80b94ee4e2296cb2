"""Targets of ADPO: what the softmax over a group's candidates is drawn to.

Every target is a set of *choices*. A choice is a subset S of the group's candidates and a distribution q over S; the
loss of a choice is the cross-entropy of q and the softmax over S, and the loss of a group is the mean over its choices.
A listwise target is one choice among all candidates, a pairwise target one choice for each pair, a ranking one choice
for each place. Axis letters: B groups, C choices of a group, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.lists import masked_log_softmax, masked_mean


@dataclass(frozen=True)
class Choices:
    """Choices of every group.

    Attributes:
        sets: The candidates of each choice; one with fewer than two is no choice.
        q: Target distribution over the set, 0 outside it; without gradient. Of no meaning where there is no choice.
    """

    sets: Bool[Tensor, "B C K"]
    q: Float[Tensor, "B C K"]

    @property
    def valid(self) -> Bool[Tensor, "B C"]:
        """Where there is something to choose between."""
        return self.sets.sum(-1) > 1

    @property
    def entropy(self) -> Float[Tensor, "B C"]:
        """H(q) of each choice, nats: the least its cross-entropy can be."""
        return -torch.xlogy(self.q, self.q).sum(-1)


Scores = Float[Tensor, "B K"]
Exists = Bool[Tensor, "B K"]


def pairwise_hard(scores: Scores, exists: Exists, beta_reward: float) -> Choices:
    """Every pair of unequal reward, q = (1, 0) for the better one; ``beta_reward`` has no part in it."""
    sets = _pairs(exists)
    in_set = scores.unsqueeze(1).masked_fill(~sets, -torch.inf)
    best = in_set == in_set.amax(-1, keepdim=True)
    is_decided = best.sum(-1, keepdim=True) == 1
    return Choices(sets & is_decided, best.to(scores.dtype))


def pairwise_soft(scores: Scores, exists: Exists, beta_reward: float) -> Choices:
    """Every pair, with the probabilities of Bradley and Terry: q_i = sigma((R_i - R_j) / beta_reward)."""
    return _softmax_choices(scores, _pairs(exists), beta_reward)


def listwise_raw(scores: Scores, exists: Exists, beta_reward: float) -> Choices:
    """q = softmax(R / beta_reward)."""
    return _softmax_choices(scores, exists.unsqueeze(1), beta_reward)


def listwise_zscore(scores: Scores, exists: Exists, beta_reward: float) -> Choices:
    """q = softmax(A / beta_reward), A = (R - mean) / (std + 1e-8) within the group; the std is the unbiased one.

    R are the rewards divided by their range, so that q does not depend on their scale; 0 where all are equal.
    """
    best = scores.masked_fill(~exists, -torch.inf).amax(-1, keepdim=True)
    worst = scores.masked_fill(~exists, torch.inf).amin(-1, keepdim=True)
    # Less the best one, so that no difference is lost where rewards are large; the softmax takes no notice of it.
    ranged = (scores - best) / (best - worst).clamp(min=torch.finfo(scores.dtype).tiny)
    return listwise_raw(ranged / (_std(ranged, exists).unsqueeze(-1) + 1e-8), exists, beta_reward)


def plackett_luce(scores: Scores, exists: Exists, beta_reward: float) -> Choices:
    """For each candidate, q = 1 on it against all that are no better; the last one has no rivals and is no choice.

    Without ties these are the factors of Plackett and Luce: first place among all, second among the rest, and so on.
    Candidates of equal reward are each other's rivals, whatever their order (Breslow's treatment of ties): each of them
    stands for a choice among the same candidates, and q is uniform over them in all of these, which has the same loss
    as q = 1 on each in turn, and says what that loss is least at. ``beta_reward`` has no part in it.
    """
    no_better = scores.unsqueeze(1) <= scores.unsqueeze(2)
    sets = no_better & exists.unsqueeze(1) & exists.unsqueeze(2)
    tied = sets & (scores.unsqueeze(1) == scores.unsqueeze(2))
    return Choices(sets, masked_log_softmax(torch.zeros_like(tied, dtype=scores.dtype), tied).exp())


def kde(scores: Scores, exists: Exists, beta_reward: float) -> Choices:
    """q = softmax(logit(F) / beta_reward), F the smoothed distribution function of the group's rewards."""
    return listwise_raw(kde_logits(scores, exists, silverman_bandwidth(scores, exists)), exists, beta_reward)


def kde_logits(scores: Scores, exists: Exists, bandwidth: Float[Tensor, " B"]) -> Float[Tensor, "B K"]:
    """logit(F_i), F_i = (1/P) sum_j Phi((R_i - R_j) / h), F clipped to [1e-3, 1 - 1e-3].

    Args:
        scores: Rewards R.
        exists: The P candidates of each group.
        bandwidth: h > 0 [B].
    """
    gaps = (scores.unsqueeze(2) - scores.unsqueeze(1)) / bandwidth.view(-1, 1, 1)
    smoothed = masked_mean(torch.special.ndtr(gaps), exists.unsqueeze(1).expand_as(gaps))
    return torch.logit(smoothed, eps=1e-3)


def silverman_bandwidth(scores: Scores, exists: Exists) -> Float[Tensor, " B"]:
    """h = 0.9 * min(std, IQR / 1.34) * P^(-1/5), quartiles interpolated linearly.

    Where that is 0 (half of the rewards are equal) it is the smallest positive number, which makes F the empirical
    distribution function, ties counted half.
    """
    quartiles = scores.new_tensor([0.25, 0.75])
    lower, upper = torch.nanquantile(scores.masked_fill(~exists, torch.nan), quartiles, dim=-1)
    spread = torch.minimum(_std(scores, exists), (upper - lower) / 1.34)
    candidates = exists.sum(-1).to(scores.dtype)
    return (0.9 * spread * candidates**-0.2).clamp(min=torch.finfo(scores.dtype).tiny)


TARGETS: dict[str, Callable[[Tensor, Tensor, float], Choices]] = {
    "pairwise_hard": pairwise_hard,
    "pairwise_soft": pairwise_soft,
    "listwise_raw": listwise_raw,
    "listwise_zscore": listwise_zscore,
    "plackett_luce": plackett_luce,
    "kde": kde,
}
"""Target by name: (rewards [B, K], existing candidates [B, K], ``beta_reward``) to choices."""


def _pairs(exists: Exists) -> Bool[Tensor, "B C K"]:
    """All pairs of candidates; one with a candidate that does not exist has a single member, or none."""
    candidates = exists.shape[-1]
    pairs = torch.combinations(torch.arange(candidates, device=exists.device))
    return F.one_hot(pairs, candidates).sum(1).bool() & exists.unsqueeze(1)


def _softmax_choices(scores: Scores, sets: Bool[Tensor, "B C K"], beta_reward: float) -> Choices:
    logits = (scores / beta_reward).unsqueeze(1).expand(sets.shape)
    return Choices(sets, masked_log_softmax(logits, sets).exp())


def _std(scores: Scores, exists: Exists) -> Float[Tensor, " B"]:
    """Unbiased standard deviation within each group; 0 for fewer than two candidates."""
    centred = (scores - masked_mean(scores, exists).unsqueeze(-1)).masked_fill(~exists, 0.0)
    return (centred.square().sum(-1) / (exists.sum(-1) - 1).clamp(min=1)).sqrt()
