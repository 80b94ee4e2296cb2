"""In which optimizer steps a gradient rule acts, and a warning where that is in none."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.parts.rule import DisplacedOptions

IN_WARMUP = (
    "warning: gradient_rule: {name} never acts in this run. It rests while the learning rate warms up, {warmup} steps, "
    "and the run has {steps}. Write rule_in_warmup: true, or warmup_steps below {steps}."
)
TOO_RARE = (
    "warning: gradient_rule: {name} never acts in this run. With every_k: {every_k} and {warmup} steps of warm-up, in "
    "which it rests, the first step it acts in is number {first}, and the run has {steps}. Write every_k: 1."
)


def acts(options: Any, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a rule that edits gradients does so in the optimizer step being taken.

    Args:
        options: The rule's options; a rule without displacement has no schedule and always acts.
        args: Hold the warm-up of the learning rate.
        state: Of the trainer.
    """
    if not isinstance(options, DisplacedOptions):
        return True
    step: int = state.global_step
    return step >= _rest(options, args, state.max_steps) and step % options.every_k == 0


class ScheduleCheck(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Says when training begins that the rule acts in none of its steps.

    Args:
        name: Of the rule.
    """

    def __init__(self, name: str, options: Any) -> None:
        self.name, self.options = name, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Print the warning, once the number of steps is known."""
        if isinstance(self.options, DisplacedOptions) and PartialState().is_main_process:
            warmup, every_k = _rest(self.options, args, state.max_steps), self.options.every_k
            first, steps = -(-warmup // every_k) * every_k, state.max_steps
            if first >= steps:
                text = IN_WARMUP if warmup >= steps else TOO_RARE
                tqdm.write(text.format(name=self.name, warmup=warmup, every_k=every_k, first=first + 1, steps=steps))


def _rest(options: DisplacedOptions, args: TrainingArguments, max_steps: int) -> int:
    """Steps of warm-up in which the rule rests."""
    warmup: int = args.get_warmup_steps(max_steps)
    return 0 if options.rule_in_warmup else warmup
