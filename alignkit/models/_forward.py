"""Bridge to TRL's fused LM head: per-token log-probs of every candidate, in either layout.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- ``trl.trainer.utils.add_fused_lm_head(model, ..., outputs=...)`` and its ``fused_lm_head`` / ``shift_labels`` inputs
- ``FusedCausalLMOutput.log_probs / entropy / is_top1 / log_sum_sq_probs / aux_loss``
- 4-D attention masks pass through ``transformers.masking_utils`` untouched
- transformers ``config._attn_implementation`` and ``set_attn_implementation``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from trl.trainer.utils import add_fused_lm_head

from alignkit.data.prefix import CandidateCollator, Layout, Segments, on_device
from alignkit.errors import ModelError
from alignkit.models import _segments
from alignkit.models.wrapping import base_model as base_model
from alignkit.reports.bars import hidden_unless

PADDED_INPUTS = ("input_ids", "attention_mask", "labels")
PACKED_INPUTS = ("input_ids", "position_ids", "segments", "shift_labels")
_PACKED_BACKBONES: WeakSet[nn.Module] = WeakSet()


LOGP_TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3, "quantized": 0.3}
"""Largest difference of one token's log-prob, nats, that rounding explains when it is computed twice in other batches.

int8 rounds activations by what else is in the batch, so quantised models differ as much as bfloat16 ones do.
"""
_MIXED_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class CompletionOutput:
    """Per-token results, each [B, K, T] and 0 where masked; None where the head does not compute it.

    Attributes:
        token_logps: Log-prob of each completion token, nats; carries the gradient.
        entropy: Entropy of the next-token distribution, nats.
        is_top1: Whether the token is the most likely one.
        log_sum_sq_probs: Log of the sum over the vocabulary of squared probabilities, without gradient.
        aux_loss: Load-balancing loss of a mixture of experts, scalar.
    """

    token_logps: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None
    log_sum_sq_probs: Tensor | None
    aux_loss: Tensor | None


@dataclass
class _PackedRow:
    """Backbone hooks of the ``packed`` layout.

    Before the backbone they turn ``segments`` into what its attention reads; after it they keep only the positions that
    predict a scored token, so that the LM head never projects the others.
    """

    config: Any
    runs: tuple[int, ...] | None = field(default=None, init=False)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook: consumes ``segments``."""
        segments: Segments | None = kwargs.pop("segments", None)
        self.runs = None if segments is None else segments.runs
        if segments is not None and self.config._attn_implementation not in _segments.OWN.values():
            own = self.config._attn_implementation
            raise ModelError(f"its attention, {own}, is none for packed rows; use_packed_attention sets one if it can")
        if segments is not None:
            kwargs["attention_mask"] = _segments.packed_mask()
            kwargs[_segments.KEYWORD] = _segments.PackedParts(segments, kwargs["input_ids"].device)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: ``last_hidden_state`` [1, S, H] becomes [1, N, H]."""
        if self.runs is not None:
            output.last_hidden_state = torch.cat(output.last_hidden_state.split(self.runs, 1)[1::2], 1)
        return output


def compute_precision(model: nn.Module, mixed_precision: str = "no") -> str:
    """The key of ``LOGP_TOLERANCE`` that fits ``model``.

    Args:
        model: Plain or PEFT.
        mixed_precision: accelerate's ``no``, ``bf16`` or ``fp16``.
    """
    base = base_model(model)
    if base.config.to_dict().get("quantization_config") is not None:
        return "quantized"
    return _MIXED_PRECISION.get(mixed_precision, str(base.dtype).removeprefix("torch."))


def add_completion_head(model: nn.Module, temperature: float = 1.0, *, top1: bool = False) -> None:
    """Give ``model`` (plain or PEFT) TRL's fused head, log-probs at a temperature, and the packed layout.

    The preference trainer does not need this: TRL adds the head there.

    Args:
        temperature: What logits are divided by.
        top1: Whether it also says which tokens are the most likely ones, for :func:`score_trained`.
    """
    base = base_model(model)
    add_fused_lm_head(base, temperature=temperature, outputs=("log_probs", "is_top1") if top1 else ("log_probs",))
    support_packed_rows(base)


def support_packed_rows(base: nn.Module) -> None:
    """Register the backbone hooks of the ``packed`` layout, once; ``padded`` rows pass them untouched."""
    backbone = cast(nn.Module, base.base_model)
    if backbone not in _PACKED_BACKBONES:
        # The config alone: a hook that held the model itself would be followed in a circle by a compiler.
        hooks = _PackedRow(base.config.get_text_config())
        backbone.register_forward_pre_hook(hooks.before, with_kwargs=True)
        backbone.register_forward_hook(hooks.after)
        base.register_forward_pre_hook(_without_router_logits, with_kwargs=True)
        _PACKED_BACKBONES.add(backbone)


def _without_router_logits(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: log-probs alone need no load-balancing loss, even where the model's config asks for it.

    Nor does generation, where it could not be computed: the mask has the tokens before this one, and the logits do not.
    """
    settings = vars(base.config.get_text_config())
    if (kwargs.get("fused_lm_head") or kwargs.get("use_cache")) and settings.get("output_router_logits"):
        kwargs.setdefault("output_router_logits", False)
    return args, kwargs


def use_packed_attention(base: nn.Module) -> None:
    """Give a model the attention that its packed rows need and that leaves all others as they were.

    Not between a forward pass and its backward pass: recomputed activations would be those of other attention.
    """
    own = base.config.get_text_config()._attn_implementation
    if own in _segments.OWN:
        base.set_attn_implementation(_segments.OWN[own])


