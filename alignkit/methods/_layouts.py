"""Which batch layout a run takes, and why.

Upstream names relied on: ``config.layer_types``, ``config.sliding_window`` and ``config._attn_implementation`` of
transformers' text configs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from alignkit.data.prefix import IGNORE_INDEX, CandidateCollator, Layout, packed_length
from alignkit.errors import ModelError
from alignkit.methods._forward import (
    LOGP_TOLERANCE,
    PACKED_ATTENTION,
    base_model,
    compute_precision,
    packed_attention,
)

SAMPLED_ROWS = 256
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class LayoutChoice:
    """The layout of a run.

    Attributes:
        layout: Which.
        reason: The sentence that explains it.
        attention: The attention packed rows are run with; None where they cannot be.
    """

    layout: Layout
    reason: str
    attention: str | None = None


@dataclass(frozen=True)
class RowCost:
    """FLOPs of one forward pass over the sampled rows in each layout, from the usual 12 h^2 parameters a layer."""

    padded: float
    shared_prefix: float

    @property
    def speedup(self) -> float:
        """Expected gain of ``shared_prefix`` over ``padded``."""
        return self.padded / self.shared_prefix


def choose_layout(
    requested: Literal["auto", "padded", "shared_prefix"],
    model: nn.Module,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int,
    max_length: int | None = None,
    aux_loss: bool = False,
    verify: bool = True,
) -> LayoutChoice:
    """Decide the layout.

    Args:
        requested: The config's ``layout``.
        model: The policy, plain or PEFT, whose backbone supports packed rows.
        rows: Candidate rows; the first ``SAMPLED_ROWS`` are looked at.
        batch_size: Rows of a micro-batch.
        max_length: Longest prompt + completion of any row, looked at or not; None goes by the first rows.
        aux_loss: Whether a load-balancing loss is trained on.
        verify: Also run a short row through both layouts and compare; needs whole (unsharded) parameters.

    Raises:
        ModelError: ``shared_prefix`` was asked for and the architecture does not allow it.
    """
    if requested == "padded":
        return LayoutChoice("padded", "asked for")
    sample = list(islice(rows, SAMPLED_ROWS))
    longest = max(max_length or 0, *(packed_length(r["prompt_ids"], r["completion_ids"]) for r in sample))
    obstacle = shared_prefix_obstacle(model, longest=longest, aux_loss=aux_loss)
    if obstacle is None and verify:
        difference, tolerance = layout_difference(model, sample[0]), LOGP_TOLERANCE[compute_precision(model)]
        if not difference <= tolerance:
            obstacle = f"the layouts differ by {difference:.2g} nats a token on this model (tolerance {tolerance})"
    attention = packed_attention(base_model(model))
    if requested == "shared_prefix":
        if obstacle:
            advice = "Write `layout: auto` or `layout: padded`."
            raise ModelError(f"layout: shared_prefix cannot be used: {obstacle}. {advice}")
        return LayoutChoice("shared_prefix", "asked for", attention)
    if obstacle:
        return LayoutChoice("padded", obstacle)
    gain = expected_cost(base_model(model).config.get_text_config(), sample, batch_size=batch_size).speedup
    layout: Layout = "shared_prefix" if gain > 1.0 else "padded"
    reason = f"shared_prefix is expected to cost {1 / gain:.2f} x the FLOPs of padded on these rows"
    return LayoutChoice(layout, reason, attention)


def shared_prefix_obstacle(model: nn.Module, *, longest: int, aux_loss: bool = False) -> str | None:
    """Why packed rows of up to ``longest`` tokens cannot be used with ``model``, or None if they can."""
    base = base_model(model)
    config = base.config.get_text_config()
    settings = config.to_dict()
    if base is not model and any(c.is_prompt_learning for c in model.peft_config.values()):
        return "prompt-learning adapters prepend virtual tokens to every row"
    if config._attn_implementation not in PACKED_ATTENTION:
        return f"attn_implementation {config._attn_implementation} takes no arbitrary mask (use sdpa or flex_attention)"
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        return f"{type(base).__name__} takes no position ids"
    kinds = set(settings.get("layer_types") or ()) - {"full_attention"}
    if kinds - {"sliding_attention"}:
        return f"{type(base).__name__} has layers that are not attention over the whole row: {sorted(kinds)}"
    window = settings.get("sliding_window")
    windowed = bool(kinds) if settings.get("layer_types") else window is not None
    if windowed and window is not None and window < longest:
        return f"the sliding window of {window} tokens is shorter than a packed row of {longest}"
    if aux_loss:
        return "the load-balancing loss counts every prompt once per completion, which packed rows would change"
    return None


def expected_cost(config: Any, rows: Sequence[Mapping[str, Any]], *, batch_size: int) -> RowCost:
    """Expected FLOPs of both layouts, padding and attention masks included.

    A batch without padding runs causal attention (half the square); padding or packing needs a dense mask, for which
    kernels compute the whole square.
    """
    width, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    per_token, per_pair, per_score = 24 * width**2 * layers, 4 * width * layers, 2 * width * vocabulary
    padded = packed = 0.0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        lengths = [len(r["prompt_ids"]) + len(c) for r in batch for c in r["completion_ids"]]
        longest, share = max(lengths), 0.5 if len(set(lengths)) == 1 else 1.0
        padded += len(lengths) * longest * (per_token + per_score + share * longest * per_pair)
        row = max(packed_length(r["prompt_ids"], r["completion_ids"]) for r in batch)
        scored = max(len(c) for r in batch for c in r["completion_ids"]) * max(len(r["completion_ids"]) for r in batch)
        packed += len(batch) * (row * (per_token + row * per_pair) + scored * per_score)
    return RowCost(padded, packed)


@torch.no_grad()
def layout_difference(model: nn.Module, row: Mapping[str, Any]) -> float:
    """Largest difference of a token log-prob between the layouts, nats, on a short piece of ``row``.

    Args:
        model: Model whose backbone supports packed rows, neither sharded nor wrapped.
        row: A candidate row.
    """
    base = base_model(model)
    device = next(base.parameters()).device
    piece = {
        "prompt_ids": row["prompt_ids"][-CHECKED_TOKENS:],
        "completion_ids": [ids[:CHECKED_TOKENS] for ids in row["completion_ids"]],
        "scores": row["scores"],
    }
    packed = {k: v.to(device) for k, v in CandidateCollator(0, "shared_prefix")([piece]).items()}
    names = ("input_ids", "position_ids", "segment_ids", "completion_positions")
    ours = base.base_model(**{n: packed[n] for n in names}, use_cache=False).last_hidden_state[0]
    padded = {k: v.to(device) for k, v in CandidateCollator(0, "padded")([piece]).items()}
    output = base.base_model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False)
    theirs = output.last_hidden_state[:, :-1][padded["labels"][:, 1:] != IGNORE_INDEX]
    labels = packed["shift_labels"][0]
    scored = labels != IGNORE_INDEX
    head = base.get_output_embeddings()
    logps = [head(hidden).float().log_softmax(-1) for hidden in (ours[scored], theirs)]
    index = labels[scored].unsqueeze(-1)
    return float((logps[0].gather(-1, index) - logps[1].gather(-1, index)).abs().max())
