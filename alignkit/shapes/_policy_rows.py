"""Which completions an online run is updated on: prompts drawn again, rows laid out, and a micro-batch in parts.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``GRPOTrainer._prepare_inputs(generation_batch)``, ``_buffered_inputs`` and ``_step``: see ``_policy_trainer.py``
- trl ``GRPOTrainer._generate_and_score_completions(inputs)``, which calls ``_generate(prompts)`` once and then
  ``_calculate_rewards`` once, and makes advantages, old log-probs and metrics of what these return
- trl ``GRPOTrainer._generate(prompts)``: lists of prompt ids, completion ids, tool masks, completions and log-probs
  come first in what it returns; it may be called with fewer prompts, as many on every process
- trl ``GRPOTrainer._calculate_rewards(inputs, prompts, completions, completion_ids_list)``, which gathers the rewards
  of all processes, NaN where a function returned None
- trl ``GRPOTrainer._metrics`` and ``_pending_extra_logs``, to which these two add
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from alignkit.errors import ConfigError
from alignkit.losses.types import Metric
from alignkit.shapes._arrangement import Arrangement, arranged, dead_rows, passes, window_of
from alignkit.shapes._bridge import ObjectiveBridge

SAMPLING_METRICS: Mapping[str, str] = {
    "dynamic_sampling/redrawn": "share of the prompts whose completions were drawn again",
    "dynamic_sampling/still_dead": "share whose completions were all worth the same every time",
    "dynamic_sampling/first_reward": "mean reward of what was drawn first, from which nothing was chosen; reward is "
    "that of the completions kept, completions/* are of what was drawn first",
}
"""What is logged beside the rest under ``dynamic_sampling``."""
OF_ROWS = 5
"""So many of the values of ``_generate`` are lists of rows, or None."""


class PolicyRows(ObjectiveBridge, GRPOTrainer):
    """Of an online trainer: what happens between drawing completions and the forward pass of the update."""

    settings: Any
    needs: frozenset[str]
    _buffered_inputs: list[dict[str, Any]] | None
    _pending_extra_logs: dict[str, list[Any]]
    _rewards: Tensor | None = None
    _drawn_for: Sequence[dict[str, Any]] = ()

    def refuse_settings(self, rollout_func: Any) -> None:
        """Refuse what cannot be done with the rows of this run.

        Raises:
            ConfigError: Says what to write instead.
        """
        problems = []
        reason = self.why_rows_stay
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            reason = "under DeepSpeed and FSDP all processes must make the same passes"
        if self.settings.max_tokens_per_micro_batch is not None and reason is not None:
            problems.append(
                f"`max_tokens_per_micro_batch` deals rows and passes by their tokens, but {reason}. Remove it, and "
                "write a smaller per_device_train_batch_size where memory is short"
            )
        if self.settings.dynamic_sampling:
            if rollout_func is not None or self.environment_factories is not None:
                problems.append("`dynamic_sampling` draws from the model itself. Remove it, or the environment")
            elif self.args.per_device_train_batch_size * self.args.steps_per_generation % self.num_generations:
                problems.append(
                    f"`dynamic_sampling` needs all completions of a prompt on one process: write num_generations, now "
                    f"{self.num_generations}, that divides per_device_train_batch_size x steps_per_generation"
                )
        if problems:
            raise ConfigError("completions cannot be chosen or dealt so", problems)

    # --- drawing ---------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL returns, with no advantage at all for completions that are worth as much as all of their prompt."""
        self._drawn_for = inputs
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._rewards is not None
        has_spread = self._spread(self._rewards).repeat_interleave(self._generations())
        first = self.accelerator.process_index * len(inputs)
        # Equal rewards less their mean are not always 0 in floating point, and TRL divides what is left by 1e-4.
        output["advantages"] = output["advantages"] * has_spread[first : first + len(inputs)]
        self._rewards, self._drawn_for = None, ()
        return output

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        """The rewards of all processes; those of completions that were chosen by them are known."""
        if self._rewards is None:
            self._rewards = super()._calculate_rewards(*inputs)
        return self._rewards

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Completions; of prompts whose completions are all worth the same, others where drawing again gives them."""
        drawn: tuple[Any, ...] = super()._generate(prompts)
        if not (self.settings.dynamic_sampling and self.model.training):
            return drawn
        values = list(drawn)
        self._rewards = rewards = self._scored(range(len(prompts)), prompts, values)
        spread = self._spread(rewards).view(self.accelerator.num_processes, -1)
        first_spread, first_rewards = spread.clone(), rewards.clone()
        for _ in range(self.settings.dynamic_sampling):
            if spread.all():
                break
            self._draw_again(prompts, values, rewards, spread)
        self._record_redrawn(first_spread, spread, first_rewards)
        return tuple(values)

    def _draw_again(self, prompts: Sequence[Any], values: list[Any], rewards: Tensor, spread: Tensor) -> None:
        """Once more for the prompts without spread, in place; every process draws equally many.

        Args:
            prompts: Of this process, one a completion.
            values: From :meth:`_generate`.
            rewards: [R P G, F], of all R processes.
            spread: [R, P], whether completions of a prompt differ in what they are worth.
        """
        size, me = self._generations(), self.accelerator.process_index
        count = int((~spread).sum(1).max())
        # Those without spread in their order, filled up with others, of which what is drawn now is dropped.
        chosen = spread.long().argsort(dim=1, stable=True)[:, :count]
        mine = [int(prompt) * size + i for prompt in chosen[me] for i in range(size)]
        again, extra = self._drawn_apart([prompts[row] for row in mine], mine)
        found = self._spread(again[-1]).view_as(chosen) & ~spread.gather(1, chosen)
        all_rewards, new_rewards = (x.view(*y.shape, size, -1) for x, y in ((rewards, spread), (again[-1], chosen)))
        for rank, place in found.nonzero().tolist():
            prompt = int(chosen[rank, place])
            all_rewards[rank, prompt] = new_rewards[rank, place]
            spread[rank, prompt] = True
            if rank == me:
                for i in range(size):
                    self._replace(values, again, extra, prompt * size + i, place * size + i)

    def _replace(self, values: list[Any], again: Sequence[Any], extra: Mapping[str, Any], row: int, new: int) -> None:
        for kept, other in zip(values[:OF_ROWS], again, strict=False):
            if kept is not None:
                kept[row] = other[new]
        for column, column_values in extra.items():
            self._pending_extra_logs[column][row] = column_values[new]

    def _drawn_apart(self, prompts: list[Any], rows: Sequence[int]) -> tuple[list[Any], Mapping[str, Any]]:
        """Values of ``_generate`` with the rewards behind them, and what rewards logged; of metrics, only tokens."""
        metrics, extra = self._metrics["train"], self._pending_extra_logs
        self._metrics["train"], self._pending_extra_logs = defaultdict(list), defaultdict(list)
        values = list(super()._generate(prompts))
        rewards = self._scored(rows, prompts, values)
        metrics["num_tokens"], found = self._metrics["train"]["num_tokens"], self._pending_extra_logs
        self._metrics["train"], self._pending_extra_logs = metrics, extra
        return [*values[:OF_ROWS], rewards], found

    def _scored(self, rows: Sequence[int], prompts: list[Any], values: Sequence[Any]) -> Tensor:
        inputs = [self._drawn_for[row] for row in rows]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, values[3], values[1])
        return rewards

    def _record_redrawn(self, first: Tensor, last: Tensor, rewards: Tensor) -> None:
        """Of this process; sums over all are made when metrics are logged."""
        me, local = self.accelerator.process_index, len(self._drawn_for)
        mine = rewards[me * local : (me + 1) * local]
        says = ~mine.isnan().all(1)
        worth = (mine * self.reward_weights.to(mine.device)).nansum(1)
        self.record("dynamic_sampling/redrawn", Metric((~first[me]).float()))
        self.record("dynamic_sampling/still_dead", Metric((~last[me]).float()))
        self.record("dynamic_sampling/first_reward", Metric(worth * says, says.float()))

    def _generations(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _spread(self, rewards: Tensor) -> Tensor:
        sums_first = self.multi_objective_aggregation == "sum_then_normalize"
        return groups_with_spread(rewards * self.reward_weights.to(rewards.device), self._generations(), sums_first)

    # --- laying out ------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The next micro-batch; those of a new draw are laid out first."""
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is None or self._buffered_inputs is before:
            return inputs
        for batch in self._buffered_inputs:
            self.record("dead_rows", Metric(dead_rows(batch).float()))
        if not self.settings.arrange_rows:
            return inputs
        self._buffered_inputs = arranged(self._buffered_inputs, self.arrangement)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @property
    def arrangement(self) -> Arrangement:
        """What may be done with the rows of a draw so that no number changes."""
        rows_stay, every_row_counts = self.why_rows_stay is not None, "every_row" in self.needs
        return Arrangement(
            1 if rows_stay else window_of(self.args.gradient_accumulation_steps, self.args.steps_per_generation),
            by_prompt=self.layout.layout == "packed",
            skip_dead=self.settings.skip_dead_rows and not rows_stay and not every_row_counts,
            max_tokens=self.settings.max_tokens_per_micro_batch,
        )

    @property
    def why_rows_stay(self) -> str | None:
        """What would change if rows changed places between the micro-batches of a step; None is nothing."""
        if "whole_micro_batch" in self.needs:
            return "the loss has a mean or a statistic within a micro-batch"
        if self.settings.top_entropy_quantile < 1.0:
            return "top_entropy_quantile is taken within a micro-batch"
        if self.aux_loss_enabled:
            return "the load-balancing loss is a mean within a micro-batch"
        if self.gradient_rule is not None and self.gradient_rule.rule.edit is not None:
            return "the gradient rule acts on one micro-batch at a time"
        return None

    def described_rows(self) -> str:
        """What is done with the rows of a draw, in one line."""
        if not self.settings.arrange_rows:
            return "as drawn, and as wide as the longest of the draw"
        how = self.arrangement
        order = "by prompt, longest first" if how.by_prompt else "longest first"
        said = [f"{order}, among the {how.window} micro-batches of a step" if how.window > 1 else order]
        if self.why_rows_stay is not None:
            said = [f"{order}, each in its micro-batch: {self.why_rows_stay}"]
        said.append("no wider than the longest of a micro-batch")
        if how.skip_dead:
            said.append("without those that move nothing")
        if how.max_tokens is not None:
            said.append(f"at most {how.max_tokens:,} tokens a pass")
        return "; ".join(said)

    # --- passes ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Loss of one micro-batch; of one with more tokens than a pass may have, in parts whose gradients add up.

        What comes back has the value of all and the gradient of the last part: those before have gone backward, and
        processes exchange gradients in the last pass alone.
        """
        limit = self.settings.max_tokens_per_micro_batch if torch.is_grad_enabled() else None
        *parts, last = passes(dict(inputs), limit)
        before: Tensor | float = 0.0
        for part in parts:
            with self.accelerator.no_sync(model):
                loss = super().compute_loss(model, part, return_outputs, num_items_in_batch)
                self.accelerator.backward(loss)
            before = before + loss.detach()
        return super().compute_loss(model, last, return_outputs, num_items_in_batch) + before


def groups_with_spread(rewards: Tensor, generations: int, is_summed: bool) -> Tensor:
    """Prompts [P] whose completions differ in what they are worth.

    Args:
        rewards: [P G, F], weighted; NaN where a reward says nothing.
        generations: Completions of a prompt, G.
        is_summed: Whether rewards are added before they are compared.
    """
    nothing = rewards.isnan().all(1, keepdim=True)
    if is_summed:
        rewards = rewards.nansum(1, keepdim=True).masked_fill(nothing, torch.nan)
    grouped = rewards.view(-1, generations, rewards.shape[1])
    lowest, highest = grouped.nan_to_num(torch.inf).amin(1), grouped.nan_to_num(-torch.inf).amax(1)
    return (highest > lowest).any(1)
