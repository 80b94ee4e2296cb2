"""Steps of a generation (positions, entropies or lengths), and statistics of each that all processes agree on.

Rows are tokens, or completions at level ``sequence``. All statistics are of the concatenation of every process's rows,
so that they do not depend on how rows were dealt out, and carry no gradient. Axis letters: N rows, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignkit.losses.grpo import written
from alignkit.losses.types import PolicyBatch

TOKEN_AXES = ("position", "position_quantile", "entropy")
SEQUENCE_AXES = ("length",)


def counted_rows(batch: PolicyBatch, level: str) -> Bool[Tensor, "B _"]:
    """Rows whose surrogate counts: written, kept and not dropped by a correction of 0."""
    counted = batch.completion_mask
    if batch.kept is not None:
        counted = counted & batch.kept
    if batch.correction is not None:
        counted = counted & (written(batch.correction, batch) != 0)
    return counted.any(-1, keepdim=True) if level == "sequence" else counted


def axis_values(batch: PolicyBatch, level: str, axis: str) -> Float[Tensor, "B _"]:
    """What rows are put into steps by: the position, the old policy's entropy in nats, or the length in tokens.

    Raises:
        ValueError: The axis is none of this level, or the batch lacks the entropies.
    """
    axes = SEQUENCE_AXES if level == "sequence" else TOKEN_AXES
    if axis not in axes:
        raise ValueError(f"step_axis {axis} does not exist at level {level}; write one of: {', '.join(axes)}")
    mask = batch.completion_mask
    match axis:
        case "length":
            return mask.sum(-1, keepdim=True).to(batch.policy_token_logps.dtype)
        case "entropy":
            entropies = batch.entropies if batch.old_token_logps is None else batch.old_entropies
            if entropies is None:
                raise ValueError("step_axis entropy needs the old policy's entropies (old_entropies is None)")
            return written(entropies, batch)
        case _:
            positions = torch.arange(mask.shape[-1], device=mask.device, dtype=batch.policy_token_logps.dtype)
            return positions.expand(mask.shape)


def step_bounds(values: Float[Tensor, " N"], axis: str, num_steps: int, longest: int) -> Float[Tensor, " S_1"]:
    """Where steps begin, but the first: cuts of ``longest`` into equal parts, or of the values into equal numbers.

    Args:
        values: Axis values of all processes.
        axis: Name of the axis; ``position`` alone is cut into equal parts.
        num_steps: S.
        longest: Longest completion that can be generated.
    """
    inner = range(1, num_steps)
    if axis == "position" or not len(values):
        return values.new_tensor([k * longest / num_steps for k in inner])
    return values.sort().values[[k * len(values) // num_steps for k in inner]]


def steps_of(values: Float[Tensor, "*N"], bounds: Float[Tensor, " S_1"]) -> Int[Tensor, "*N"]:
    """Index of the step of each value: how many bounds it reaches."""
    return torch.searchsorted(bounds, values.contiguous(), right=True)


def step_sums(values: Float[Tensor, " N"], steps: Int[Tensor, " N"], num_steps: int) -> Float[Tensor, " S"]:
    """Sums by step, added in the same order every time, which a scatter on a GPU does not promise."""
    is_in = steps.unsqueeze(-1) == torch.arange(num_steps, device=steps.device)
    return (values.unsqueeze(-1) * is_in).sum(0)


@dataclass(frozen=True)
class Moments:
    """Number of rows of each step, and of their log-ratios the mean and the summed squared distance from it."""

    count: Float[Tensor, " S"]
    mean: Float[Tensor, " S"]
    spread: Float[Tensor, " S"]

    @property
    def variance(self) -> Float[Tensor, " S"]:
        """0 of a step without rows."""
        return self.spread / self.count.clamp(min=1)


def moments(values: Float[Tensor, " N"], steps: Int[Tensor, " N"], num_steps: int) -> Moments:
    """Of the values of each step, in two passes, so that small variances keep their digits."""
    count = step_sums(torch.ones_like(values), steps, num_steps)
    mean = step_sums(values, steps, num_steps) / count.clamp(min=1)
    return Moments(count, mean, step_sums((values - mean[steps]).square(), steps, num_steps))


def smoothed(now: Moments, before: Moments, decay: float) -> Moments:
    """Moments of the rows of now and those of before, the latter counted ``decay`` times."""
    old_count = decay * before.count
    count = now.count + old_count
    gap, share = before.mean - now.mean, old_count / count.clamp(min=torch.finfo(count.dtype).tiny)
    between = gap.square() * share * now.count
    return Moments(count, now.mean + gap * share, now.spread + decay * before.spread + between)
