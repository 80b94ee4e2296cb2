"""The head of a reward model: what it is called, how wide it is, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from alignkit.errors import ModelError
from alignkit.models.files import AdapterFiles, tensor_shapes

REWARD_HEAD = "score"
"""What transformers calls the head of a decoder that gives a sequence numbers in place of next-token logits."""


@dataclass(frozen=True)
class RewardHead:
    """The head of a reward model.

    Attributes:
        width: How many numbers it gives, at most as many as the hidden size; one that is there gives what it gives.
        seed: What a new one is drawn from where the checkpoint has none; None refuses such a checkpoint.
        from_adapter: Whether an adapter that is put on the model brings it.
    """

    width: int = 1
    seed: int | None = None
    from_adapter: bool = False


def head_width(config: PretrainedConfig, head: RewardHead, model: str) -> int:
    """How many numbers the head of a model gives, by its checkpoint where that has one.

    Args:
        config: Of the checkpoint.
        head: What is asked for.
        model: What the model is called in a message.

    Raises:
        ModelError: The checkpoint has a head of another width than the method asks for.
    """
    there = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())
    wanted = min(head.width, int(config.get_text_config().hidden_size))
    if there and head.seed is not None and config.num_labels != wanted:
        raise ModelError(
            f"the model {model!r} has a head of {config.num_labels} numbers already, and the method trains one "
            f"of {wanted}. Give the language model it was made from."
        )
    return int(config.num_labels) if there and not head.from_adapter else wanted


def head_of_adapter(adapter: AdapterFiles) -> RewardHead:
    """The head that an adapter of a reward model brings."""
    shapes = tensor_shapes(adapter.weights)
    widths = [shape[0] for name, shape in shapes.items() if name.endswith(f"{REWARD_HEAD}.weight")]
    if not widths:
        raise ModelError(
            f"the adapter {str(adapter.directory)!r} brings no head of rewards: save it with {REWARD_HEAD!r}"
        )
    return RewardHead(widths[0], from_adapter=True)