def completion_forward(
    model: nn.Module, inputs: Mapping[str, Tensor], *, router_logits: bool = False
) -> CompletionOutput:
    """One forward pass over a collated batch, with gradient if enabled.

    Args:
        model: Model with a completion head, possibly wrapped (DDP, DeepSpeed, PEFT).
        inputs: What :class:`~alignkit.data.prefix.CandidateCollator` returned, on the model's device.
        router_logits: Ask a mixture of experts for its load-balancing loss.
    """
    names = PACKED_INPUTS if "segments" in inputs else PADDED_INPUTS
    extra: dict[str, Any] = {"output_router_logits": True} if router_logits else {}
    if router_logits and "attention_mask" in inputs:
        extra["attention_mask"] = inputs["attention_mask"]
    output = model(**{name: inputs[name] for name in names} | extra, use_cache=False, fused_lm_head=True)

    def by_candidate(values: Tensor | None) -> Tensor | None:
        return None if values is None else _by_candidate(values, inputs)

    return CompletionOutput(
        token_logps=_by_candidate(output.log_probs, inputs),
        entropy=by_candidate(output.entropy),
        is_top1=by_candidate(output.is_top1),
        log_sum_sq_probs=by_candidate(output.log_sum_sq_probs),
        aux_loss=output.aux_loss,
    )


def _by_candidate(values: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Per-token output of either layout as [B, K, T]; slots without a candidate are 0."""
    shape = inputs["completion_mask"].shape
    if "segments" in inputs:
        return values.new_zeros(shape.numel()).index_copy(0, inputs["token_slots"], values[0]).view(shape)
    # Prompt-learning adapters prepend virtual tokens; the real positions are the last T.
    rows = values[:, -shape[2] :]
    return rows.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, inputs["row_slots"], rows).view(shape)


def completion_logps(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Log-probs [B, K, T] of every completion token, nats, 0 where masked."""
    return completion_forward(model, inputs).token_logps


@torch.no_grad()
def score_rows(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    layout: Layout,
    batch_size: int,
    device: torch.device | str,
    progress: str | None = None,
) -> list[list[list[float]]]:
    """Score candidate rows without gradient.

    Equal completions of a row are computed once and share every digit: rounding, which is another in every layout and
    batch, must not decide which of the two is the likelier.

    Args:
        model: Model with a completion head; its train/eval mode is left alone.
        rows: Candidate rows; a ``Dataset`` is a sequence too.
        pad_token_id: See :class:`~alignkit.data.prefix.CandidateCollator`.
        layout: ``padded`` or ``packed``.
        batch_size: Rows a forward pass.
        device: Where the model's inputs go.
        progress: Title of a progress bar, or None for none.

    Returns:
        Per row, per candidate, the log-probs of the completion tokens, nats.
    """
    collator = CandidateCollator(pad_token_id, layout)
    # Longest first: memory runs out in the first batch or not at all, and padding is least.
    lengths = [len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in rows]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    results: list[list[list[float]]] = [[] for _ in order]
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=progress, **hidden_unless(progress is not None)):
        indices = order[start : start + batch_size]
        batch = [rows[i] for i in indices]
        completions = [[tuple(completion) for completion in row["completion_ids"]] for row in batch]
        distinct = [list(dict.fromkeys(row)) for row in completions]
        inputs = collator([_to_score(row["prompt_ids"], ids) for row, ids in zip(batch, distinct, strict=True)])
        logps = completion_logps(model, on_device(inputs, device)).float().cpu()
        for b, i in enumerate(indices):
            kept = [logps[b, k][inputs["completion_mask"][b, k]].tolist() for k in range(len(distinct[b]))]
            scored = dict(zip(distinct[b], kept, strict=True))
            results[i] = [scored[completion] for completion in completions[b]]
    return results


class TrainedScore(NamedTuple):
    """What a model makes of the trained tokens of one row.

    Attributes:
        nll: Sum of their negative log-likelihoods, nats.
        hits: How many of them are the most likely token.
        tokens: How many there are.
    """

    nll: float
    hits: float
    tokens: float


@torch.no_grad()
def score_trained(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    layout: Layout,
    batch_size: int,
    device: torch.device | str,
    progress: str | None = None,
) -> list[TrainedScore]:
    """Score supervised rows without gradient.

    Args:
        model: Model with a completion head that says which tokens are the most likely; its mode is left alone.
        rows: Rows of one completion each, of which ``is_trained`` says which tokens count.
        pad_token_id: See :class:`~alignkit.data.prefix.CandidateCollator`.
        layout: ``padded`` or ``packed``.
        batch_size: Rows a forward pass, cut in this order.
        device: Where the model's inputs go.
        progress: Title of a progress bar, or None for none.
    """
    collator = CandidateCollator(pad_token_id, layout)
    results: list[TrainedScore] = []
    for start in tqdm(range(0, len(rows), batch_size), desc=progress, **hidden_unless(progress is not None)):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        inputs = collator([_to_score(row["prompt_ids"], map(tuple, row["completion_ids"])) for row in batch])
        output = completion_forward(model, on_device(inputs, device))
        assert output.is_top1 is not None
        for b, row in enumerate(batch):
            counted = torch.tensor(row["is_trained"], dtype=torch.bool, device=output.token_logps.device)
            scored = inputs["completion_mask"][b, 0].to(counted.device)
            logps, hits = (values[b, 0][scored][counted] for values in (output.token_logps, output.is_top1))
            results.append(TrainedScore(-float(logps.double().sum()), float(hits.sum()), float(counted.sum())))
    return results


def _to_score(prompt_ids: Sequence[int], completions: Iterable[tuple[int, ...]]) -> dict[str, Any]:
    ids = [list(completion) for completion in completions]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "scores": [0.0] * len(ids)}
