"""Where the log-probs of a run's reference come from, where the user leaves that open.

Scored ahead and kept on disk, every row is scored once; while training, it is scored in every epoch and every
evaluation. Whatever is taken, the log-probs are the same but for rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from alignkit.environment import launched_with_fsdp
from alignkit.models._forward import base_model, compute_precision
from alignkit.models.choices import Choice, pinned, run_seconds, step_flops
from alignkit.parametrizations._policy import load_model
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import load_parametrization
from alignkit.references import _cache
from alignkit.references.models import load_named_reference, load_negative_reference, other_models

KEY, AHEAD = "reference", "precomputed"
LEAST_GAIN = 1.25
"""How many times as many rows have to be scored while training as ahead, for a cache to pay."""
KEY_BYTES_A_SECOND, FREE_SECONDS = 1e9, 1.0
"""How fast weights are hashed for the key of a cache, and what that may take without a second thought."""


@dataclass(frozen=True)
class RunData:
    """The rows of a run, and how it goes over them.

    Attributes:
        train: Training rows; a stream has no length.
        held_out: The sets of held-out rows.
        epochs: Passes over the training rows.
        evaluations: Passes over the held-out ones.
        exchanges_rows: Whether training rows are exchanged for others while training.
    """

    train: Any
    held_out: tuple[Any, ...]
    epochs: float
    evaluations: int
    exchanges_rows: bool

    @classmethod
    def of(cls, args: Any, train: Any, evaluation: Any, *, exchanges_rows: bool) -> RunData:
        """What the arguments of a trainer make of rows.

        Args:
            args: TRL's arguments.
            train: Training rows.
            evaluation: Held-out rows, or several sets of them by name, or None.
            exchanges_rows: See above.
        """
        held_out = tuple(evaluation.values()) if isinstance(evaluation, dict) else (evaluation,)
        held_out = tuple(rows for rows in held_out if rows is not None)
        if not isinstance(train, Dataset):
            return cls(train, held_out, 1.0, 0, exchanges_rows)
        rows_a_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        epochs = args.max_steps * rows_a_step / len(train) if args.max_steps > 0 else args.num_train_epochs
        steps = math.ceil(epochs * len(train) / rows_a_step)
        every = args.eval_steps or args.logging_steps
        every = max(round(every * steps), 1) if every < 1 else every
        between = {"no": 0, "epoch": int(epochs), "steps": int(steps // every)}[args.eval_strategy.value]
        # A run also evaluates before its first step and after its last one.
        return cls(train, held_out, epochs, between + 2, exchanges_rows)

    @property
    def while_training(self) -> float:
        """Rows to score if each is scored when its turn comes."""
        return self.epochs * len(self.train) + self.evaluations * sum(map(len, self.held_out))

    @property
    def ahead(self) -> int:
        """Rows to score if each is scored once."""
        return len(self.train) + sum(map(len, self.held_out))

    def seconds(self, scored: float, model: nn.Module, device: torch.device) -> float:
        """What it takes at least to score so many rows, on a device that does as well as one can."""
        tokens = _cache.count_tokens(self.train) / len(self.train) * scored
        # Without the backward pass, which takes as long.
        base: Any = base_model(model)
        return run_seconds(1, step_flops(base.config.get_text_config(), tokens) / 2, device)


@dataclass(frozen=True)
class LoadedReference:
    """Which reference a run takes, with what had to be loaded for it.

    Attributes:
        choice: None where the method needs no reference.
        model: A model of its own.
        negative: The model that scores the last candidate of each row, where the method has one of its own.
    """

    choice: Choice | None
    model: nn.Module | None
    negative: nn.Module | None

    @property
    def is_ahead(self) -> bool:
        """Whether all rows are scored before training begins."""
        return self.choice is not None and self.choice.value == AHEAD


def load_chosen_reference(
    config: Any, args: Any, policy: nn.Module, data: RunData, before: Choice | None
) -> LoadedReference:
    """Choose where reference log-probs come from and load what that takes: no second model where none is needed.

    A collective.

    Args:
        config: A :class:`~alignkit.shapes.candidates.PreferenceConfig`.
        args: TRL's arguments.
        policy: As it was loaded.
        data: The rows.
        before: What a run that is resumed took when it began; None of a new one, and of one that never said.

    Raises:
        ModelError: A model cannot be loaded.
    """
    negative, named = load_negative_reference(config), load_named_reference(config)
    others = [model for model in (named, negative) if model is not None]
    choice, own = choose_reference(config, args, policy, data, before=before, others=others), named
    if own is None and choice is not None and choice.value == "copy":
        own = load_model(config, config.model, config.model_revision)
    return LoadedReference(choice, own, negative)


def choose_reference(
    config: Any, args: Any, policy: nn.Module, data: RunData, *, before: Choice | None, others: Sequence[nn.Module]
) -> Choice | None:
    """Where reference log-probs come from, and why; None where the method compares with nothing. A collective.

    Args:
        config, args, policy, data, before: See :func:`load_chosen_reference`.
        others: The models that the config names beside it, loaded: the reference's own, and that of the negatives.
    """
    if "reference" not in load_method(config.method).needs(config.method_options):
        return None
    if config.reference != "auto":
        return pinned(KEY, config.reference)
    else_taken = taken_while_training(config)
    if obstacle := obstacle_to_a_cache(config, data):
        return Choice(KEY, else_taken, obstacle)
    if config.resume:
        taken = AHEAD if before is not None and before.value == AHEAD else else_taken
        return Choice(KEY, taken, "as this run began")
    begin, key = time.perf_counter(), _key_seconds(policy, else_taken)
    if (gain := data.while_training / data.ahead) >= LEAST_GAIN:
        saved = data.seconds(data.while_training - data.ahead, policy, args.device)
        if key <= max(saved, FREE_SECONDS):
            return Choice(KEY, AHEAD, _why(data, gain))
        why = f"to tell the weights for a cache takes {key:.0f} s, and it would save about {saved:.0f} s"
    else:
        why = f"every row is scored {'once' if gain == 1 else f'{gain:.2g} times'}, too seldom for a cache to pay"
    is_worth_a_look = key <= max(data.seconds(data.while_training, policy, args.device), FREE_SECONDS)
    if is_worth_a_look and _is_cached(config, args, policy, data, others):
        return Choice(KEY, AHEAD, "an earlier run has scored these rows", time.perf_counter() - begin)
    return Choice(KEY, else_taken, why, time.perf_counter() - begin)


def taken_while_training(config: Any) -> str:
    """What scores rows when their turn comes: a second model, a copy of the adapter, or the policy without it."""
    if config.reference_model is not None or not load_parametrization(config.parametrization).has_adapter:
        return "copy"
    moves = load_method(config.method).anchor(config.method_options) is not None
    return "adapter_copy" if moves or config.adapter is not None else "adapter_disabled"


def in_words(config: Any, choice: Choice | None) -> str:
    """What log-ratios are taken against.

    Args:
        config: A :class:`~alignkit.shapes.candidates.PreferenceConfig`.
        choice: What was taken; None where nothing is compared with.
    """
    if choice is None:
        return "none"
    anchor = load_method(config.method).anchor(config.method_options)
    if anchor is not None:
        return f"moves with the policy ({anchor.kind})"
    model = config.reference_model or config.model
    return {
        AHEAD: f"log-probs of {model}, precomputed",
        "copy": f"{model}, a second model in memory",
        "adapter_copy": "a frozen copy of the adapter",
        "adapter_disabled": "the policy with its adapter off",
    }[choice.value]


def obstacle_to_a_cache(config: Any, data: RunData) -> str | None:
    """Why rows cannot be scored before training, or None."""
    if load_method(config.method).anchor(config.method_options) is not None:
        return "it follows the policy"
    if not all(isinstance(rows, Dataset) for rows in (data.train, *data.held_out)):
        return "rows are streamed, and cannot be scored ahead"
    if data.exchanges_rows:
        return "rows are exchanged while training, and cannot be scored ahead"
    if launched_with_fsdp():
        return "FSDP shards the weights that a cache would be keyed by"
    return None


def _why(data: RunData, gain: float) -> str:
    if not data.held_out:
        return f"{data.epochs:.3g} epochs would score every row {gain:.3g} times"
    epochs = f"{data.epochs:.3g} epoch{'s' * (data.epochs != 1)}"
    return f"{epochs} and {data.evaluations} evaluations would score every row {gain:.3g} times on average"


def _key_seconds(policy: nn.Module, else_taken: str) -> float:
    """What telling the weights of the reference takes; TRL hashes those of a policy without adapter once more."""
    times = 2 if else_taken == "copy" else 1
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    return times * weights / KEY_BYTES_A_SECOND


def _is_cached(config: Any, args: Any, policy: nn.Module, data: RunData, others: Sequence[nn.Module]) -> bool:
    """Whether the log-probs of all rows are on disk, on every machine. What is found is still proven when it is read.

    Weights are only hashed where there is a file of the right size for every set of rows.
    """
    directory = _cache.default_cache_dir() if config.reference_cache is None else Path(config.reference_cache)
    cache, sets = _cache.ReferenceCache(directory), (data.train, *data.held_out)
    if not all(gather_object([all(cache.holds_as_many(_cache.count_tokens(rows)) for rows in sets)])):
        return False
    starts_as_policy = "reference_model" not in other_models(config)
    adapter = "default" if config.adapter is not None else None
    weights = _cache.model_fingerprint(policy, adapter) if starts_as_policy else ""
    weights += "".join(_cache.model_fingerprint(model, None) for model in others)
    precision = compute_precision(policy, "bf16" if args.bf16 else "fp16" if args.fp16 else "no")
    paths = [cache.path(weights, precision, _cache.token_ids_fingerprint(rows)) for rows in sets]
    return all(gather_object([all(path.is_file() for path in paths)]))
