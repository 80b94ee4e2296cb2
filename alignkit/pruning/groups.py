"""What is pruned together inside a layer: feed-forward channels and KV groups, as blocks of their weights.

A *KV group* is one key-value head with the query heads that attend to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.pruning.families import ATTENTION_OUT, DOWN, GATE, KEY, LAYERS, QUERY, UP, VALUE, find_family, sizes_of


@dataclass(frozen=True)
class Part:
    """One weight or bias whose rows or columns belong to groups, in blocks of equal width: group 0 first.

    Attributes:
        name: Of the parameter in the model.
        dim: 0 where rows (or entries of a bias) belong to groups, 1 where columns do.
    """

    name: str
    dim: int


@dataclass(frozen=True)
class LayerGroups:
    """The groups of one kind in one layer.

    Attributes:
        count: How many groups.
        parts: Every parameter that has a share in them; all of it belongs to some group.
    """

    count: int
    parts: tuple[Part, ...]


def ffn_groups(model: PreTrainedModel) -> list[LayerGroups]:
    """Feed-forward channels of every layer: a row of the gate and the up projection, a column of the down projection.

    Raises:
        ModelError: The model is of no family that can be pruned.
    """
    find_family(model.config)
    return _groups(model, sizes_of(model.config).ffn, rows=(GATE, UP), columns=DOWN)


def kv_groups(model: PreTrainedModel) -> list[LayerGroups]:
    """KV groups of every layer: rows of the query, key and value projections, columns of the output projection.

    Raises:
        ModelError: The model is of no family that can be pruned.
    """
    find_family(model.config)
    return _groups(model, sizes_of(model.config).kv_groups, rows=(QUERY, KEY, VALUE), columns=ATTENTION_OUT)


def _groups(model: PreTrainedModel, count: int, *, rows: Sequence[str], columns: str) -> list[LayerGroups]:
    """Groups of every layer. The bias behind the columns belongs to none of them: it stays whatever goes."""
    found = []
    for index in range(sizes_of(model.config).layers):
        prefix = f"{LAYERS}.{index}"
        parts = rows_of(model, [f"{prefix}.{name}" for name in rows])
        found.append(LayerGroups(count, (*parts, Part(f"{prefix}.{columns}.weight", 1))))
    return found


def rows_of(model: PreTrainedModel, modules: Sequence[str]) -> list[Part]:
    """The rows of linear maps, and their biases where they have one.

    Args:
        model: Whose modules they are.
        modules: Full names.
    """
    biased = [name for name in modules if model.get_submodule(name).bias is not None]
    return [*(Part(f"{name}.weight", 0) for name in modules), *(Part(f"{name}.bias", 0) for name in biased)]


def sums_by_group(values: Tensor, dim: int, count: int) -> Tensor:
    """Sums of ``values`` over each of ``count`` blocks along ``dim``, as float64 [count]."""
    return values.movedim(dim, 0).reshape(count, -1).sum(1, dtype=torch.float64)


def scaled_by_group(values: Tensor, dim: int, factors: Tensor) -> Tensor:
    """``values`` with each block along ``dim`` multiplied by its factor; by a factor of 1 to the last bit.

    Args:
        values: A weight or bias.
        dim: Whose blocks belong to groups.
        factors: One number a group, in the order of the blocks.
    """
    each = factors.to(values.dtype).repeat_interleave(values.shape[dim] // len(factors))
    shape = [1] * values.ndim
    shape[dim] = -1
    return values * each.view(shape)


def size_of_group(model: nn.Module, groups: LayerGroups) -> int:
    """Numbers in one group."""
    return sum(_numel(model.get_parameter(part.name)) for part in groups.parts) // groups.count


def group_norms(values: Sequence[Tensor], groups: LayerGroups) -> Tensor:
    """Joint norms of the groups, over everything that has a share in them: float64 [count].

    Args:
        values: Of the parts, in their order.
        groups: Whose parts.
    """
    squares = [
        sums_by_group(value.float().square(), part.dim, groups.count)
        for value, part in zip(values, groups.parts, strict=True)
    ]
    return torch.stack(squares).sum(0).sqrt()


def _numel(parameter: nn.Parameter) -> int:
    """Numbers of a parameter, of which ZeRO-3 leaves a part here."""
    return int(vars(parameter).get("ds_numel", parameter.numel()))
