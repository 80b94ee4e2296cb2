"""Attention over a packed row, part by part: no mask over the row, no padding, nothing computed that nobody looks at.

A packed row (``alignkit/data/prefix.py``) holds prefixes and the branches that go on from them. The queries of a prefix
see the prefix; those of a branch see its prefix and the branch. Both are causal attention aligned at the end: the last
query sees every key. Two ways compute it:

- one call of a kernel for sequences of varying length, over keys that were gathered so that those of a branch stand
  together: flash-attn's where it is installed, else torch's own. On CUDA devices, in half precision.
- elsewhere one call of the model's own kind of attention (sdpa or eager) for all parts of the same shape.

Parts are cut out by split and put together by concatenation, whose derivatives are deterministic.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- transformers ``AttentionInterface.register``, ``AttentionMaskInterface.register``, ``sdpa_attention_forward``,
  ``sdpa_mask`` and ``eager_mask``; keyword arguments of a backbone reach its attention function; an attention mask with
  four dimensions does so untouched; ``eager_attention_forward`` in the module that defines an attention layer
- torch ``torch.nn.attention.varlen.varlen_attn``
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from itertools import accumulate, chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from alignkit.data.prefix import Segments, sent

KEYWORD = "packed_parts"
"""Under which a backbone is given the :class:`PackedParts` of a row."""
OWN = {"sdpa": "alignkit_packed", "flash_attention_2": "alignkit_packed", "eager": "alignkit_packed_eager"}
"""By the attention of a model, the one that runs its packed rows and leaves all others as they were."""
MAX_HEAD_SIZE = 256
"""Of flash attention's kernels."""

Attend = Callable[..., tuple[Tensor, Any]]


class Part(NamedTuple):
    """Queries and keys of one part: pieces of the row by number; ``prefix`` is None where there is none."""

    prefix: int | None
    piece: int


class Call(NamedTuple):
    """Queries and keys that are computed in one call, by the numbers of their pieces of the row."""

    asks: tuple[int, ...]
    sees: tuple[int, ...]


class PackedParts:
    """The parts of a packed row, read off its :class:`~alignkit.data.prefix.Segments`; shared by all layers of a pass.

    Args:
        segments: Where the parts lie.
        device: What the row is on.
    """

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self.device = device
        self.lengths: list[int] = []
        self.prompts: list[tuple[int | None, list[int]]] = []
        for prefix, branches in segments.prompts:
            home = self._piece(prefix) if prefix else None
            pieces = [self._piece(branch) for branch in branches if branch]
            self.prompts.append((home, pieces))
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def _piece(self, length: int) -> int:
        self.lengths.append(length)
        return len(self.lengths) - 1

    @cached_property
    def parts(self) -> list[Part]:
        """Every piece of the row with what it sees, once and in their order, as the kernels take them."""
        found = []
        for prefix, branches in self.prompts:
            found += [] if prefix is None else [Part(None, prefix)]
            found += [Part(prefix, branch) for branch in branches]
        return found

    def sizes(self, part: Part) -> tuple[int, int]:
        """Queries and keys of a part."""
        own = self.lengths[part.piece]
        return own, own + (0 if part.prefix is None else self.lengths[part.prefix])

    @cached_property
    def calls(self) -> list[list[Call]]:
        """What is computed together: as many queries over as many keys.

        A prefix no longer than its branches asks again with each of them: one call less, and no mask, for little more.
        """
        groups: dict[tuple[int, int], list[Call]] = defaultdict(list)
        for prefix, branches in self.prompts:
            before = () if prefix is None else (prefix,)
            length = sum(self.lengths[piece] for piece in before)
            asks_again = bool(before and branches) and length <= min(self.lengths[branch] for branch in branches)
            calls = [Call((*before, b) if asks_again else (b,), (*before, b)) for b in branches]
            for call in calls if asks_again or not before else [Call(before, before), *calls]:
                asked, seen = (sum(self.lengths[piece] for piece in pieces) for pieces in call)
                groups[asked, seen].append(call)
        return list(groups.values())

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """What the last ``queries`` of ``keys`` tokens see, [1, 1, queries, keys] bool; kept for the other layers."""
        if (queries, keys, window) not in self._masks:
            at = torch.arange(keys, device=self.device)
            distance = at[keys - queries :, None] - at
            seen = distance >= 0
            if window is not None:
                seen &= distance < window
            self._masks[queries, keys, window] = seen[None, None]
        return self._masks[queries, keys, window]

    @cached_property
    def _indices(self) -> Tensor:
        """What the kernels are told, in one copy to the device: the ends of queries, those of keys, and the keys."""
        starts = [0, *accumulate(self.lengths)]
        spans = [range(starts[piece], starts[piece + 1]) for part in self.parts for piece in part if piece is not None]
        queries, keys = zip(*map(self.sizes, self.parts), strict=True)
        ends = [0, *accumulate(queries), 0, *accumulate(keys)]
        return sent(torch.tensor([*ends, *chain.from_iterable(spans)]), self.device)

    @cached_property
    def key_index(self) -> Tensor:
        """Positions in the row of the keys of every part, behind one another."""
        return self._indices[2 * (len(self.parts) + 1) :]

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Where the queries and the keys of every part end, from 0, int32: a row behind another."""
        size = len(self.parts) + 1
        queries, keys = self._indices[: 2 * size].to(torch.int32).view(2, size)
        return queries, keys

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a part."""
        queries, keys = zip(*(self.sizes(part) for part in self.parts), strict=True)
        return max(queries), max(keys)


