"""The passes of online RL over prompts with their completions: one padded row each, or one row a prompt.

TRL computes every prompt once for each of its completions, in the passes of the old policy and the reference as in the
update. Here the completions of a prompt that stand in one call share a row, and what comes out has TRL's form.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)``; its ``log_probs`` and ``entropy`` carry
  a gradient, ``log_sum_sq_probs`` none, and all are 0 where the label is -100
- trl's prompts are padded on the left and its completions on the right, to ``logits_to_keep`` positions
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from trl.trainer.utils import add_fused_lm_head

from alignkit.data.prefix import IGNORE_INDEX, CandidateCollator, on_device, sent
from alignkit.errors import ConfigError, ModelError
from alignkit.models._forward import base_model, completion_forward, support_packed_rows
from alignkit.models._layouts import ASKED_FOR, CHEAPER, LayoutChoice, Requested, first_obstacle, refusal

NOT_GIVEN: Mapping[str, str] = {
    "old_policy_kl": (
        "`center: exact_kl` needs the whole distribution of the old policy at every token, and a run keeps the "
        "log-prob of that token alone: with a vocabulary of 150,000 each would take 600 kB. Write center: k3, which "
        "estimates the same divergence from the tokens, or logmean or logmeanexp"
    )
}
"""What a method may need and an online run does not give, with what to write instead."""


@dataclass(frozen=True)
class PolicyOutput:
    """What a pass over completions gave, [B, T] each and 0 where masked; the bridge adds ``aux_loss`` to the loss.

    Attributes:
        token_logps: Log-prob of each completion token, nats, with gradient.
        entropies: Entropy of the next-token distribution, nats, with gradient; None under a head without it.
        log_sum_sq_probs: Log of the sum of its squared probabilities; None under a head without it.
        aux_loss: Load-balancing loss of a mixture of experts, where it was asked for.
    """

    token_logps: Tensor
    entropies: Tensor | None
    log_sum_sq_probs: Tensor | None
    aux_loss: Tensor | None


def refuse_needs(needs: Iterable[str]) -> None:
    """Refuse what a method needs and no run gives.

    Args:
        needs: Of the method under its options.

    Raises:
        ConfigError: Names each.
    """
    if problems := [NOT_GIVEN[need] for need in needs if need in NOT_GIVEN]:
        raise ConfigError("the method needs what an online run does not give", problems)


def prepare_policy(model: nn.Module, needs: Iterable[str], *, temperature: float, cast_lm_head_to_fp32: bool) -> None:
    """Make a policy with TRL's head ready for packed rows, and its head give what the method needs.

    Args:
        model: The policy, plain or PEFT.
        needs: Of the method.
        temperature: What its log-probs are taken at.
        cast_lm_head_to_fp32: As in TRL.
    """
    base = base_model(model)
    support_packed_rows(base)
    if "old_sum_sq_probs" in needs:
        outputs = ("log_probs", "entropy", "log_sum_sq_probs")
        add_fused_lm_head(base, temperature, cast_lm_head_to_fp32, outputs)


def choose_policy_layout(
    requested: Requested,
    model: nn.Module,
    *,
    others: Mapping[str, nn.Module],
    longest: int,
    aux_loss: bool,
    keeps_attention: bool,
) -> LayoutChoice:
    """Whether completions of a prompt may share a row, from what is known of the models.

    Args:
        requested: The config's ``layout``.
        model: The policy, plain or PEFT.
        others: Every other model that is run, by what it is called.
        longest: Longest prompt and completion there can be, tokens.
        aux_loss: Whether a load-balancing loss is trained on.
        keeps_attention: Whether completions are drawn by an engine that knows the model's own attention alone.

    Raises:
        ModelError: ``packed`` was asked for and a model does not allow it.
    """
    if requested == "padded":
        return LayoutChoice("padded", ASKED_FOR)
    obstacle = first_obstacle(model, others, longest=longest)
    if keeps_attention:
        obstacle = "the engine that draws completions (continuous batching) knows the model's own attention alone"
    if aux_loss:
        obstacle = "the load-balancing loss counts every prompt once per completion, those of empty ones too"
    if obstacle and requested == "packed":
        raise ModelError(refusal(obstacle))
    if obstacle:
        return LayoutChoice("padded", obstacle)
    return LayoutChoice("packed", ASKED_FOR if requested == "packed" else CHEAPER)


@dataclass(frozen=True)
class PolicyForward:
    """Runs completions under a model in the layout of a run.

    Args:
        layout: What was chosen.
        most: Completions that one packed row holds at most; of more of a prompt, the others stand in the next row.
    """

    layout: LayoutChoice
    most: int

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *,
        batch_size: int | None = None,
        router_logits: bool = False,
    ) -> PolicyOutput:
        """Score completions as TRL does, ``batch_size`` of them at a time.

        Args:
            model: With a fused head, wrapped or not.
            input_ids: [B, P + T], prompts padded on the left and completions on the right.
            attention_mask: 1 on tokens.
            logits_to_keep: T.
            batch_size: Completions a pass; None is all.
            router_logits: Ask a mixture of experts for its load-balancing loss.
        """
        size = batch_size or len(input_ids)
        parts = [
            self._one_pass(model, ids, mask, logits_to_keep, router_logits)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _one_pass(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int, router_logits: bool
    ) -> PolicyOutput:
        if self.layout.layout == "packed":
            rows, places = rows_by_prompt(input_ids, attention_mask, keep, self.most)
            # Of completions that are all masked there is nothing to pack, and the padded pass gives their zeros.
            if rows:
                return packed_pass(model, rows, places, (len(input_ids), keep), input_ids.device)
        return padded_pass(model, input_ids, attention_mask, keep, router_logits=router_logits)


def padded_pass(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int, *, router_logits: bool = False
) -> PolicyOutput:
    """TRL's pass: a row for each completion."""
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels[:, :-keep] = IGNORE_INDEX
    extra = {"output_router_logits": True} if router_logits else {}
    found = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **extra)
    entropies, squares = (None if x is None else x[:, -keep:] for x in (found.entropy, found.log_sum_sq_probs))
    return PolicyOutput(found.log_probs[:, -keep:], entropies, squares, found.aux_loss)


