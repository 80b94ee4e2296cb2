"""Batch shapes and loss outputs shared by every objective.

Axis letters: B groups (or rows) in the batch, K candidates of a group, T completion (or row) positions; of a
``PolicyBatch`` B are completions; of a ``RoutedBatch`` D are the experts of all layers that are looked at; of a
``RewardBatch`` D are dimensions that answers are judged along, E the numbers that a head gives. Tensors
named ``*_token_logps`` are per token and 0 where masked; ``*_logps`` are their sums over T in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ITEM_KINDS = ("group", "chosen_token", "completion_token")
"""What a loss term can be averaged over. ``group`` is one prompt with its candidates; a pair is a group with K = 2."""

POLICY_ITEM_KINDS = ("completion", "completion_token", "micro_batch")
"""The same for a ``PolicyBatch``. ``micro_batch`` is for what is a mean within each: its count is their number."""

ROUTED_ITEM_KINDS = ("token", "row")
"""The same for a ``RoutedBatch``: trained tokens, and rows with at least one."""

REWARD_ITEM_KINDS = ("group", "candidate", "label")
"""The same for a ``RewardBatch``: rows with a scored candidate, these candidates, and labels along dimensions."""


def sequence_logps(token_logps: Float[Tensor, "*N T"], mask: Bool[Tensor, "*N T"]) -> Float[Tensor, "*N"]:
    """Sum token log-probs over the unmasked positions of T, accumulating in at least float32."""
    if token_logps.dtype in (torch.float16, torch.bfloat16):
        token_logps = token_logps.float()
    return token_logps.masked_fill(~mask, 0.0).sum(-1)


def alone(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """What ``gather`` of a batch does where no other process is."""
    return values


@dataclass(frozen=True)
class CandidateSide:
    """One candidate of every group: the ``chosen`` or ``rejected`` view of a :class:`CandidateBatch`."""

    policy_token_logps: Float[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    ref_token_logps: Float[Tensor, "B T"] | None = None
    token_rewards: Float[Tensor, "B T"] | None = None

    @property
    def policy_logps(self) -> Float[Tensor, " B"]:
        """Sequence log-prob under the policy, nats."""
        return sequence_logps(self.policy_token_logps, self.completion_mask)

    @property
    def policy_mean_logps(self) -> Float[Tensor, " B"]:
        """Mean log-prob of a token under the policy, nats; 0 of a completion without any."""
        return self.policy_logps / self.num_tokens.clamp(min=1)

    @property
    def ref_logps(self) -> Float[Tensor, " B"]:
        """Sequence log-prob under the reference, nats; raises ValueError when the batch carries no reference."""
        if self.ref_token_logps is None:
            raise ValueError("this batch carries no reference log-probs (ref_token_logps is None)")
        return sequence_logps(self.ref_token_logps, self.completion_mask)

    @property
    def logratio(self) -> Float[Tensor, " B"]:
        """``log pi - log pi_ref`` of the completion, nats."""
        return self.policy_logps - self.ref_logps

    @property
    def num_tokens(self) -> Float[Tensor, " B"]:
        """Completion tokens including EOS."""
        return self.completion_mask.sum(-1).to(torch.float32)


@dataclass(frozen=True)
class CandidateBatch:
    """One prompt a row, K candidate completions. A preference pair is K = 2 in the order (chosen, rejected).

    Attributes:
        policy_token_logps: Log-prob of each completion token under the policy, 0 where masked, nats.
        completion_mask: True on completion tokens including EOS.
        candidate_mask: True where the candidate exists (ragged K).
        scores: Rewards, ranks or labels; a pair carries (1, 0).
        ref_token_logps: The same as ``policy_token_logps`` under the reference, without gradient.
        token_rewards: Per-token rewards, 0 where masked.
        policy_log_sum_sq_probs: Log of the sum over the vocabulary of the policy's squared probabilities, without
            gradient, 0 where masked.
        vocabulary_size: V of the policy, or None where nobody asked.
        first_equal: Index of the first candidate of the row with the same tokens, its own where there is none before
            it; None takes all candidates for different ones.
        gather: Concatenates values over processes, of which each holds as many. Collective: a loss calls it equally
            often in every process, whatever they hold.
    """

    policy_token_logps: Float[Tensor, "B K T"]
    completion_mask: Bool[Tensor, "B K T"]
    candidate_mask: Bool[Tensor, "B K"]
    scores: Float[Tensor, "B K"]
    ref_token_logps: Float[Tensor, "B K T"] | None = None
    token_rewards: Float[Tensor, "B K T"] | None = None
    policy_log_sum_sq_probs: Float[Tensor, "B K T"] | None = None
    vocabulary_size: int | None = None
    first_equal: Int[Tensor, "B K"] | None = None
    gather: Callable[[Tensor], Tensor] = alone

    @property
    def policy_logps(self) -> Float[Tensor, "B K"]:
        """Sequence log-prob of each candidate under the policy, nats."""
        return sequence_logps(self.policy_token_logps, self.completion_mask)

    @property
    def chosen(self) -> CandidateSide:
        """View of the preferred candidate; only for K = 2."""
        return self._side(0)

    @property
    def rejected(self) -> CandidateSide:
        """View of the dispreferred candidate; only for K = 2."""
        return self._side(1)

    def _side(self, index: int) -> CandidateSide:
        candidates = self.policy_token_logps.shape[1]
        if candidates != 2:
            raise ValueError(f"chosen and rejected are defined for K = 2 candidates, this batch has K = {candidates}")
        return CandidateSide(
            policy_token_logps=self.policy_token_logps[:, index],
            completion_mask=self.completion_mask[:, index],
            ref_token_logps=None if self.ref_token_logps is None else self.ref_token_logps[:, index],
            token_rewards=None if self.token_rewards is None else self.token_rewards[:, index],
        )


def count_items(completion_mask: Bool[Tensor, "B K T"]) -> dict[str, Tensor]:
    """Local number of items of every kind in ``ITEM_KINDS``, each an int64 scalar; a row without tokens is no group."""
    return {
        "group": completion_mask.flatten(1).any(1).sum(),
        "chosen_token": completion_mask[:, 0].sum(),
        "completion_token": completion_mask.sum(),
    }


@dataclass(frozen=True)
class TokenBatch:
    """Supervised rows: every position predicts the next token, and some of these predictions are trained.

    Attributes:
        policy_token_logps: Log-prob of each label under the policy, 0 where masked, nats.
        label_mask: True on the labels that are trained, the stop token included.
        teacher_kl: KL(teacher || policy) of the next-token distributions over the vocabulary, with gradient, nats.
        teacher_agrees: Whether teacher and policy find the same token the likeliest.
    """

    policy_token_logps: Float[Tensor, "B T"]
    label_mask: Bool[Tensor, "B T"]
    teacher_kl: Float[Tensor, "B T"] | None = None
    teacher_agrees: Bool[Tensor, "B T"] | None = None


@dataclass(frozen=True)
class PolicyBatch:
    """Completions that a policy wrote, with what they were worth. What stands at masked positions is never read.

    Attributes:
        policy_token_logps: Log-prob of each token under the policy, with gradient, nats.
        completion_mask: True on what the model wrote, EOS included; the output of tools is not.
        advantages: How much better than expected a completion, or a token, was.
        max_completion_length: Longest completion that can be generated, tokens.
        old_token_logps: Log-probs under the policy when the completions were made; None: that is the policy itself,
            so every ratio is 1 and carries the gradient alone.
        ref_token_logps: Log-probs under the reference, without gradient.
        group_index: Which prompt a completion answers.
        entropies: Entropy of the policy at each position, with gradient, nats.
        old_entropies: The same of the policy that made the completions.
        old_sum_sq_probs: Sum over the vocabulary of its squared probabilities.
        old_policy_kl: KL(pi_old || pi) at each position over the whole vocabulary, nats.
        correction: Importance ratio of the trainer's old policy to the sampler; multiplies the surrogate after
            clipping, and 0 drops.
        kept: Tokens whose surrogate counts; denominators count all the same. None keeps every token.
        gather: Concatenates values over processes, of which each may hold another number. Collective: a loss calls it
            equally often in every process, whatever they hold.
        memory: What an objective keeps from batch to batch; the trainer saves it in checkpoints. A tensor in it is
            replaced, never written into: a batch that does not count leaves the old one.
    """

    policy_token_logps: Float[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"]
    max_completion_length: int
    old_token_logps: Float[Tensor, "B T"] | None = None
    ref_token_logps: Float[Tensor, "B T"] | None = None
    group_index: Int[Tensor, " B"] | None = None
    entropies: Float[Tensor, "B T"] | None = None
    old_entropies: Float[Tensor, "B T"] | None = None
    old_sum_sq_probs: Float[Tensor, "B T"] | None = None
    old_policy_kl: Float[Tensor, "B T"] | None = None
    correction: Float[Tensor, "B T"] | Float[Tensor, "B 1"] | None = None
    kept: Bool[Tensor, "B T"] | None = None
    gather: Callable[[Tensor], Tensor] = alone
    memory: dict[str, Tensor] = field(default_factory=dict)


def count_policy_items(completion_mask: Bool[Tensor, "B T"]) -> dict[str, Tensor]:
    """Local number of items of every kind in ``POLICY_ITEM_KINDS``; a completion without trained tokens is one too."""
    tokens = completion_mask.sum()
    return {
        "completion": torch.full_like(tokens, completion_mask.shape[0]),
        "completion_token": tokens,
        "micro_batch": torch.ones_like(tokens),
    }


@dataclass(frozen=True)
class RoutedBatch:
    """Supervised rows of a mixture of experts, with how the prompt of each was routed.

    A routing is L blocks of E numbers behind one another, D = L * E: of each layer the shares of its experts, which sum
    to 1. What stands in rows without a trained token, or of a target where there is none, is never read.

    Attributes:
        policy_token_logps: Log-prob of each label under the policy, with gradient, nats.
        label_mask: True on the labels that are trained, the stop token included.
        routing: Of the policy, with gradient.
        target_routing: Mean routing of a row's neighbours in the reference bank.
        target_variance: Mean squared distance of these neighbours from that mean.
        has_target: Whether a row has neighbours.
        base_routing: Of the same prompt under the base model.
        num_layers: L.
        step: Optimizer steps that are done.
    """

    policy_token_logps: Float[Tensor, "B T"]
    label_mask: Bool[Tensor, "B T"]
    routing: Float[Tensor, "B D"]
    target_routing: Float[Tensor, "B D"]
    target_variance: Float[Tensor, " B"]
    has_target: Bool[Tensor, " B"]
    base_routing: Float[Tensor, "B D"]
    num_layers: int
    step: int


def count_routed_items(label_mask: Bool[Tensor, "B T"]) -> dict[str, Tensor]:
    """Local number of items of every kind in ``ROUTED_ITEM_KINDS``; a row without trained tokens is none."""
    return {"token": label_mask.sum(), "row": label_mask.any(1).sum()}


@dataclass(frozen=True)
class RewardBatch:
    """What a reward model says of the candidates of each row. What stands where there is none is never read.

    A candidate is whatever gets a number of its own: an answer, whose score says how good it is beside the others of
    its row, or one step of a solution, whose score says whether it is right.

    Attributes:
        rewards: What the model says, with gradient.
        candidate_mask: True where the candidate exists (ragged K).
        scores: What the data say: scores or ranks of answers, of which a pair carries (1, 0); labels of steps.
        margin: By how much the reward of the chosen answer shall exceed that of the rejected one; None is 0.
        displacements: Of a model whose head gives E numbers, those at the last token of the answer less those at the
            last token of the prompt, with gradient; None where the head gives one.
        labels: Along each of D dimensions whether the first answer of a pair is better (1) or worse (-1) than the
            second; 0 where nobody has said.
    """

    rewards: Float[Tensor, "B K"]
    candidate_mask: Bool[Tensor, "B K"]
    scores: Float[Tensor, "B K"]
    margin: Float[Tensor, " B"] | None = None
    displacements: Float[Tensor, "B K E"] | None = None
    labels: Float[Tensor, "B D"] | None = None


def count_reward_items(
    candidate_mask: Bool[Tensor, "B K"], labels: Float[Tensor, "B D"] | None = None
) -> dict[str, Tensor]:
    """Local number of items of every kind in ``REWARD_ITEM_KINDS``; a row without candidates is none.

    Args:
        candidate_mask: Of a :class:`RewardBatch`.
        labels: Of the same, of which those of whole pairs count; None is none.
    """
    candidates = candidate_mask.sum()
    labelled = torch.zeros_like(candidates) if labels is None else (labelled_pairs(candidate_mask, labels)).sum()
    return {"group": candidate_mask.any(1).sum(), "candidate": candidates, "label": labelled}


def labelled_pairs(candidate_mask: Bool[Tensor, "B K"], labels: Float[Tensor, "B D"]) -> Bool[Tensor, "B D"]:
    """Where a whole pair has a label."""
    return (labels != 0) & candidate_mask.all(1)[:, None]


@dataclass(frozen=True)
class LossTerm:
    """One additive part of an objective.

    The bridge computes ``weight * sum(values) / global number of items``, the count being taken over ranks and
    accumulation steps, so that every term keeps its own denominator.

    Attributes:
        name: Term name, logged as ``loss/<name>``.
        values: Unreduced contributions; they add up to the numerator.
        num_items: Local number of items the term is averaged over.
        item: What an item is: one of ``ITEM_KINDS`` for candidates, of ``POLICY_ITEM_KINDS`` for completions that a
            policy wrote, of ``ROUTED_ITEM_KINDS`` for routed rows, of ``REWARD_ITEM_KINDS`` for rewards, ``token`` for
            supervised rows.
        weight: Coefficient of the term in the loss.
    """

    name: str
    values: Float[Tensor, " N"]
    num_items: Tensor
    item: str = "group"
    weight: float = 1.0


@dataclass(frozen=True)
class Metric:
    """Detached values with their counts; the bridge logs ``sum(values) / sum(counts)`` over ranks and steps.

    ``counts`` is None when every value is one item.
    """

    values: Float[Tensor, " N"]
    counts: Float[Tensor, " N"] | None = None


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns: terms to minimise and metrics to log."""

    terms: tuple[LossTerm, ...]
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """The loss of this batch alone: sum over terms of weight * sum(values) / num_items."""
        total = torch.zeros((), dtype=self.terms[0].values.dtype, device=self.terms[0].values.device)
        for term in self.terms:
            total = total + term.weight * term.values.sum() / term.num_items.clamp(min=1)
        return total
