"""Which queries of a packed row see which keys, by enumeration, and that the kernels are told the same."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from alignkit.data.prefix import CandidateCollator, Segments
from alignkit.models import _segments
from alignkit.models._segments import KEYWORD, OWN, PackedParts, packed_mask
from tests.trainers import random_rows

CPU = torch.device("cpu")
PROMPTS = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)), min_size=1, max_size=4
)
SHAPES = PROMPTS.map(lambda prompts: [(prefix + 1, branches) for prefix, branches in prompts])
WINDOWS = st.sampled_from([None, 1, 3])


def seen_from(prompts: Any, window: int | None) -> list[list[int]]:
    """Keys of every query, by the definitions: the prefix and the branch so far, of which the last ``window``."""
    keys: list[list[int]] = []
    start = 0
    for prefix, branches in prompts:
        first = list(range(start, start + prefix))
        for length, before in ((prefix, []), *((branch, first) for branch in branches)):
            start_of_part = len(keys)
            for i in range(length):
                seen = [*before, *range(start_of_part, start_of_part + i + 1)]
                keys.append(seen if window is None else seen[-window:])
        start = len(keys)
    return keys


def by_loops(query: Tensor, key: Tensor, value: Tensor, seen: list[list[int]], scaling: float) -> Tensor:
    """Attention [S, heads, size] of every query over its keys, one at a time; [S, heads, size] given."""
    rows = []
    for q, keys in zip(query, seen, strict=True):
        weights = (torch.einsum("hd,khd->hk", q, key[keys]) * scaling).softmax(-1)
        rows.append(torch.einsum("hk,khd->hd", weights, value[keys]))
    return torch.stack(rows)


class Layer(nn.Module):
    """What the interface needs to know of an attention layer."""

    num_key_value_groups = 2


def states(length: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(length)
    return tuple(
        torch.randn(1, heads, length, 8, generator=draw, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )  # type: ignore[return-value]


def flat(x: Tensor) -> Tensor:
    """[1, heads, S, size] as [S, heads, size], key heads repeated for their queries."""
    return x[0].transpose(0, 1).repeat_interleave(4 // x.shape[1], 1)


@given(prompts=PROMPTS, window=WINDOWS)
@settings(max_examples=40, deadline=None)
def test_every_query_sees_its_prefix_and_its_branch(prompts: Any, window: int | None) -> None:
    length = sum(prefix + sum(branches) for prefix, branches in prompts)
    given_states, scaling = states(length), 0.3
    parts = PackedParts(Segments(tuple(prompts), (0, length, 0)), CPU)
    attend = _segments.AttentionInterface._global_mapping[OWN["sdpa"]]
    how = {KEYWORD: parts, "scaling": scaling, "sliding_window": window}
    found, weights = attend(Layer(), *given_states, packed_mask(), **how)
    wanted = by_loops(*map(flat, given_states), seen_from(prompts, window), scaling)
    assert weights is None and found.shape == (1, length, 4, 8)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-12)
    mix = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found[0] * mix).sum(), given_states)
    theirs = torch.autograd.grad((wanted * mix).sum(), given_states)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def reference_kernel(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, window: int | None, scaling: float
) -> Tensor:
    """What a kernel for varying lengths promises: sequence by sequence, causal, aligned at the end."""
    output = []
    for (q0, q1), (k0, k1) in zip(
        *((list(zip(e, e[1:], strict=False))) for e in (ends_q.tolist(), ends_k.tolist())), strict=True
    ):
        for i in range(q1 - q0):
            last = k1 - (q1 - q0) + i + 1
            first = k0 if window is None else max(k0, last - window)
            weights = (torch.einsum("hd,khd->hk", query[q0 + i], key[first:last]) * scaling).softmax(-1)
            output.append(torch.einsum("hk,khd->hd", weights, value[first:last]))
    return torch.stack(output)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kernel", ["torch", "flash_attn"])
def test_kernels_are_told_the_same(kernel: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels cannot run here. What they are handed, run as they promise to, gives the same values."""
    prompts = ((4, (3, 1)), (0, (2,)), (1, (5, 2, 2)))
    length = sum(prefix + sum(branches) for prefix, branches in prompts)
    given_states = states(length)
    asked: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *longest: int, **how: Any) -> Tensor:
        asked.append((ends_q.dtype, *longest))
        left, right = how["window_size"]
        if kernel == "torch":
            assert set(how) == {"scale", "window_size", "enable_gqa"} and how["enable_gqa"] and right == 0
        else:
            assert set(how) == {"causal", "softmax_scale", "window_size", "deterministic"} and how["causal"]
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scale = how.get("scale") or how["softmax_scale"]
        return reference_kernel(q, k, v, ends_q, ends_k, None if left < 0 else left + 1, scale)

    if kernel == "torch":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", functools.wraps(varlen_attn)(run))
        chosen = _segments._torch_varlen
    else:
        module = type("flash_attn", (), {"flash_attn_varlen_func": staticmethod(run)})
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        chosen = _segments._flash_attn
    monkeypatch.setattr(_segments, "varlen_kernel", lambda *given: chosen)
    parts = PackedParts(Segments(prompts, (0, length, 0)), CPU)
    attend = _segments.AttentionInterface._global_mapping[OWN["sdpa"]]
    how = {KEYWORD: parts, "scaling": 0.3, "sliding_window": window}
    found, _ = attend(Layer(), *given_states, packed_mask(), **how)
    wanted = by_loops(*map(flat, given_states), seen_from(prompts, window), 0.3)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-12)
    assert asked == [(torch.int32, 5, 7)]


