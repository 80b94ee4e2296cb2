"""What is seen of completions and of the update made of them, beside what TRL and the method log.

TRL averages the metrics of an evaluation over its batches, of which the last is shorter or holds repeated rows. Here
they are taken over the completions themselves.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``GRPOTrainer._calculate_rewards(inputs, prompts, completions, completion_ids_list)``, which returns the rewards
  of all processes, those of one behind those of the other
- trl ``GRPOTrainer._metrics``, ``reward_weights``, ``reward_func_names``, ``eos_token_ids`` and ``_tokenizer``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.losses.grpo import LARGEST_LOG_RATIO
from alignkit.losses.types import Metric
from alignkit.reports.held_out import pass_at_k, reward_interval

QUARTERS = 4
AXES: Mapping[str, str] = {
    "position": "its completion's tokens, in their order",
    "length": "the completions of a draw, the shortest first",
    "entropy": "its completion's tokens, the most certain first",
}
"""What a token is put into one of four equal parts by: a token's place in its completion, its completion's among all
that were drawn at a time, or its own among its completion's. Parts are by rank, so that none is empty."""

METRICS: Mapping[str, str] = {
    "advantages/spread": "mean distance of the advantages from 0",
    "completions/length_reward_correlation": "how length goes with reward among the completions of a prompt, between "
    "-1 and 1; 0 where either does not vary",
    **{
        f"ratio/{what}/{axis}_{quarter}": f"{said} over the tokens in quarter {quarter} of {AXES[axis]}"
        for axis in AXES
        for quarter in range(1, QUARTERS + 1)
        for what, said in (("mean", "mean token ratio"), ("spread", "mean distance of the token ratio from 1"))
    },
}
"""What is logged of every update, whatever the method."""


@dataclass(frozen=True)
class Drawn:
    """Completions of one draw, of all processes, those of one process behind those of the other.

    Attributes:
        parts: What each reward gave, [N, R], NaN where it gave none.
        rewards: Weighted sums [N], NaN where no reward gave any.
        lengths: Tokens that the model wrote.
        truncated: Whether a completion did not stop.
        generations: Completions a prompt, which stand together.
    """

    parts: Tensor
    rewards: Tensor
    lengths: Tensor
    truncated: Tensor
    generations: int

    def first(self, count: int) -> Drawn:
        """The same of the first ``count`` completions alone."""
        kept = (self.parts[:count], self.rewards[:count], self.lengths[:count], self.truncated[:count])
        return Drawn(*kept, self.generations)


