"""Which batch layout a run takes, and why.

Upstream names relied on: ``config.layer_types``, ``config.sliding_window`` and ``config._attn_implementation`` of
transformers' text configs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig
from torch import nn

from alignkit.data.lengths import RowLengths
from alignkit.data.prefix import Layout
from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun, layout_problem
from alignkit.models._forward import base_model
from alignkit.models._segments import OWN
from alignkit.models.choices import Choice, pinned

Requested = Literal["auto", "padded", "packed"]
ASKED_FOR = "asked for"
NO_PADDING = "no padding"
CHEAPER = f"{NO_PADDING}, and every prompt computed once for all of its completions"
VIRTUAL_TOKENS = "prompt-learning adapters prepend virtual tokens to every row"
WINDOWS = re.compile(r"(.*_)?window_size|local_attention|attention_chunk_size|index_topk")
"""Keys of a config that say how far a token sees, or how many of the tokens before it it looks at, in ways that packed
attention does not know. It knows ``sliding_window``, which layers tell their attention."""


@dataclass(frozen=True)
class LayoutChoice:
    """The layout of a run.

    Attributes:
        layout: Which.
        reason: The sentence that explains it.
    """

    layout: Layout
    reason: str

    def as_choice(self) -> Choice:
        """As one of the choices of a run."""
        return pinned("layout", self.layout) if self.reason == ASKED_FOR else Choice("layout", self.layout, self.reason)


def choose_layout(
    requested: Requested,
    model: nn.Module,
    lengths: RowLengths,
    *,
    adapter: PeftConfig | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> LayoutChoice:
    """Decide the layout from what is known without running anything; :func:`confirmed` then tries it.

    Args:
        requested: The config's ``layout``.
        model: The policy, plain or PEFT.
        lengths: Of all rows that will be run.
        adapter: The adapter that the model is about to get.
        others: Every other model that will be run in the layout, by what it is called.

    Raises:
        ModelError: ``packed`` was asked for and the architecture of a model does not allow it.
    """
    if requested == "padded":
        return LayoutChoice("padded", ASKED_FOR)
    longest = max(int(lengths.longest.max()), lengths.bound)
    obstacle = first_obstacle(model, others or {}, longest=longest, adapter=adapter)
    if requested == "packed" and obstacle:
        raise ModelError(refusal(obstacle))
    if obstacle:
        return LayoutChoice("padded", obstacle)
    # Nothing is shared where every row is one sequence.
    cheaper = CHEAPER if (lengths.each_packed >= lengths.longest).any() else NO_PADDING
    return LayoutChoice("packed", ASKED_FOR if requested == "packed" else cheaper)


def confirmed(choice: LayoutChoice, runs: Iterable[ScoringRun], lengths: RowLengths) -> LayoutChoice:
    """The choice, once every model has scored the longest rows alike in both layouts; otherwise ``padded``, and why.

    A collective. Two rows are tried, for the longest packed row need not have the longest sequence.

    Args:
        choice: What :func:`choose_layout` returned.
        runs: Every model that will be run in the layout.
        lengths: The rows that they will be run on.

    Raises:
        ModelError: ``packed`` was asked for, and a model scores packed rows otherwise than padded ones.
    """
    if choice.layout == "padded":
        return choice
    for run in runs:
        if problem := packing_problem(run, lengths):
            if choice.reason == ASKED_FOR:
                raise ModelError(refusal(problem))
            return LayoutChoice("padded", problem)
    return choice


def packing_problem(run: ScoringRun, lengths: RowLengths) -> str | None:
    """Why ``run`` cannot score packed rows of these lengths, or None; a collective."""
    return layout_problem(run, lengths.longest_row) or layout_problem(run, lengths.long_sequence)


def refusal(obstacle: str) -> str:
    """The message where packed rows were asked for and cannot be used."""
    return f"layout: packed cannot be used: {obstacle}. Write `layout: auto` or `layout: padded`."


def first_obstacle(
    model: nn.Module, others: Mapping[str, nn.Module], *, longest: int, adapter: PeftConfig | None = None
) -> str | None:
    """Why packed rows of sequences of up to ``longest`` tokens cannot be used with some model, or None if they can.

    Args:
        model: The policy.
        others: See :func:`choose_layout`.
        longest: Prompt and completion, tokens.
        adapter: The adapter that the policy is about to get.
    """
    if adapter is not None and adapter.is_prompt_learning:
        return VIRTUAL_TOKENS
    if obstacle := packing_obstacle(model, longest=longest):
        return obstacle
    for name, other in others.items():
        if found := packing_obstacle(other, longest=longest):
            return f"{name}: {found}"
    return None


def packing_obstacle(model: nn.Module, *, longest: int) -> str | None:
    """Why packed rows of sequences of up to ``longest`` tokens cannot be used with ``model``, or None if they can."""
    base = base_model(model)
    config = base.config.get_text_config()
    settings = config.to_dict()
    if base is not model and any(c.is_prompt_learning for c in model.peft_config.values()):
        return VIRTUAL_TOKENS
    if config._attn_implementation not in (*OWN, *OWN.values()):
        known = ", ".join(OWN)
        return f"attn_implementation {config._attn_implementation} is none that packed rows are computed with ({known})"
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        return f"{type(base).__name__} takes no position ids"
    kinds = set(settings.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{type(base).__name__} has layers that are not attention over the whole row: {sorted(kinds)}"
    # Not isinstance: `use_sliding_window: true` is no window of one token.
    windows = {key: value for key, value in settings.items() if WINDOWS.fullmatch(key) and type(value) is int}
    for key, window in windows.items():
        if 0 < window < longest:
            return f"the {key.replace('_', ' ')} of {window} tokens is shorter than a row of {longest}"
    return None
