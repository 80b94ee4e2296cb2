"""The tiny trainers of the bridge tests with a gradient rule, and what the rule saw in each micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from alignkit.gradients._family import Evaluation
from alignkit.gradients._hook import ChosenRule
from alignkit.parts.rule import DisplacedOptions, load_rule, rule_names
from tests.trainers import make_trainer, model_path, rows, tokenizer

__all__ = ["make_trainer", "model_path", "rows", "tokenizer"]

RULES = rule_names()
EDITING = [name for name in RULES if load_rule(name).edit is not None]
DISPLACING = [name for name in RULES if issubclass(load_rule(name).options, DisplacedOptions)]


def lora(**changes: Any) -> LoraConfig:
    """Adapters on the attention of the tiny model."""
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**(defaults | changes))


def chosen(name: str, **options: Any) -> ChosenRule:
    """A rule with options; on every trainable tensor unless said otherwise."""
    rule = load_rule(name)
    if name in EDITING:
        options.setdefault("rule_targets", "all")
    return ChosenRule(rule, rule.options(**options))


@dataclass
class Seen:
    """What a rule was given and what it returned, a micro-batch at a time."""

    evaluations: list[list[Evaluation]] = field(default_factory=list)
    displacements: list[list[Tensor]] = field(default_factory=list)
    edited: list[list[Tensor]] = field(default_factory=list)


@pytest.fixture
def watched() -> Callable[..., tuple[ChosenRule, Seen]]:
    """A rule that remembers its micro-batches."""
    from dataclasses import replace

    def watch(name: str, **options: Any) -> tuple[ChosenRule, Seen]:
        original, seen = chosen(name, **options), Seen()

        def edit(evaluations: Any, options: Any) -> list[Tensor]:
            result = original.rule.edit(evaluations, options)
            seen.evaluations.append([clone(evaluation) for evaluation in evaluations])
            seen.edited.append([x.clone() for x in result])
            return result

        def displacement(evaluation: Any, options: Any) -> list[Tensor]:
            result = original.rule.displacement(evaluation, options)
            seen.displacements.append([x.clone() for x in result])
            return result

        watched = {"edit": edit} | ({} if original.rule.displacement is None else {"displacement": displacement})
        return ChosenRule(replace(original.rule, **watched), original.options), seen

    def clone(evaluation: Evaluation) -> Evaluation:
        return replace(
            evaluation,
            weights=[x.clone() for x in evaluation.weights],
            gradient=[x.clone() for x in evaluation.gradient],
        )

    return watch


def weights(trainer: Any) -> Tensor:
    """All trainable weights in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
