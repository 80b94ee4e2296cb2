"""A progress bar with one short line a log, in place of a dictionary of every metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

COLUMNS = {
    "reward": "reward {:.4f}",
    "completions/mean_length": "{:.0f} tokens",
    "frac_reward_zero_std": "no signal {:.0%}",
    "loss": "loss {:.4f}",
    "rewards/margins": "margin {:+.3f}",
    "rewards/accuracies": "accuracy {:.0%}",
    "logratio/chosen": "chosen {:+.2f}",
    "logratio/rejected": "rejected {:+.2f} nats",
    "dispersion": "probe {:+.3f} nats/token",
    "grad_norm": "grad {:.2f}",
}
"""What a line shows of a log; everything is in ``metrics.jsonl``."""


class ShortProgress(ProgressCallback):
    """transformers' progress bars, with a line of :data:`COLUMNS` a log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            if line := short_line(state.global_step, logs):
                self.training_bar.write(line)


def short_line(step: int, logs: Mapping[str, Any]) -> str:
    """One log as ``step 10  loss 0.6931  ...``; evaluation logs are marked as such, other summaries are empty."""
    prefix = "eval_" if "eval_loss" in logs else ""
    shown = [text.format(float(logs[prefix + key])) for key, text in COLUMNS.items() if prefix + key in logs]
    return "  ".join([f"{'eval' if prefix else 'step'} {step:>5}", *shown]) if shown else ""
