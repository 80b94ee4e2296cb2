"""What a model does beside its own forward pass where one is taught by another: last hidden states, and their KL.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``FusedCausalLMOutput`` and the ``fused_lm_head`` input of the head that trl's ``add_fused_lm_head`` adds
- trl ``maybe_gather_lm_head_ctx(*params)``, in which a head that ZeRO-3 has split lies whole
- transformers ``base_model`` and ``get_output_embeddings`` of a causal language model
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from alignkit.data.prefix import IGNORE_INDEX
from alignkit.losses.chunked_kl import Head, HeadForm, chunked_kl, head_logits
from alignkit.models._comparison import CHECKED_TOKENS, ScoringRun, disagreement

FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names under which configs keep what a model multiplies its logits by (Cohere, Muse, Falcon-H1)."""


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher tells of a batch: enough for its distributions, without their logits.

    Attributes:
        hidden: Last hidden states at the positions that predict a trained token, [N, H], without gradient.
        mask: Where these positions are, [B, T].
        head: Makes logits of them.
    """

    hidden: Tensor
    mask: Tensor
    head: Head


@dataclass
class TaughtOutput(FusedCausalLMOutput):  # type: ignore[misc]  # trl is untyped
    """What the fused head puts out, and how far each position is from the teacher, [B, T] and 0 where masked."""

    teacher_kl: Tensor | None = None
    teacher_agrees: Tensor | None = None


def add_teaching(base: Any, temperature: float) -> None:
    """Let a model teach, and be taught, in its forward pass; without the two inputs below that stays what it was.

    ``teaches=True`` returns :class:`TeacherStates`. ``teacher=STATES``, together with ``fused_lm_head=True``, returns a
    :class:`TaughtOutput`. Both happen inside the forward pass, so that what launches, shards or casts a model sees to
    its head as well.

    Args:
        base: A transformers model, with its completion head or before it has one.
        temperature: What the logits of both are divided by.
    """
    forward, form = base.forward, head_form(base.config)

    # The signature stays, by which generation checks its inputs.
    @functools.wraps(type(base).forward)
    def with_teaching(
        self: Any, *args: Any, teaches: bool = False, teacher: TeacherStates | None = None, **inputs: Any
    ) -> Any:
        if teaches:
            return _states(self, form, inputs)
        if teacher is None:
            return forward(*args, **inputs)
        with _Listening(self.base_model) as heard:
            output = forward(*args, **inputs)
        return _taught(output, heard.hidden, teacher, _head(self, form), temperature)

    base.forward = MethodType(with_teaching, base)


class _Listening:
    """Keeps the last hidden states [B, S, H] of the pass inside the context."""

    hidden: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    def __enter__(self) -> _Listening:
        self._hook = self.backbone.register_forward_hook(self._keep)
        return self

    def __exit__(self, *raised: object) -> None:
        self._hook.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state


def _states(base: Any, form: HeadForm, inputs: Mapping[str, Any]) -> TeacherStates:
    mask = inputs["labels"][:, 1:] != IGNORE_INDEX
    known = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = base.base_model(**known).last_hidden_state[:, :-1]
    return TeacherStates(hidden[mask], mask, _head(base, form))


def _taught(
    output: FusedCausalLMOutput, hidden: Tensor, teacher: TeacherStates, head: Head, temperature: float
) -> TaughtOutput:
    """The output of the fused head with the divergence of the positions that the teacher knows.

    Prompt-learning adapters put virtual tokens before a row, which the teacher does not have; rows end alike.
    """
    width = teacher.mask.shape[1]
    student = hidden[:, :-1][:, -width:][teacher.mask]
    kl, agrees = chunked_kl(
        student, head, teacher.hidden, teacher.head, temperature=temperature, gathered=maybe_gather_lm_head_ctx
    )
    places = torch.zeros_like(output.label_mask)
    places[:, -width:] = teacher.mask
    return TaughtOutput(
        **output,
        teacher_kl=kl.new_zeros(places.shape).masked_scatter(places, kl),
        teacher_agrees=torch.zeros_like(places).masked_scatter(places, agrees),
    )


def _head(base: Any, form: HeadForm) -> Head:
    lm_head = base.get_output_embeddings()
    return Head(lm_head.weight, lm_head.bias, form)


def head_form(config: Any) -> HeadForm:
    """What a model does with the product of its head, by its config.

    Granite and MiniCPM3 divide by ``logits_scaling``; HyperCLOVA X multiplies by it.

    Args:
        config: Of a transformers model. :func:`head_difference` finds out what it does not say.
    """
    text = config.get_text_config()
    settings = text.to_dict()
    factor = next((settings[name] for name in FACTORS if settings.get(name) is not None), None)
    scaling = settings.get("logits_scaling")
    if factor is None and scaling is not None:
        factor = scaling if text.model_type == "hyperclovax" else 1 / scaling
    return HeadForm(1.0 if factor is None else factor, settings.get("final_logit_softcapping"))


def head_difference(run: ScoringRun, row: Mapping[str, Any]) -> float:
    """How far the log-probs that the KL is made of are from those of the fused head, nats a token; not a collective.

    Args:
        run: A model that :func:`add_teaching` was called on, as it will be run.
        row: A candidate row, whose first tokens are looked at.
    """
    ids = [*row["prompt_ids"], *row["completion_ids"][0]][:CHECKED_TOKENS]
    device = next(run.model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens, "use_cache": False}
    count = tokens.shape[1] - 1
    with run.scoring():
        states = run.model(**inputs, teaches=True)
        fused = run.model(**inputs, fused_lm_head=True).log_probs[0, -count:]
        with maybe_gather_lm_head_ctx(states.head.weight, states.head.bias):
            logps = head_logits(states.hidden[-count:], states.head).log_softmax(-1)
    return disagreement(logps.gather(-1, tokens[0, 1:, None])[:, 0], fused, run.precision)