Place = tuple[int, int, int]
"""A completion of a call: its number there, the row that it stands in, and which branch of that row it is."""


def rows_by_prompt(
    input_ids: Tensor, attention_mask: Tensor, keep: int, most: int
) -> tuple[list[dict[str, Any]], list[Place]]:
    """Candidate rows of the completions that have tokens, in the order in which their prompts come first.

    Args:
        input_ids: See :class:`PolicyForward`.
        attention_mask: See there.
        keep: T.
        most: Completions of a row.

    Returns:
        The rows, and where each completion is.
    """
    rows: list[dict[str, Any]] = []
    places: list[Place] = []
    last_row: dict[tuple[int, ...], int] = {}
    # One copy, since each would wait for the device.
    both = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu()
    for number, (ids, seen) in enumerate(zip(both[0], both[1].bool(), strict=True)):
        prompt, completion = ids[:-keep][seen[:-keep]].tolist(), ids[-keep:][seen[-keep:]].tolist()
        if not completion:
            continue
        place = last_row.get(tuple(prompt))
        if place is None or len(rows[place]["completion_ids"]) == most:
            place = last_row[tuple(prompt)] = len(rows)
            rows.append({"prompt_ids": prompt, "completion_ids": [], "scores": []})
        places.append((number, place, len(rows[place]["completion_ids"])))
        rows[place]["completion_ids"].append(completion)
        rows[place]["scores"].append(0.0)
    return rows, places


def packed_pass(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[Place],
    shape: tuple[int, int],
    device: torch.device,
) -> PolicyOutput:
    """A pass over rows that share their prompts, its results laid out as TRL's.

    Args:
        model: With a fused head and the hooks of packed rows.
        rows: From :func:`rows_by_prompt`.
        places: From there too.
        shape: B and T of the results.
        device: Of the model's inputs.
    """
    inputs = on_device(CandidateCollator(0, "packed")(rows), device)
    found = completion_forward(model, inputs)
    branches = inputs["completion_mask"].shape[1]
    taken = sent(torch.tensor([row * branches + branch for _, row, branch in places]), device)
    numbers = sent(torch.tensor([number for number, _, _ in places]), device)

    def as_trl(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        tokens = values.flatten(0, 1)[taken]
        tokens = pad(tokens, (0, shape[1] - tokens.shape[1]))
        return tokens.new_zeros(shape).index_copy(0, numbers, tokens)

    logps = as_trl(found.token_logps)
    assert logps is not None
    return PolicyOutput(logps, as_trl(found.entropy), as_trl(found.log_sum_sq_probs), aux_loss=None)


def _joined(parts: Sequence[PolicyOutput]) -> PolicyOutput:
    def rows(values: Sequence[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat([x for x in values if x is not None])

    aux = [part.aux_loss for part in parts if part.aux_loss is not None]
    return PolicyOutput(
        torch.cat([part.token_logps for part in parts]),
        rows([part.entropies for part in parts]),
        rows([part.log_sum_sq_probs for part in parts]),
        torch.stack(aux).mean() if aux else None,
    )
