"""The teacher of a run: run on the policy's batches, without gradient, dropout and adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun
from alignkit.models._distillation import TeacherStates, add_teaching
from alignkit.models._forward import base_model
from alignkit.references._reference import Reference, placed


class Teacher:
    """A model whose next-token distributions a policy is compared with.

    Args:
        host: The trainer of the policy, constructed as far as its model, accelerator and arguments; the policy is made
            ready to be taught.
        model: A model of its own, as it was loaded; None is the policy with its adapter switched off.
        temperature: What the logits of both are divided by.

    Raises:
        ModelError: Their vocabularies differ in size, or the weights are split by FSDP.
    """

    def __init__(self, host: Any, model: nn.Module | None, temperature: float) -> None:
        if host.is_fsdp_enabled:
            raise ModelError(
                "a teacher is not available under FSDP, which hides its head behind its own pass. Use DDP or DeepSpeed "
                "(configs/accelerate/zero3.yaml splits weights too), or a method without a teacher, such as sft"
            )
        policy = base_model(host.accelerator.unwrap_model(host.model, keep_torch_compile=False))
        add_teaching(policy, temperature)
        if model is not None:
            _refuse_other_size(policy, model)
            add_teaching(model, temperature)
            model = placed(model, host)
        self._reference = Reference(host, model, pad_token_id=0)

    def bases(self) -> list[Any]:
        """The models of transformers that are run: the policy's and the teacher's own."""
        return self._reference.bases()

    def states(self, inputs: Mapping[str, Tensor]) -> TeacherStates:
        """What the teacher tells of a batch of supervised rows.

        Args:
            inputs: What the policy is given, ``labels`` among it.
        """
        states: TeacherStates = self._reference.seen_by(lambda model: model(**inputs, use_cache=False, teaches=True))
        return states

    def runs(self) -> list[ScoringRun]:
        """The teacher, to be compared with itself, where it can be run before training begins."""
        return [replace(run, name="the teacher") for run in self._reference.runs(ahead=False)]


def _refuse_other_size(policy: Any, teacher: Any) -> None:
    ours, theirs = (model.config.get_text_config().vocab_size for model in (policy, teacher))
    if ours != theirs:
        raise ModelError(
            f"the teacher {teacher.name_or_path!r} has {theirs} next tokens and the policy {policy.name_or_path!r} "
            f"{ours}, so their distributions cannot be compared. Write a teacher of the same vocabulary, or teacher: "
            "base"
        )
