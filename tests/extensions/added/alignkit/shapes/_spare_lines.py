"""The bridge of lines: TRL's SFTTrainer with the objective of a method on a :class:`LineBatch`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from alignkit.losses.spare_lines import LineBatch
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from alignkit.data.supervised import prompts_of, to_supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.losses.types import LossOutput
from alignkit.models.precision import trained_values
from alignkit.parts.method import Method, load_method
from alignkit.shapes._bridge import ObjectiveBridge, ratio

IGNORE_INDEX = -100
METRICS: Mapping[str, str] = {"spare_length": "trained tokens of a row"}
"""What the bridge logs for every method, beside ``loss/<term>``."""


class LinesTrainer(ObjectiveBridge, SFTTrainer):
    """Trains on tokenised rows, as TRL does."""

    item_kinds = ("token",)

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        *,
        method: Method,
        options: Any,
        gradient_rule: Any = None,
        **inherited: Any,
    ) -> None:
        self.method, self.method_options = method, options
        self.prepare_bridge(gradient_rule)
        start = trained_values(model)
        super().__init__(model, args=args, **inherited)
        self.hold_masters(start)

    def evaluate_objective(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, LossOutput]:
        """One forward pass through TRL's fused head, and the method's terms."""
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        return output, self.method.objective(LineBatch(output.log_probs, output.label_mask), self.method_options)

    def item_counts(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local number of trained tokens."""
        return {"token": (inputs["labels"][..., 1:] != IGNORE_INDEX).sum()}

    def num_rows(self, inputs: Mapping[str, Tensor]) -> int:
        """Rows of a collated batch."""
        return len(inputs["labels"])

    def keep_rows(self, inputs: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        """Train nothing of a row behind the first ``kept``."""
        is_kept = torch.arange(self.num_rows(inputs), device=inputs["labels"].device) < kept
        return {**inputs, "labels": inputs["labels"].masked_fill(~is_kept[:, None], IGNORE_INDEX)}

    def record_batch(self, inputs: Mapping[str, Tensor], output: Any, result: LossOutput) -> None:
        """Record ``METRICS``."""
        self.record("spare_length", ratio(output.label_mask, torch.ones(self.num_rows(inputs))))


def training_arguments(config: Any, common: Mapping[str, Any]) -> SFTConfig:
    """TRL's arguments."""
    return SFTConfig(**common, max_length=None)


def other_models(config: Any) -> dict[str, str]:
    """There are none beside the policy."""
    return {}


def batches_an_epoch(args: SFTConfig, num_rows: int) -> int:
    """Micro-batches of each process in one pass over the rows."""
    return math.ceil(num_rows / (args.per_device_train_batch_size * args.world_size))


def converter(config: Any, tokenizer: Any) -> Callable[..., Any]:
    """What makes rows of tokens of rows of text."""
    trained = TrainedTokens(completion_only=False)
    return partial(to_supervised_rows, tokenizer=tokenizer, max_length=config.max_length, trained=trained)


def prompts(config: Any, tokenizer: Any, rows: Any, converted: Any) -> list[Any]:
    """Token ids of the first held-out prompts."""
    return prompts_of(rows, tokenizer, config.num_samples)


def build(
    config: Any,
    args: SFTConfig,
    policy: Any,
    tokenizer: Any,
    data: Any,
    *,
    exchanges_rows: bool,
    choices: dict[str, Any],
    **inherited: Any,
) -> LinesTrainer:
    """Put the trainer together."""
    method = load_method(config.method)
    data = {"train_dataset": data.train, "eval_dataset": data.evaluation, "processing_class": tokenizer}
    return LinesTrainer(policy, args, method=method, options=config.method_options, **data, **inherited)


def describe(config: Any, trainer: LinesTrainer) -> dict[str, Any]:
    """Nothing that is not recorded of every run."""
    return {}
