"""What a parametrisation does while a run trains: the moments at which the bridges to the trainers call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from alignkit.storage.persistent import Persistent


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of their own, which follows the schedule of the run.

    Attributes:
        parameters: Some of those that train.
        learning_rate: At the top of the schedule.
        decays: Whether weight decay takes of them what it would otherwise; if not, nothing.
    """

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    decays: bool = False


class Attachment:
    """What a parametrisation adds to training; every method does nothing unless a subclass says otherwise.

    A step is one of the optimizer, counted from 0 over the whole run, resumptions included. All processes call all of
    it alike. Weights are looked up in their modules at every call, never kept: a gradient rule evaluates the model with
    others in their place.

    Attributes:
        persistent: What checkpoints keep of it, beside weights and buffers of the model.
    """

    persistent: Sequence[Persistent] = ()

    def before_step(self, step: int, total: int) -> None:
        """Make ready for a step, before its first micro-batch is fetched.

        Args:
            step: The step that is about to be made.
            total: Steps of the whole run.
        """

    def after_step(self, step: int) -> None:
        """Called when the optimizer has made this step."""

    def terms(self) -> Mapping[str, Tensor]:
        """Scalars with gradient that are added to the loss of a step, once, and logged as ``loss/<name>``.

        The same on every process. They are asked for with every micro-batch and count as its share of the step.
        """
        return {}

    def parameter_groups(self, total: int) -> Sequence[ParameterGroup]:
        """Parameters that are trained at a learning rate of their own.

        Args:
            total: Steps of the whole run.
        """
        return ()

    def metrics(self) -> Mapping[str, float]:
        """What is logged beside the loss, the same on every process; called once for each line of the log."""
        return {}
