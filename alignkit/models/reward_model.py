"""Reward models: a decoder whose head gives numbers, read off at the last token of each sequence.

Used from Python, as the scorer of samples and as a reward of online training::

    rewards = alignkit.load_reward_model("runs/reward")
    rewards("2 + 2 =", [" 4", " 5"])  # one number an answer
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.data.lengths import RowLengths
from alignkit.data.rendering import RenderingError
from alignkit.data.reward_batch import padded, scored_position
from alignkit.data.step_rows import SEPARATORS, Steps, to_step_rows
from alignkit.data.tokenization import answered_ids
from alignkit.environment import ignore_notices
from alignkit.errors import DataError, ModelError
from alignkit.models._comparison import ScoringRun, agreed
from alignkit.models._forward import LOGP_TOLERANCE
from alignkit.models.files import AdapterFiles, find_model, is_reward_adapter, read_json
from alignkit.models.loading import (
    REWARD_HEAD,
    ModelSource,
    RewardHead,
    check_base,
    head_of_adapter,
    load_adapter,
    load_model,
    load_tokenizer,
)
from alignkit.models.wrapping import base_model
from alignkit.storage.manifest import RUN_FILE

OVERALL = "overall"
"""The dimension of pairs that say no more than which answer is better."""


@contextmanager
def head_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the head gives for every token [R, L, width] while the model is run inside.

    transformers computes the head at all positions and keeps one of each row.

    Args:
        model: The reward model, plain or PEFT.
    """
    found: list[Tensor] = []
    head = base_model(model).get_submodule(REWARD_HEAD)
    handle = head.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def check_head(model: nn.Module) -> None:
    """Refuse a model whose head is not where those of decoders are.

    Raises:
        ModelError: It is another one.
    """
    base = base_model(model)
    if REWARD_HEAD not in dict(base.named_children()):
        raise ModelError(
            f"{type(base).__name__} has no head called {REWARD_HEAD!r}, by which a reward is read off the last token. "
            "Give a decoder, such as Qwen/Qwen3-0.6B."
        )


def refuse_other_rewards(run: ScoringRun, lengths: RowLengths, pad_token_id: int) -> None:
    """Refuse a model whose rewards would not be its own; a collective.

    Args:
        run: The model, as it will be run.
        lengths: The rows it will be run on.
        pad_token_id: What pads them.

    Raises:
        ModelError: They are no numbers, depend on the rows beside, or are not read off where transformers does so.
    """
    with run.scoring():
        problem = _problem(run, lengths, pad_token_id)
    if problem := agreed(problem):
        raise ModelError(f"{run.label}: {problem}.")


def _problem(run: ScoringRun, lengths: RowLengths, pad_token_id: int) -> str | None:
    sequences = [
        [*row["prompt_ids"], *row["completion_ids"][0]] for row in (lengths.short_sequence, lengths.long_sequence)
    ]
    (alone,), _ = _rewards(run, sequences[:1], pad_token_id)
    beside, own = _rewards(run, sequences, pad_token_id)
    if bool(torch.cat([alone, *beside]).isnan().any()):
        return "its rewards are no numbers (NaN): its weights hold NaN or infinity, or overflow. Write dtype: float32"
    tolerance = LOGP_TOLERANCE[run.precision] * max(1.0, float(beside.abs().max()))
    if (difference := float((beside[0] - alone).abs().max())) > tolerance:
        return (
            f"the reward of a row beside a longer one differs by {difference:.2g} from that of the same row alone "
            f"(tolerance {tolerance:.2g}), so it depends on which rows are in its batch"
        )
    if (difference := float((beside - own).abs().max())) > tolerance:
        return (
            f"rewards read off the last token differ by {difference:.2g} from those the model itself gives (tolerance "
            f"{tolerance:.2g}): it reads them off elsewhere. Take a model of another architecture"
        )
    return None