class CompletionWatch:
    """Looks at what a trainer draws: records it while training, and gathers it while evaluating.

    Args:
        trainer: An :class:`~alignkit.shapes._policy_trainer.OnlineTrainer`.
        success_threshold: Reward from which a completion is a success; None goes by rewards that are all 0 or 1.

    Attributes:
        consumers: Called with every draw of training.
    """

    def __init__(self, trainer: Any, success_threshold: float | None) -> None:
        self.trainer, self.success_threshold = trainer, success_threshold
        self.consumers: list[Callable[[Drawn], None]] = []
        self._held_out: list[Drawn] = []
        self._rewarded: tuple[Tensor, list[list[int]]] | None = None

    def rewarded(self, parts: Tensor, completion_ids: list[list[int]]) -> None:
        """Remember what rewards gave, and the completions of this process."""
        self._rewarded = parts, completion_ids

    def drawn(self, output: dict[str, Any], generations: int) -> None:
        """Look at a draw, and put down in it which quarter of all lengths each completion belongs to; a collective.

        Args:
            output: What TRL returns of a draw; receives ``length_quarter``.
            generations: Completions a prompt.
        """
        assert self._rewarded is not None
        parts, own_ids = self._rewarded
        self._rewarded = None
        drawn = self._of_all_processes(parts, own_ids, output.get("tool_mask"), generations)
        if not self.trainer.model.training:
            self._held_out.append(drawn.first(self.trainer.counted_rows(len(own_ids))))
            return
        first = self.trainer.accelerator.process_index * len(own_ids)
        ranks = drawn.lengths.argsort(stable=True).argsort()
        output["length_quarter"] = quarter_of(ranks, len(ranks))[first : first + len(own_ids)]
        # Every process has seen all completions, so that sums over processes are a mean of equal values.
        self.trainer.record("completions/length_reward_correlation", Metric(correlation(drawn).reshape(1)))
        self.trainer.record("advantages/spread", Metric(output["advantages"].abs().flatten()))
        for consumer in self.consumers:
            consumer(drawn)

    def _of_all_processes(self, parts: Tensor, ids: list[list[int]], tool_mask: Tensor | None, count: int) -> Drawn:
        trainer, device = self.trainer, parts.device
        stops = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
        lengths = torch.tensor([len(row) for row in ids], device=device) if tool_mask is None else tool_mask.sum(1)
        truncated = torch.tensor([row[-1] not in stops for row in ids], device=device)
        own = torch.stack([lengths.long(), truncated.long()], 1)
        lengths, truncated = trainer.accelerator.gather(own).unbind(1)
        rewards = (parts * trainer.reward_weights.to(device)).nansum(1).masked_fill(parts.isnan().all(1), math.nan)
        return Drawn(parts, rewards, lengths, truncated.bool(), count)

    def evaluation(self) -> dict[str, float]:
        """Metrics of the completions held out that were drawn since the last call, under their names in a log."""
        if not self._held_out:
            return {}
        seen, self._held_out = self._held_out, []
        drawn = Drawn(
            torch.cat([each.parts.cpu() for each in seen]),
            torch.cat([each.rewards.cpu() for each in seen]),
            torch.cat([each.lengths.cpu() for each in seen]),
            torch.cat([each.truncated.cpu() for each in seen]),
            seen[0].generations,
        )
        return evaluation_metrics(drawn, self.trainer.reward_func_names, self.success_threshold)

    def update(self, inputs: Mapping[str, Any], token_logps: Tensor, entropies: Tensor | None, mask: Tensor) -> None:
        """Record what the update of a micro-batch does to its tokens.

        Args:
            inputs: The micro-batch.
            token_logps: Of the policy now, [B, T], nats.
            entropies: Of the policy now, nats; None under a head that gives none.
            mask: Tokens that are trained.
        """
        old = inputs.get("old_per_token_logps", token_logps)
        found = ratio_metrics(token_logps.detach(), old.detach(), entropies, mask, inputs["length_quarter"])
        for name, metric in found.items():
            self.trainer.record(name, metric)


def quarter_of(ranks: Tensor, count: Tensor | int) -> Tensor:
    """Which of four equal parts, from 0, a rank below ``count`` falls into, by the middle of its place."""
    return (2 * ranks + 1) * QUARTERS // (2 * count)


