"""The fastest way to run candidate rows on this device, found by trying each on rows of the run.

What a layout costs on an accelerator depends on kernels more than on FLOPs: scaled-dot-product attention with a dense
mask, the split attention of ``_packed_attention.py`` and FlexAttention all run packed rows, and which of them beats
padded rows, if any, differs between devices, lengths and versions.

Upstream names relied on: ``config._attn_implementation`` and ``set_attn_implementation`` of transformers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn

from alignkit.data.prefix import CandidateCollator, Layout, packed_length
from alignkit.models._comparison import ScoringRun, layout_difference
from alignkit.models._forward import LOGP_TOLERANCE, base_model, completion_forward, compute_precision
from alignkit.models._layouts import LayoutChoice
from alignkit.models._packed_attention import NAME as SPLIT

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MICRO_BATCHES = 3
REPEATS = 2


@dataclass(frozen=True)
class Way:
    """A layout and the attention that runs it."""

    layout: Layout
    attention: str

    def __str__(self) -> str:
        return self.layout if self.layout == "padded" else f"{self.layout} with {self.attention}"


@dataclass(frozen=True)
class Timing:
    """Seconds of all micro-batches, forward and backward; infinite where ``problem`` says why they could not run."""

    seconds: float
    problem: str = ""


def ways_of(model: nn.Module) -> list[Way]:
    """What can be compared with ``model``, plain or PEFT; other attention is tried in place of sdpa alone."""
    own = "sdpa" if _attention_of(model) == SPLIT else _attention_of(model)
    packed = [own, SPLIT, "flex_attention"] if own == "sdpa" else [own]
    return [Way("padded", own), *(Way("shared_prefix", name) for name in packed)]


def time_ways(
    model: nn.Module,
    ways: Sequence[Way],
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    collator: CandidateCollator,
    mixed_precision: str = "no",
) -> dict[Way, Timing]:
    """Time each way on micro-batches of ``rows``. Nothing of the model is changed by it.

    Args:
        model: With its completion head, on its device, neither sharded nor wrapped.
        ways: What to compare.
        rows: Candidate rows, ``MICRO_BATCHES`` times ``batch_size`` or fewer.
        batch_size: Rows of a micro-batch.
        collator: Whose padding is used; its layout is not.
        mixed_precision: accelerate's ``no``, ``bf16`` or ``fp16``.

    Returns:
        A timing for each way. One whose log-probs are not those of padded rows has a problem, however fast it is.
    """
    cuts = range(0, len(rows), batch_size)
    device, precision = next(model.parameters()).device, compute_precision(model, mixed_precision)
    lower, tolerance = AUTOCAST.get(mixed_precision), LOGP_TOLERANCE[precision]
    autocast = partial(torch.autocast, device.type, lower, enabled=lower is not None)
    run = ScoringRun("the policy", model, precision, autocast)
    longest = max(rows, key=lambda row: packed_length(row["prompt_ids"], row["completion_ids"]))
    timings = {}
    for way in ways:
        collate = CandidateCollator(collator.pad_token_id, way.layout, collator.pad_to_multiple_of)
        batches = [collate(rows[i : i + batch_size]) for i in cuts]
        with _as_it_was(model, device):
            try:
                _set_attention(model, way.attention)
                difference = 0.0 if way.layout == "padded" else layout_difference(run, longest)
                if difference <= tolerance:
                    timings[way] = Timing(_seconds(model, batches, device, autocast))
                else:
                    problem = f"is {difference:.2g} nats a token off (tolerance {tolerance})"
                    timings[way] = Timing(math.inf, problem)
            # Kernels that this device, these lengths or this memory do not allow.
            except (RuntimeError, ValueError, ImportError) as error:
                reason = str(error).strip().splitlines() or [""]
                timings[way] = Timing(math.inf, f"{type(error).__name__}: {reason[0][:200]}")
        clear_device_cache()
    return timings


def agreed(timings: Mapping[Way, Timing]) -> dict[Way, Timing]:
    """Mean times over processes, and a problem where one of them had one; a collective."""
    everyone = gather_object([[(timing.seconds, timing.problem) for timing in timings.values()]])
    merged = {}
    for way, column in zip(timings, zip(*everyone, strict=True), strict=True):
        problem = next((problem for _, problem in column if problem), "")
        merged[way] = Timing(sum(seconds for seconds, _ in column) / len(column), problem)
    return merged


def choose_fastest(timings: Mapping[Way, Timing]) -> LayoutChoice:
    """The way that took least time, and the figures as its reason; padded rows if none could run."""
    best = min(timings, key=lambda way: timings[way].seconds)
    figures = [
        f"{way} {timing.problem or f'{1000 * timing.seconds:.0f} ms'}"
        for way, timing in sorted(timings.items(), key=lambda item: item[1].seconds)
    ]
    return LayoutChoice(best.layout, f"the fastest on rows of this run: {'; '.join(figures)}", best.attention)


def _attention_of(model: nn.Module) -> str:
    base: Any = base_model(model)
    name: str = base.config.get_text_config()._attn_implementation
    return name


def _set_attention(model: nn.Module, attention: str) -> None:
    base: Any = base_model(model)
    base.set_attn_implementation(attention)


def _seconds(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Least time of ``REPEATS`` passes over the batches, after one that lets kernels be compiled and chosen."""
    taken = []
    for _ in range(1 + REPEATS):
        begin = _now(device)
        for batch in batches:
            with autocast():
                output = completion_forward(model, {name: value.to(device) for name, value in batch.items()})
            torch.autograd.backward(output.token_logps.sum())
            model.zero_grad(set_to_none=True)
        taken.append(_now(device) - begin)
    return min(taken[1:])


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode inside; mode, attention, gradients and random state afterwards as before."""
    attention, modes = _attention_of(model), {module: module.training for module in model.modules()}
    model.train()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        _set_attention(model, attention)
        model.zero_grad(set_to_none=True)
        for module, is_training in modes.items():
            module.training = is_training