def _rewards(run: ScoringRun, sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rewards [R, width] read off here, and those the model itself gives."""
    device = next(run.model.parameters()).device
    inputs = {name: value.to(device) for name, value in padded(sequences, pad_token_id).items()}
    with head_outputs(run.base) as outputs:
        own = run.model(**inputs, use_cache=False).logits
    positions = [scored_position(ids, pad_token_id) for ids in sequences]
    return outputs[0][range(len(sequences)), positions].float(), own.float()


# --- a reward model in use -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardModel:
    """A reward model, loaded; :func:`load_reward_model` makes one.

    Called with a prompt and some completions, as they are written, it gives each completion a number.

    Attributes:
        model: The model, in evaluation mode on its device.
        tokenizer: Its tokenizer, with the chat template it was trained with.
        batch_size: Sequences a forward pass.
        max_length: Tokens of prompt + completion that are read; what is longer is cut at its end, as in training.
        dimensions: What the first numbers of a head of several are, whose mean is the reward; empty where it gives one.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 8
    max_length: int | None = None
    dimensions: tuple[str, ...] = ()

    def __call__(self, prompt: Any, completions: Sequence[Any]) -> list[float]:
        """The rewards of some completions of a prompt: texts, or messages."""
        (found,) = self.score([(prompt, completions)])
        return found

    def score(self, rows: Sequence[tuple[Any, Sequence[Any]]]) -> list[list[float]]:
        """The rewards of the completions of every row.

        Args:
            rows: Each a prompt and its completions, texts or messages.

        Raises:
            DataError: The chat template cannot render one.
        """
        sequences: list[list[int]] = []
        for number, (prompt, completions) in enumerate(rows):
            try:
                sequences += answered_ids(prompt, completions, self.tokenizer)
            except RenderingError as error:
                told = f"row {number}: {error.problem.kind} ({error.problem.shown})"
                raise DataError("the rows to be given rewards", [told]) from error
        rewards = iter(self.score_ids(sequences))
        return [[next(rewards) for _ in completions] for _, completions in rows]

    def score_steps(
        self, rows: Sequence[tuple[Any, Sequence[str]]], separator: str = SEPARATORS["newline"]
    ) -> list[list[float]]:
        """The rewards of the steps of every solution, of a model of method ``process_reward``.

        Its sigmoid is the probability that the step is right. The end of a whole answer is no place it was trained at.

        Args:
            rows: Each a prompt, text or messages, and the steps of one solution.
            separator: What stands behind each step, as in training.
        """
        given = [{"prompt": p, "completions": list(steps), "labels": [0] * len(steps)} for p, steps in rows]
        tokens, _ = to_step_rows(
            Dataset.from_list(given), self.tokenizer, max_length=None, steps=Steps(separator), num_proc=1
        )
        ends = [[t for t, label in enumerate(row["labels"]) if label >= 0] for row in tokens]
        prefixes = [row["input_ids"][: t + 1] for row, own in zip(tokens, ends, strict=True) for t in own]
        rewards = iter(self.score_ids(prefixes))
        return [[next(rewards) for _ in own] for own in ends]

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The rewards of sequences of token ids, the longest first in a batch of their like.

        Args:
            sequences: Prompt and completion behind one another.
        """
        cut = [list(ids[: self.max_length]) for ids in sequences]
        order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))
        device, found = next(self.model.parameters()).device, [0.0] * len(cut)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            inputs = {
                name: value.to(device) for name, value in padded([cut[i] for i in batch], self.pad_token_id).items()
            }
            numbers = self.model(**inputs, use_cache=False).logits[:, : len(self.dimensions) or 1]
            rewards = numbers.float().mean(1)
            for i, reward in zip(batch, rewards.tolist(), strict=True):
                found[i] = reward
        return found

    @property
    def pad_token_id(self) -> int:
        """The token that pads a batch, and that no reward is read off."""
        pad: int = self.tokenizer.pad_token_id
        return pad


def load_reward_model(
    model: str,
    *,
    base: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: str = "auto",
) -> RewardModel:
    """Load a reward model with its tokenizer.

    Args:
        model: Folder of a reward model or of its adapter, or Hub id of a reward model.
        base: The model an adapter was trained on, where it does not name it.
        device: Where to; None is this process's accelerator, or the CPU.
        batch_size: Sequences a forward pass.
        max_length: Tokens of prompt + completion that are read; None reads all of them.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.

    Raises:
        ModelError: It is no reward model, or cannot be loaded.
    """
    name, revision, adapter = find_model(base, model) if base is not None else find_model(model, None)
    source = ModelSource(name, revision, dtype)
    if adapter is not None and adapter.has_tokenizer:
        tokenizer = load_tokenizer(str(adapter.directory))
    else:
        tokenizer = load_tokenizer(name, revision=revision)
    where = PartialState().device if device is None else device
    with warnings.catch_warnings():
        ignore_notices()
        loaded = load_for_rewards(source, adapter, tokenizer, where)
    return RewardModel(loaded, tokenizer, batch_size, max_length, tuple(dimensions_of(loaded, adapter)))


def dimensions_of(model: nn.Module, adapter: AdapterFiles | None) -> list[str]:
    """What the first numbers of a head of several are; none where the head gives one.

    Args:
        model: A reward model, loaded.
        adapter: What is on it, whose run says it.

    Raises:
        ModelError: Nothing says it.
    """
    config = base_model(model).config.to_dict()
    if "reward_dimensions" in config:
        return list(config["reward_dimensions"])
    if base_model(model).get_submodule(REWARD_HEAD).weight.shape[0] == 1:
        return []
    folders = [] if adapter is None else [adapter.directory, adapter.directory.parent]
    for folder in folders:
        if (folder / RUN_FILE).is_file():
            entries = read_json(folder / RUN_FILE).get("config", {})
            return entries.get("dimensions", {}).get("value") or [OVERALL]
    raise ModelError(
        "the head of this reward model gives several numbers, and nothing says which of them are rewards: give the "
        "folder of the run that trained it, or the merged model (alignkit merge)"
    )


def load_for_rewards(
    source: ModelSource, adapter: AdapterFiles | None, tokenizer: PreTrainedTokenizerBase, device: torch.device | str
) -> nn.Module:
    """Load a reward model to be used, in evaluation mode, reading off rewards where it did in training.

    Args:
        source: The model.
        adapter: Put on it, or None.
        tokenizer: Says what pads rows; gets its EOS for that where it has nothing.
        device: Where to.

    Raises:
        ModelError: It is no reward model, cannot be loaded, or the adapter was trained on another base.
    """
    if is_deepspeed_zero3_enabled():
        raise ModelError(f"{source.model!r}: ZeRO-3 would split a reward model that is only used. Take ZeRO-2 or DDP.")
    if adapter is not None:
        if not is_reward_adapter(adapter):
            raise ModelError(
                f"the adapter {str(adapter.directory)!r} is that of a language model, not of a reward model"
            )
        check_base(adapter, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    head = RewardHead() if adapter is None else head_of_adapter(adapter)
    loaded = load_model(replace(source, reward_head=head), device)
    check_head(loaded)
    # Without it transformers reads the last position of a padded row, which is padding.
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return loaded if adapter is None else load_adapter(loaded, adapter)