def ratio_metrics(
    token_logps: Tensor, old_token_logps: Tensor, entropies: Tensor | None, mask: Tensor, length_quarter: Tensor
) -> dict[str, Metric]:
    """Mean and spread of the ratio pi / pi_old by position, length and entropy.

    Args:
        token_logps: log pi [B, T].
        old_token_logps: log pi_old.
        entropies: Of pi, nats; None leaves out what is by entropy.
        mask: Tokens that count.
        length_quarter: Quarter of each completion [B], from 0.
    """
    log_ratio = (token_logps - old_token_logps).masked_fill(~mask, 0.0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.double().exp()
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    quarters = {
        "position": quarter_of(mask.cumsum(1) - 1, counts),
        "length": length_quarter[:, None].expand_as(mask),
    }
    if entropies is not None:
        certain_first = entropies.detach().masked_fill(~mask, math.inf).argsort(dim=1, stable=True)
        quarters["entropy"] = quarter_of(certain_first.argsort(dim=1), counts)
    metrics: dict[str, Metric] = {}
    for axis, quarter in quarters.items():
        is_in = (quarter[..., None] == torch.arange(QUARTERS, device=mask.device)) & mask[..., None]
        count = is_in.sum((0, 1)).double()
        for what, values in (("mean", ratio), ("spread", (ratio - 1).abs())):
            sums = (values[..., None] * is_in).sum((0, 1))
            metrics |= {
                f"ratio/{what}/{axis}_{n + 1}": Metric(sums[n : n + 1], count[n : n + 1]) for n in range(QUARTERS)
            }
    return metrics


def correlation(drawn: Drawn) -> Tensor:
    """Pearson's correlation of length and reward, both as differences from the mean of their prompt's completions."""
    scored = ~drawn.rewards.isnan().view(-1, drawn.generations)
    count = scored.sum(1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        kept = values.double().view(-1, drawn.generations).masked_fill(~scored, 0.0)
        return (kept - kept.sum(1, keepdim=True) / count).masked_fill(~scored, 0.0)

    lengths, rewards = centred(drawn.lengths), centred(drawn.rewards)
    scale = (lengths.square().sum() * rewards.square().sum()).sqrt()
    # Rewards that are equal but for rounding leave about 1e-8 each.
    varies = rewards.abs().max() > 1e-7
    return torch.where(varies & (scale > 0), (lengths * rewards).sum() / scale.clamp(min=1e-300), 0.0)


def evaluation_metrics(drawn: Drawn, names: Sequence[str], success_threshold: float | None) -> dict[str, float]:
    """Every metric of held-out completions, over all of them.

    Args:
        drawn: The completions, on the CPU.
        names: Of the rewards.
        success_threshold: Reward from which a completion is a success; None goes by rewards that are all 0 or 1.
    """
    totals = drawn.rewards.double()
    groups = [
        [value for value in group if not math.isnan(value)] for group in totals.view(-1, drawn.generations).tolist()
    ]
    equal = [len(group) for group in groups if group and min(group) == max(group)]
    metrics = {
        **_mean_and_std("reward", "reward_std", totals),
        "frac_reward_zero_std": sum(equal) / max(sum(map(len, groups)), 1),
        **_lengths(drawn),
    }
    for i, name in enumerate(names):
        metrics |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", drawn.parts[:, i].double())
    if (ends := reward_interval(groups)) is not None:
        metrics["reward_low"], metrics["reward_high"] = ends
    if success_threshold is None and not all(value in (0.0, 1.0) for group in groups for value in group):
        return metrics
    threshold = 1.0 if success_threshold is None else success_threshold
    won = [[value >= threshold for value in group] for group in groups]
    for k in (2**power for power in range(drawn.generations.bit_length())):
        if (found := pass_at_k(won, k)) is not None:
            mean, (low, high) = found
            metrics |= {f"pass@{k}": mean, f"pass@{k}_low": low, f"pass@{k}_high": high}
    return metrics


def _mean_and_std(mean_key: str, std_key: str, values: Tensor) -> dict[str, float]:
    """Mean and, of two or more, Bessel's standard deviation of the values that are numbers; neither of none."""
    known = values[~values.isnan()]
    found = {mean_key: known.mean().item()} if len(known) else {}
    return found | ({std_key: known.std().item()} if len(known) > 1 else {})


def _lengths(drawn: Drawn) -> dict[str, float]:
    lengths, stopped = drawn.lengths.double(), drawn.lengths[~drawn.truncated].double()
    # TRL's convention: where no completion stopped, the lengths of those that did are 0.
    stopped = stopped if len(stopped) else torch.zeros(1, dtype=torch.double)
    metrics = {"completions/clipped_ratio": drawn.truncated.double().mean().item()}
    for name, values in (("", lengths), ("_terminated", stopped)):
        metrics[f"completions/mean{name}_length"] = values.mean().item()
        metrics[f"completions/min{name}_length"] = values.min().item()
        metrics[f"completions/max{name}_length"] = values.max().item()
    return metrics