def test_a_kernel_is_taken_for_half_precision_on_cuda_alone() -> None:
    assert _segments.varlen_kernel(states(3), 0.0) is None


def test_a_layer_that_does_not_hand_on_where_the_parts_lie_fails() -> None:
    """Its tokens would see all others; the stand-in for the mask fits no attention."""
    attend = _segments.AttentionInterface._global_mapping[OWN["sdpa"]]
    with pytest.raises(RuntimeError):
        attend(Layer(), *states(4), packed_mask(), scaling=0.3)


@given(shapes=SHAPES, multiple=st.sampled_from([None, 8]), counts=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_packed_batch_holds_every_token_once(shapes: Any, multiple: int | None, counts: bool) -> None:
    rows = random_rows(shapes, seed=1)
    batch = CandidateCollator(0, "packed", multiple, counts)(rows)
    segments, ids = batch["segments"], batch["input_ids"][0].tolist()
    assert len(ids) == segments.num_tokens == sum(p + sum(b) for p, b in segments.prompts)
    wanted = sum(len(r["prompt_ids"]) - 1 + sum(len(c) + counts for c in r["completion_ids"]) for r in rows)
    assert len(ids) == wanted if multiple is None else len(ids) == math.ceil(wanted / 8) * 8
    # Every scored label is predicted from the prompt and the completion before it, and lands in its slot.
    seen = seen_from(segments.prompts, None)
    at, scoring = 0, []
    for number, run in enumerate(segments.runs):
        scoring += range(at, at + run) if number % 2 else []
        at += run
    slots = batch["completion_mask"].flatten().nonzero()[:, 0].tolist()
    assert sorted(batch["token_slots"].tolist()) == slots and len(scoring) == len(slots)
    expected = {
        (tuple(row["prompt_ids"] + completion[:t]), completion[t])
        for row in rows
        for completion in row["completion_ids"]
        for t in range(len(completion))
    }
    found = {
        (tuple(ids[i] for i in seen[q]), y) for q, y in zip(scoring, batch["shift_labels"][0].tolist(), strict=True)
    }
    assert found == expected
    assert all(batch["position_ids"][0, q] == len(seen[q]) - 1 for q in range(wanted))
    if counts:
        assert int(batch["attention_mask"].sum()) == sum(
            len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"]
        )
