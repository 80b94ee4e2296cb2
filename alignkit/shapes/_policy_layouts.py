"""Which models an online run runs, made ready and compared with themselves first, and in which layout they run.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``GRPOTrainer.ref_model``, None where the reference is the policy's adapter ``ref`` or its base alone
- trl ``use_adapter(model, adapter_name)``
- those in ``_policy_forward.py``
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from trl import GRPOConfig
from trl.trainer.utils import use_adapter

from alignkit.data.lengths import SAMPLED_ROWS, RowLengths
from alignkit.data.prompts import prompt_ids_of
from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun, length_dependence, refuse_other_scores
from alignkit.models._forward import base_model, compute_precision, use_packed_attention
from alignkit.models._layouts import LayoutChoice, confirmed
from alignkit.models.modes import switch_off_dropout
from alignkit.references._reference import placed
from alignkit.shapes._policy_forward import PolicyForward, choose_policy_layout, prepare_policy


class PolicyLayouts:
    """Of an online trainer: its models, and the layout of its passes.

    Attributes:
        lengths: Of rows that stand in for those that will be drawn; see :meth:`_look_at_prompts`.
        forward_pass: What runs completions.
    """

    model: Any
    ref_model: Any
    args: GRPOConfig
    accelerator: Any
    settings: Any
    needs: frozenset[str]
    beta: float
    num_generations: int
    train_dataset: Any
    processing_class: Any
    aux_loss_enabled: bool
    lengths: RowLengths
    forward_pass: PolicyForward

    def models_of_run(self) -> list[nn.Module]:
        """Those of the policy and of a reference of its own."""
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        return [base_model(self.accelerator.unwrap_model(model, keep_torch_compile=False)) for model in models]

    def _prepare_models(self, ref_model: nn.Module | None, has_adapter: bool) -> None:
        """Take the reference in, and make the policy ready for the passes of this bridge."""
        args = self.args
        if self.beta and not has_adapter:
            if ref_model is None:
                raise ModelError("the method compares with a reference, and there is none: pass ref_model")
            self.ref_model = placed(ref_model, self, args.temperature)
        if args.disable_dropout:
            switch_off_dropout(self.model)
        cast = args.cast_lm_head_to_fp32
        prepare_policy(self.model, self.needs, temperature=args.temperature, cast_lm_head_to_fp32=cast)

    def _look_at_prompts(self) -> RowLengths:
        """Lengths of the first prompts with completions as long as there can be, which stand in for real ones.

        Raises:
            ModelError: The model's position encoding makes log-probs depend on the rows beside.
        """
        longest = self.args.max_completion_length
        ids = prompt_ids_of(self.train_dataset, self.processing_class, SAMPLED_ROWS)
        ids = sorted(ids, key=len)
        prompts = [list(ids[0]), list(ids[-1])]
        # Tokens of the prompt over and over: they need only be tokens that the model knows. Each completion begins
        # elsewhere, for equal ones are scored once.
        lengths = [longest, *[max(longest // 2, 1)] * (self._most_together() - 1)]
        rows = [
            {
                "prompt_ids": prompt,
                "completion_ids": [(prompt * ((n + i) // len(prompt) + 1))[i : i + n] for i, n in enumerate(lengths)],
                "scores": [0.0] * len(lengths),
            }
            for prompt in prompts
        ]
        bound = None if self.settings.max_prompt_length is None else self.settings.max_prompt_length + longest
        found = RowLengths.of(iter(rows), max_length=bound)
        if problem := length_dependence(self.model, found, together=True):
            raise ModelError(f"the policy, {problem}.")
        return found

    def _most_together(self) -> int:
        """Completions of one prompt that a pass holds at most."""
        batches = (self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        return min(self.num_generations, max(batches))

    def _choose_forward_pass(self) -> PolicyForward:
        most, others = self._most_together(), {}
        if self.ref_model is not None:
            others["the reference"] = self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
        prompt = self.settings.max_prompt_length or 0
        choice = choose_policy_layout(
            self.settings.layout,
            self.model,
            others=others,
            longest=max(int(self.lengths.longest.max()), prompt + self.args.max_completion_length),
            aux_loss=self.aux_loss_enabled,
            keeps_attention=self.args.use_transformers_continuous_batching,
        )
        return PolicyForward(choice, most)

    @property
    def layout(self) -> LayoutChoice:
        """The layout in force, and why."""
        return self.forward_pass.layout

    def compare_policy(self, run: ScoringRun) -> None:
        """Compare the policy with itself before it is trained, and all that is run in packed rows with padded ones."""
        refuse_other_scores(run, self.lengths)
        runs = [run, *self._reference_runs(run)]
        choice = confirmed(self.layout, runs, self.lengths)
        self.forward_pass = replace(self.forward_pass, layout=choice)
        if choice.layout == "packed":
            for each in runs:
                use_packed_attention(each.base)

    def _reference_runs(self, policy: ScoringRun) -> list[ScoringRun]:
        """The reference as it is run, where there is one."""
        if not self.beta:
            return []
        if self.ref_model is None:
            return [replace(policy, name="the reference", context=self._without_adapter)]
        return [replace(policy, name="the reference", model=self.ref_model)]

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """The reference that TRL finds in the policy: a frozen copy of its adapter, or none at all."""
        model = self.accelerator.unwrap_model(self.model)
        with ExitStack() as stack:
            stack.enter_context(use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None))
            stack.enter_context(self.accelerator.autocast())
            yield

    def _policy_run(self, model: nn.Module) -> ScoringRun:
        precision = compute_precision(self.model, self.accelerator.mixed_precision)
        return ScoringRun("the policy", model, precision, self.accelerator.autocast, self.args.temperature)
