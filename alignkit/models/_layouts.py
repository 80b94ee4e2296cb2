"""Which batch layout a run takes, and why.

Upstream names relied on: ``config.layer_types``, ``config.sliding_window`` and ``config._attn_implementation`` of
transformers' text configs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from peft import PeftConfig
from torch import nn

from alignkit.data.lengths import SAMPLED_ROWS, RowLengths
from alignkit.data.prefix import Layout, packed_length
from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun, layout_problem
from alignkit.models._forward import PACKED_ATTENTION, base_model, packed_attention, replacement
from alignkit.models.choices import Choice, pinned

ASKED_FOR = "asked for"
VIRTUAL_TOKENS = "prompt-learning adapters prepend virtual tokens to every row"
WINDOWS = re.compile(r"(.*_)?window(_size)?|local_attention|attention_chunk_size|index_topk")
"""Keys of a config that say how far a token sees, or how many of the tokens before it it looks at."""


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

    def as_choice(self) -> Choice:
        """As one of the choices of a run."""
        return pinned("layout", self.layout) if self.reason == ASKED_FOR else Choice("layout", self.layout, self.reason)


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
    lengths: RowLengths | None = None,
    adapter: PeftConfig | None = None,
    others: Mapping[str, nn.Module] | None = None,
    aux_loss: bool = False,
) -> LayoutChoice:
    """Decide the layout from what is known without running anything; :func:`confirmed` then tries it.

    Args:
        requested: The config's ``layout``.
        model: The policy, plain or PEFT.
        rows: Candidate rows; costs are estimated on the first ``SAMPLED_ROWS``.
        batch_size: Rows of a micro-batch.
        lengths: Of all rows that will be run; None looks at ``rows``.
        adapter: The adapter that the model is about to get.
        others: Every other model that will be run in the layout, by what it is called.
        aux_loss: Whether a load-balancing loss is trained on.

    Raises:
        ModelError: ``shared_prefix`` was asked for and the architecture of a model does not allow it.
    """
    if requested == "padded":
        return LayoutChoice("padded", ASKED_FOR)
    longest = max((lengths or RowLengths.of(rows)).packed, 0 if lengths is None else lengths.bound)
    obstacle = first_obstacle(model, others or {}, longest=longest, adapter=adapter, aux_loss=aux_loss)
    attention = packed_attention(base_model(model))
    if requested == "shared_prefix":
        if obstacle:
            raise ModelError(refusal(obstacle))
        return LayoutChoice("shared_prefix", ASKED_FOR, attention)
    if obstacle:
        return LayoutChoice("padded", obstacle)
    sample = list(islice(rows, SAMPLED_ROWS))
    gain = expected_cost(base_model(model).config.get_text_config(), sample, batch_size=batch_size).speedup
    layout: Layout = "shared_prefix" if gain > 1.0 else "padded"
    reason = f"shared_prefix is expected to cost {1 / gain:.2f} x the FLOPs of padded on these rows"
    return LayoutChoice(layout, reason, attention)


def confirmed(choice: LayoutChoice, runs: Iterable[ScoringRun], lengths: RowLengths) -> LayoutChoice:
    """The choice, once every model has scored the longest row alike in both layouts; otherwise ``padded``, and why.

    A collective.

    Args:
        choice: What :func:`choose_layout` returned.
        runs: Every model that will be run in the layout.
        lengths: The rows that they will be run on.

    Raises:
        ModelError: ``shared_prefix`` was asked for, and a model scores packed rows otherwise than padded ones.
    """
    if choice.layout == "padded":
        return choice
    for run in runs:
        if problem := layout_problem(run, lengths.longest_row, replacement(run.base, choice.attention)):
            if choice.reason == ASKED_FOR:
                raise ModelError(refusal(problem))
            return LayoutChoice("padded", problem)
    return choice


def refusal(obstacle: str) -> str:
    """The message where packed rows were asked for and cannot be used."""
    return f"layout: shared_prefix cannot be used: {obstacle}. Write `layout: auto` or `layout: padded`."


def first_obstacle(
    model: nn.Module,
    others: Mapping[str, nn.Module],
    *,
    longest: int,
    adapter: PeftConfig | None = None,
    aux_loss: bool = False,
) -> str | None:
    """Why packed rows of up to ``longest`` tokens cannot be used with some model of a run, or None if they can.

    Args:
        model: The policy.
        others: See :func:`choose_layout`.
        longest: Of the packed rows, tokens.
        adapter: The adapter that the policy is about to get.
        aux_loss: Whether a load-balancing loss is trained on.
    """
    if adapter is not None and adapter.is_prompt_learning:
        return VIRTUAL_TOKENS
    if obstacle := shared_prefix_obstacle(model, longest=longest, aux_loss=aux_loss):
        return obstacle
    for name, other in others.items():
        if found := shared_prefix_obstacle(other, longest=longest):
            return f"{name}: {found}"
    return None


def shared_prefix_obstacle(model: nn.Module, *, longest: int, aux_loss: bool = False) -> str | None:
    """Why packed rows of up to ``longest`` tokens cannot be used with ``model``, or None if they can."""
    base = base_model(model)
    config = base.config.get_text_config()
    settings = config.to_dict()
    if base is not model and any(c.is_prompt_learning for c in model.peft_config.values()):
        return VIRTUAL_TOKENS
    if config._attn_implementation not in PACKED_ATTENTION:
        return f"attn_implementation {config._attn_implementation} takes no arbitrary mask (use sdpa or flex_attention)"
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        return f"{type(base).__name__} takes no position ids"
    kinds = set(settings.get("layer_types") or ()) - {"full_attention"}
    if kinds - {"sliding_attention"}:
        return f"{type(base).__name__} has layers that are not attention over the whole row: {sorted(kinds)}"
    # Not isinstance: `use_sliding_window: true` is no window of one token.
    windows = {key: value for key, value in settings.items() if WINDOWS.fullmatch(key) and type(value) is int}
    if settings.get("layer_types") and not kinds:
        windows.pop("sliding_window", None)  # no layer has it
    for key, window in windows.items():
        if 0 < window < longest:
            return f"the {key.replace('_', ' ')} of {window} tokens is shorter than a packed row of {longest}"
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
