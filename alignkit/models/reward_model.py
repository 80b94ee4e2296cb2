"""Reward models: a decoder whose head gives numbers, read off at the last token of each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alignkit.data.lengths import RowLengths
from alignkit.data.reward_batch import RewardCollator, scored_position
from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun, agreed
from alignkit.models._forward import LOGP_TOLERANCE
from alignkit.models.loading import REWARD_HEAD
from alignkit.models.wrapping import base_model


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
    inputs = {name: value.to(device) for name, value in RewardCollator(pad_token_id).padded(sequences).items()}
    with head_outputs(run.base) as outputs:
        own = run.model(**inputs, use_cache=False).logits
    positions = [scored_position(ids, pad_token_id) for ids in sequences]
    return outputs[0][range(len(sequences)), positions].float(), own.float()