def packed_mask() -> Tensor:
    """What stands in for the mask of a packed row: nothing could be computed with it by attention that reads masks."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # other lengths in every batch would be compiled anew
def _over_parts(
    parts: PackedParts, attend: Attend, module: nn.Module, states: tuple[Tensor, Tensor, Tensor], kwargs: dict[str, Any]
) -> Tensor:
    """Output [1, S, heads, head size of the values] of attention over a packed row."""
    kwargs = {key: value for key, value in kwargs.items() if key != "is_causal"}
    kernel = None if attend is _eager else varlen_kernel(states, kwargs.get("dropout", 0.0))
    if kernel is not None:
        query, key, value = (x[0].transpose(0, 1) for x in states)
        key, value = key[parts.key_index], value[parts.key_index]
        window = kwargs.get("sliding_window")
        return kernel(query, key, value, parts, scaling=kwargs.get("scaling"), window=window)[None]
    queries, keys, values = (torch.split(x, parts.lengths, 2) for x in states)
    output: dict[int, Tensor] = {}
    for group in parts.calls:
        asks, sees = ([piece for call in group for piece in call[side]] for side in (0, 1))
        asking, asked, told = (
            _stacked(x, pieces, len(group)) for x, pieces in ((queries, asks), (keys, sees), (values, sees))
        )
        found, _ = attend(parts, module, asking, asked, told, **kwargs)
        for call, rows in zip(group, torch.split(found, 1), strict=True):
            for piece, own in zip(call.asks, torch.split(rows, [parts.lengths[p] for p in call.asks], 1), strict=True):
                output.setdefault(piece, own)
    return torch.cat([output[piece] for piece in range(len(parts.lengths))], 1)


def _stacked(states: Sequence[Tensor], pieces: Sequence[int], count: int) -> Tensor:
    """Pieces [1, heads, length, size] of as many sequences of one length, [count, heads, length, size], copied once."""
    together = torch.cat([states[piece] for piece in pieces], 2) if len(pieces) > 1 else states[pieces[0]]
    heads, length, size = together.shape[1:]
    return together[0].view(heads, count, length // count, size).transpose(0, 1)


def _sdpa(
    parts: PackedParts, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> tuple[Tensor, Any]:
    queries, keys, window = query.shape[2], key.shape[2], kwargs.get("sliding_window")
    is_causal = queries == keys and (window is None or window >= keys)
    mask = None if is_causal else parts.mask(queries, keys, window)
    if query.device.type != "cpu" or kwargs.get("softcap") is not None:
        found: tuple[Tensor, Any] = sdpa_attention_forward(
            module, query, key, value, mask, is_causal=is_causal, **kwargs
        )
        return found
    # On a CPU the kernel takes a mask and fewer key heads at once, which transformers spares the CUDA kernels: keys are
    # not copied for every query head, and attention takes 0.6 to 0.8 of the time.
    how = {"dropout_p": kwargs.get("dropout", 0.0), "scale": kwargs.get("scaling")}
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=grouped, **how)
    return output.transpose(1, 2), None


def _eager(
    parts: PackedParts, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention that the model's own file defines, with what that alone knows: soft caps, sinks."""
    seen = parts.mask(query.shape[2], key.shape[2], kwargs.get("sliding_window"))
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill(~seen, torch.finfo(query.dtype).min)
    return _eager_of(module)(module, query, key, value, mask, **kwargs)


def _eager_of(module: nn.Module) -> Attend:
    found: Attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return found


# --- kernels for sequences of varying length --------------------------------------------------------------------------


def varlen_kernel(states: tuple[Tensor, Tensor, Tensor], dropout: float) -> Callable[..., Tensor] | None:
    """The kernel that can run these queries, keys and values in one call, or None.

    Args:
        states: Queries [1, heads, S, head size], keys and values.
        dropout: On attention weights, which no such kernel is asked for.
    """
    query, key, value = states
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or dropout:
        return None
    if query.shape[-1] > MAX_HEAD_SIZE or query.shape[-1] != value.shape[-1]:
        return None
    return _flash_attn if _has_flash_attn() else _torch_varlen


@lru_cache(None)
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, parts: PackedParts, *, scaling: float | None, window: int | None
) -> Tensor:
    # No requirement of ours: torch's kernel does the same, and this one is taken where somebody has built it.
    kernel = importlib.import_module("flash_attn").flash_attn_varlen_func
    left = -1 if window is None else window - 1
    output: Tensor = kernel(
        query,
        key,
        value,
        *parts.ends,
        *parts.longest,
        causal=True,
        softmax_scale=scaling,
        window_size=(left, 0 if window is not None else -1),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, parts: PackedParts, *, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = {"scale": scaling}
    if "window_size" in known:
        how["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None or window >= parts.longest[1]:
        how["is_causal"] = True
    else:
        raise ValueError(f"torch {torch.__version__} has no kernel for rows of varying length with a sliding window")
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in known:
        how["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return cast(Tensor, varlen_attn(query, key, value, *parts.ends, *parts.longest, **how))


# --- transformers' interface ------------------------------------------------------------------------------------------


def _attention(
    attend: Attend,
    otherwise: Callable[[nn.Module], Attend],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention function of transformers' interface; rows that are not packed get what they would get without it.

    Args:
        attend: Computes a part.
        otherwise: Gives what computes rows that are not packed.
        module: The attention layer.
        query: [B, heads, S, head size].
        key: The same with the key heads.
        value: Like ``key``; its head size may be another.
        attention_mask: Read for rows that are not packed.
        **kwargs: Scaling, dropout, window and what else the layer passes on, :class:`PackedParts` among it.

    Returns:
        Output [B, S, heads, head size of the values], and the weights where eager attention gives them.
    """
    parts: PackedParts | None = kwargs.pop(KEYWORD, None)
    if parts is None:
        return otherwise(module)(module, query, key, value, attention_mask, **kwargs)
    return _over_parts(parts, attend, module, (query, key, value), kwargs), None


def _sdpa_of(module: nn.Module) -> Attend:
    plain: Attend = sdpa_attention_forward
    return plain


for _attend, _otherwise, _mask, _name in (
    (_sdpa, _sdpa_of, sdpa_mask, OWN["sdpa"]),
    (_eager, _eager_of, eager_mask, OWN["eager"]),
):
    AttentionInterface.register(_name, partial(_attention, _attend, _otherwise))
    AttentionMaskInterface.register(_name, _mask)
