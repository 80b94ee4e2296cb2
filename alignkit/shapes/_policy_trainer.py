"""The trainer of online runs: TRL's GRPOTrainer with the objective of a :class:`~alignkit.parts.method.Method`.

Inherited from TRL: drawing completions (transformers or vLLM, tools, environments), rewards, advantages, when the old
policy and the reference are run, PEFT, saving. Replaced: the objective (on a PolicyBatch), its one division by the
counts of the step, metrics of the update, forward passes (``_policy_forward.py``, in a layout that
``_policy_layouts.py`` chooses), and what a checkpoint keeps (``_rollouts.py``).

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``GRPOTrainer._prepare_inputs(generation_batch)``, ``_buffered_inputs`` and ``_step``: completions are drawn every
  ``steps_per_generation * num_iterations`` micro-batches and kept in a list of batches in between
- trl ``GRPOTrainer._generate_and_score_completions(inputs)``, whose rows stand ``num_generations`` to a prompt over all
  processes, and the keys it returns
- trl ``GRPOTrainer._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, batch_size,
  compute_entropy, compute_aux_loss, ...)``, whose first value under the policy becomes ``old_per_token_logps``
- trl ``GRPOTrainer._get_train_sampler(dataset)``, a ``RepeatSampler`` whose generator goes on from pass to pass
- trl ``GRPOTrainer.beta``, whose being zero decides whether the reference is run
- the names in ``_bridge.py``, ``_policy_layouts.py`` and ``_policy_rows.py``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from alignkit.errors import DataError
from alignkit.gradients._hook import ChosenRule
from alignkit.losses.types import POLICY_ITEM_KINDS, LossOutput, PolicyBatch
from alignkit.models._aux_loss import checked_aux_loss
from alignkit.models._layouts import Requested
from alignkit.models.precision import trained_values
from alignkit.parts.method import Method
from alignkit.shapes._arguments import REFUSED_FOR_ONLINE, refuse_unused
from alignkit.shapes._bridge import ObjectiveBridge
from alignkit.shapes._policy_forward import PolicyOutput, refuse_needs
from alignkit.shapes._policy_layouts import PolicyLayouts
from alignkit.shapes._policy_metrics import METRICS as SEEN_METRICS
from alignkit.shapes._policy_metrics import CompletionWatch
from alignkit.shapes._policy_rows import PolicyRows
from alignkit.shapes._rollouts import Rollouts

METRICS: Mapping[str, str] = {
    "reward": "mean reward of the completions, weighted and added up",
    "reward_std": "standard deviation of the reward over completions",
    "dead_rows": "share of the drawn completions that move nothing, without an advantage or a token to train on; "
    "means over what an update sees are over the others where these are left out (skip_dead_rows)",
    "frac_reward_zero_std": "share of the completions whose prompt gives no signal: all are worth the same",
    "completions/mean_length": "mean length of the completions, tokens",
    "completions/min_length": "length of the shortest",
    "completions/max_length": "length of the longest",
    "completions/clipped_ratio": "share of the completions that did not stop within max_completion_length",
    "completions/mean_terminated_length": "mean length of those that did",
    "completions/min_terminated_length": "length of the shortest of them",
    "completions/max_terminated_length": "length of the longest of them",
    "num_tokens": "tokens of prompts and completions since the beginning",
    "step_time": "seconds a step, drawing completions included",
    **SEEN_METRICS,
}
"""What the bridge logs for every method, beside ``loss/<term>``, and mean and std of every reward by its name."""


@dataclass(frozen=True)
class UpdateSettings:
    """What the bridge needs beside TRL's arguments.

    Attributes:
        layout: ``padded``, ``packed`` or ``auto``.
        top_entropy_quantile: Share of the tokens, those of the largest entropy, that is trained on.
        off_policy_mask_threshold: Mean log-ratio from which completions with a negative advantage are left out, nats.
        max_prompt_length: Longest prompt there can be, tokens; None goes by the rows that are looked at.
        arrange_rows: Whether completions are laid out by prompt and length; False leaves them as TRL does.
        skip_dead_rows: Whether completions that move nothing are left out of the update where nothing else sees them.
        success_threshold: Reward from which a held-out completion is a success; None goes by rewards of 0 and 1.
        max_tokens_per_micro_batch: Most tokens of a forward pass of the update, padding included; None is no limit.
        dynamic_sampling: Times that completions without spread are drawn again.
    """

    layout: Requested = "padded"
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    max_prompt_length: int | None = None
    arrange_rows: bool = True
    skip_dead_rows: bool = True
    success_threshold: float | None = None
    max_tokens_per_micro_batch: int | None = None
    dynamic_sampling: int = 0


class OnlineTrainer(PolicyLayouts, PolicyRows, ObjectiveBridge, GRPOTrainer):
    """Draws completions of prompts, rewards them, and trains on them with any online method.

    Args:
        model: The policy, loaded; with ``peft_config`` it is wrapped by TRL.
        args: TRL's arguments; those of ``REFUSED_FOR_ONLINE`` must have their defaults.
        method: The method whose objective is minimised.
        options: Instance of ``method.options``.
        reward_funcs: As in TRL.
        train_dataset: Rows with ``prompt`` and the columns of the rewards.
        settings: Which tokens are trained, and in which layout.
        ref_model: The reference, loaded, where it is a model of its own; None where an adapter is trained.
        gradient_rule: What is done to the gradient before the optimizer sees it; None is nothing.
        **inherited: ``eval_dataset``, ``processing_class``, ``peft_config``, ``callbacks``, ``optimizers``, ``tools``,
            ``rollout_func`` and ``environment_factory`` as in TRL.
    """

    item_kinds = POLICY_ITEM_KINDS
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: nn.Module,
        args: GRPOConfig,
        *,
        method: Method,
        options: Any,
        train_dataset: Dataset | None,
        settings: UpdateSettings = UpdateSettings(),
        ref_model: nn.Module | None = None,
        gradient_rule: ChosenRule | None = None,
        **inherited: Any,
    ) -> None:
        refuse_unused(args, REFUSED_FOR_ONLINE, inherited, *TRLS_OWN)
        self.method, self.method_options, self.settings = method, options, settings
        self.needs = method.needs(options)
        refuse_needs(self.needs)
        self.prepare_bridge(gradient_rule)
        checked_aux_loss(model, args.router_aux_loss_coef)
        has_adapter = isinstance(model, PeftModel) or inherited.get("peft_config") is not None
        # TRL copies an adapter for the reference where its own beta is not zero, and loads no other model then.
        args.beta = float("reference" in self.needs and has_adapter)
        start = trained_values(model)
        super().__init__(model, args=args, train_dataset=train_dataset, **inherited)
        self.refuse_settings(inherited.get("rollout_func"))
        self.hold_masters(start)
        self.beta = args.beta = float("reference" in self.needs)
        self._prepare_models(ref_model, has_adapter)
        self.watch = CompletionWatch(self, settings.success_threshold)
        self.rollouts = Rollouts(self)
        self.persistent.append(self.rollouts)
        self._passes: list[PolicyOutput] | None = None
        self.lengths = self._look_at_prompts()
        self.forward_pass = self._choose_forward_pass()
        for run in self.policy_runs():
            self.compare_policy(run)
        self.compare_once_sharded()

    # --- completions -----------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        """The rewards of all processes, of which notice is taken."""
        rewards: Tensor = super()._calculate_rewards(*inputs)
        self.watch.rewarded(rewards, inputs[-1])
        return rewards

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        """TRL's order of prompts, which in every pass is the same in a run that was resumed."""
        sampler = super()._get_train_sampler(dataset)
        return PassSampler(sampler, lambda: int(self.state.epoch or 0))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL returns, with the prompt that each completion belongs to and what statistics ask for."""
        self._passes = []
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            passes = self._passes
        finally:
            self._passes = None
        generations = self.num_generations if self.model.training else self.num_generations_eval
        first, count = self.accelerator.process_index * len(inputs), len(inputs)
        rows = torch.arange(first, first + count, device=output["completion_ids"].device)
        output["group_index"] = rows // generations
        self.watch.drawn(output, generations)
        # TRL runs the old policy before the reference, and not at all where it is the policy that is trained.
        if "old_per_token_logps" in output:
            output |= self._statistics(passes[0])
        return output

    def _statistics(self, old: PolicyOutput) -> dict[str, Tensor]:
        """What the method needs of the old policy beside log-probs, by the names of a PolicyBatch."""
        found = {}
        if "old_entropies" in self.needs and old.entropies is not None:
            found["old_entropies"] = old.entropies.detach()
        if "old_sum_sq_probs" in self.needs and old.log_sum_sq_probs is not None:
            found["old_sum_sq_probs"] = old.log_sum_sq_probs.exp()
        return found

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs of completion tokens; while completions are scored, what comes with them is kept as well."""
        if any(given is not None for given in images.values()):
            raise DataError("prompts with images", ["online runs train on text alone. Remove the column of images"])
        with self.accelerator.autocast():
            output = self.forward_pass(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                router_logits=compute_aux_loss,
            )
        if self._passes is not None:
            self._passes.append(output)
        return output.token_logps, output.entropies if compute_entropy else None, output.aux_loss

    # --- objective -------------------------------------------------------------------------------------------------

    def batch_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | None, *, record: bool
    ) -> Tensor:
        """As ever; what the objective remembers counts where the batch does, and is the same however often it is run.

        A gradient rule has a micro-batch evaluated twice, and an evaluation trains nothing.
        """
        kept = self.rollouts.memory
        self.rollouts.memory = dict(self.once_a_batch("memory", lambda: kept))
        loss = super().batch_loss(model, inputs, num_items_in_batch, record=record)
        if not (record and self.model.training):
            self.rollouts.memory = kept
        return loss

    def evaluate_objective(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[PolicyOutput, LossOutput]:
        """One forward pass over prompts with their completions, and the method's terms."""
        with self.accelerator.autocast():
            output = self.forward_pass(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                inputs["completion_ids"].shape[1],
                router_logits=self.aux_loss_enabled,
            )
        return output, self.method.objective(self._policy_batch(inputs, output), self.method_options)

    def _policy_batch(self, inputs: Mapping[str, Any], output: PolicyOutput) -> PolicyBatch:
        mask, old = trained_tokens(inputs), inputs
        if "old_per_token_logps" not in inputs:
            old = self._statistics(output)  # strictly on-policy: the old policy is this one
        return PolicyBatch(
            policy_token_logps=output.token_logps.masked_fill(~mask, 0.0),
            completion_mask=mask,
            advantages=inputs["advantages"],
            old_token_logps=inputs.get("old_per_token_logps"),
            ref_token_logps=inputs.get("ref_per_token_logps"),
            group_index=inputs["group_index"],
            max_completion_length=self.args.max_completion_length,
            entropies=output.entropies,
            old_entropies=old.get("old_entropies"),
            old_sum_sq_probs=old.get("old_sum_sq_probs"),
            correction=self._correction(inputs, output, mask),
            kept=self._kept_tokens(output, mask),
            gather=self._over_ranks,
            memory=self.rollouts.memory,
        )

    def _kept_tokens(self, output: PolicyOutput, mask: Tensor) -> Tensor | None:
        """The tokens of the largest entropy, whose surrogate alone counts; None is all."""
        if self.settings.top_entropy_quantile == 1.0:
            return None
        kept: Tensor = self.get_high_entropy_mask(
            output.entropies.detach(), mask, 1.0 - self.settings.top_entropy_quantile
        )
        return kept

    def _correction(self, inputs: Mapping[str, Any], output: PolicyOutput, mask: Tensor) -> Tensor | None:
        """What the surrogate is multiplied by: the ratio to vLLM's log-probs, 0 where a completion is too far off."""
        correction: Tensor | None = inputs.get("importance_sampling_ratio")
        if self.settings.off_policy_mask_threshold is None:
            return correction
        old = inputs.get("old_per_token_logps", output.token_logps.detach())
        kept: Tensor = self.get_off_policy_mask(
            advantages=inputs["advantages"].view(len(mask), -1),
            per_token_logps=output.token_logps,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
            mask=mask,
            off_policy_threshold=self.settings.off_policy_mask_threshold,
        )
        kept = kept.to(output.token_logps.dtype)
        return kept if correction is None else correction * kept

    def _over_ranks(self, values: Tensor) -> Tensor:
        """The values of all processes behind one another; a collective."""
        if self.accelerator.num_processes == 1:
            return values
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=values.device))
        padded = values.new_zeros(int(sizes.max()))
        padded[: len(values)] = values.detach()
        parts = self.accelerator.gather(padded).view(len(sizes), -1)
        return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])

    # --- counts ----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The prompts of one step. What will be counted is not drawn yet: :meth:`step_counts` counts it."""
        batches, _ = self.next_batches(epoch_iterator, num_batches, device)
        return batches, torch.tensor(len(batches), device=device)

    def item_counts(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Local number of completions and of their tokens, and this one micro-batch."""
        mask = trained_tokens(inputs)
        one = torch.ones((), dtype=torch.long, device=mask.device)
        return {"completion": one * self.num_rows(inputs), "completion_token": mask.sum(), "micro_batch": one}

    def step_counts(
        self, inputs: Mapping[str, Any], num_items_in_batch: Tensor | None
    ) -> tuple[Mapping[str, Tensor], int]:
        """Completions and micro-batches of the step over all ranks, and its share of the tokens that were drawn.

        TRL takes the tokens of a step for an equal share of those of all completions of a generation.
        """
        if num_items_in_batch is None:
            return self.item_counts(inputs), 1
        ranks, steps = self.accelerator.num_processes, self.current_gradient_accumulation_steps
        tokens = inputs["num_items_in_batch"].clamp(min=1)
        one = torch.ones_like(tokens)
        return {
            "completion": one * self.args.per_device_train_batch_size * steps * ranks,
            "completion_token": tokens * steps / self.args.steps_per_generation,
            "micro_batch": one * steps * ranks,
        }, ranks

    def batch_share(self, inputs: Mapping[str, Any], num_items_in_batch: Tensor | None) -> float:
        """What part of the step's mean loss a micro-batch is, by its completions."""
        if num_items_in_batch is None:
            return 1.0
        rows = self.args.per_device_train_batch_size * self.current_gradient_accumulation_steps
        return self.num_rows(inputs) / rows

    def num_rows(self, inputs: Mapping[str, Any]) -> int:
        """Completions of a batch."""
        return len(inputs["completion_mask"])

    def counted_rows(self, rows: int) -> int:
        """How many of the rows of all processes, which have ``rows`` each, come before those accelerate repeats.

        accelerate counts a held-out prompt as one row, of which ``num_generations_eval`` completions are drawn.
        """
        state, ranks = self.accelerator.gradient_state, self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader:
            return rows * ranks
        left = len(state.active_dataloader.dataset) * self.num_generations_eval % (rows * ranks)
        return left or rows * ranks

    def _without_repeated_rows(self, inputs: Mapping[str, Any], dataset: Any = None) -> dict[str, Any]:
        """Mask the completions of prompts that accelerate repeats in the last batch of an evaluation."""
        rows = self.num_rows(inputs)
        return self.keep_rows(inputs, max(self.counted_rows(rows) - self.accelerator.process_index * rows, 0))

    def keep_rows(self, inputs: Mapping[str, Any], kept: int) -> dict[str, Any]:
        """Mask all completions but the first ``kept``."""
        mask = inputs["completion_mask"]
        is_kept = torch.arange(len(mask), device=mask.device) < kept
        return {**inputs, "completion_mask": mask * is_kept[:, None]}

    # --- metrics ---------------------------------------------------------------------------------------------------

    def record_batch(self, inputs: Mapping[str, Any], output: PolicyOutput, result: LossOutput) -> None:
        """How the ratios of an update are spread. What is drawn is seen when it is."""
        if self.model.training:
            self.watch.update(inputs, output.token_logps, output.entropies, trained_tokens(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As there; of an evaluation, over its completions where TRL takes means over batches."""
        if self.mode == "eval":
            self._metrics["eval"].update({name: [value] for name, value in self.watch.evaluation().items()})
        super().log(logs, start_time)

    def _generators(self) -> list[int]:
        """An evaluation draws completions where the model is."""
        device = self.accelerator.device
        return [] if device.type != "cuda" else [torch.cuda.current_device() if device.index is None else device.index]


TRLS_OWN = ("reward_funcs", "reward_processing_classes", "tools", "rollout_func", "environment_factory")
"""What the bridge hands on to TRL beside what every bridge does."""


class PassSampler(RepeatSampler):
    """TRL's sampler, for which a pass over the prompts is what its number says, whatever was drawn before.

    TRL's draws the order of every pass from where the last one left its generator, so that a run resumed in its second
    pass would see the first one again.

    Args:
        sampler: TRL's.
        passes: Number of passes that are finished.
    """

    def __init__(self, sampler: RepeatSampler, passes: Callable[[], int]) -> None:
        self.__dict__.update(vars(sampler))
        self.passes = passes

    def __iter__(self) -> Iterator[int]:
        """Positions of prompts, in the order of this pass."""
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.passes()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def trained_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Mask [B, T] of the tokens that the model wrote: completions without what tools answered."""
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask
