"""``tokens_per_batch: auto`` on an accelerator: as many tokens as memory holds, by the estimate."""

from __future__ import annotations

import time
from typing import Any

from alignkit.models.choices import Choice
from alignkit.runs.checkpointing import least_free
from alignkit.runs.memory import GIB, Plan

KEY = "tokens_per_batch"
MOST_TIMES = 16
"""A micro-batch is made so many times as large at most: beyond that a pass is no faster, whatever memory is left."""
MARGIN = 1.25
"""An estimate has to be this factor below what there is, since no such micro-batch is run before training."""


def largest_budget(plan: Plan, free: int, least: int, *, checkpointing: bool) -> tuple[int, int]:
    """Tokens of a micro-batch that fits, doubled from ``least`` as often as can be; and the bytes of its step.

    Args:
        plan: The run.
        free: Bytes there are.
        least: Tokens that are taken whether they fit or not.
        checkpointing: Whether activations are computed again.
    """

    def bytes_of(tokens: int) -> int:
        # Gradients of earlier micro-batches of the step are there.
        changes = {KEY: tokens, "gradient_accumulation_steps": max(plan.config.gradient_accumulation_steps, 2)}
        return plan.estimate(checkpointing=checkpointing, **changes).peak

    tokens, peak = least, bytes_of(least)
    while tokens < MOST_TIMES * least and (larger := bytes_of(2 * tokens)) * MARGIN <= free:
        tokens, peak = 2 * tokens, larger
    return tokens, peak


def filled(trainer: Any, plan: Plan | None) -> None:
    """Fill the micro-batches of a new run up to what memory holds, if that is asked for; a collective.

    Args:
        trainer: Its budget is what row-counted micro-batches could have.
        plan: What ``checkpointing.chosen`` returned: None on a CPU, of a run that is resumed, and where
            ``gradient_checkpointing`` is pinned, so that nothing was estimated.
    """
    if plan is None or vars(plan.config).get(KEY) != "auto":
        return
    start, free = time.monotonic(), least_free(trainer.accelerator.device)
    if free is None:
        return
    settled = plan.after(trainer.choices | {"layout": trainer.layout.as_choice()})
    on = trainer.args.gradient_checkpointing
    tokens, peak = largest_budget(settled, free, trainer.tokens_per_batch, checkpointing=on)
    reason = f"a step of micro-batches so full takes {peak / GIB:.1f} of {free / GIB:.1f} GiB by the estimate"
    trainer.fill_by_tokens("auto", Choice(KEY, tokens, reason, time.monotonic() - start))
