"""What a pruned model must compute: the dense model with everything zeroed that a plan does not keep.

Kept apart from the slicing on purpose: the two are compared before an export gets its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from alignkit.pruning.families import ATTENTION_OUT, DOWN, LAYERS, sizes_of, writers
from alignkit.pruning.fold import Fold
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.validate import check_fit, check_folds


@contextmanager
def masked(
    model: PreTrainedModel, plan: PruningPlan, *, folds: Mapping[str, Fold] | None = None
) -> Iterator[PreTrainedModel]:
    """Let a dense model compute as if it were pruned, until the end of the ``with``.

    After each writer of the residual stream its fold is applied and the channels that are not kept are zeroed; inputs
    of MLP outputs and attention outputs are zeroed where they belong to other channels and heads; a dropped layer
    returns what it was given. Gradients pass through.

    Args:
        model: A plain model; its weights stay as they are.
        plan: What is kept; counts may differ between layers.
        folds: Map behind a writer, by its full name; others have none.

    Yields:
        The model.

    Raises:
        ModelError: The plan or a fold does not fit the model.
    """
    check_fit(plan, model.config)
    check_folds(folds or {}, model.config)
    handles: list[RemovableHandle] = []
    try:
        handles += _mask_stream(model, plan, folds or {})
        handles += _mask_inputs(model, plan)
        handles += _skip_layers(model, plan)
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _mask_stream(model: PreTrainedModel, plan: PruningPlan, folds: Mapping[str, Fold]) -> Iterator[RemovableHandle]:
    width = model.config.hidden_size
    keep = None if plan.hidden is None else zero_one(plan.hidden, width)
    for name in writers(model):
        if keep is not None or name in folds:
            yield model.get_submodule(name).register_forward_hook(_after_writer(folds.get(name), keep))


def _after_writer(fold: Fold | None, keep: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if fold is not None:
            output = fold.apply(output)
        return output if keep is None else output * keep.to(output)

    return hook


def _mask_inputs(model: PreTrainedModel, plan: PruningPlan) -> Iterator[RemovableHandle]:
    sizes = sizes_of(model.config)
    for layer in range(sizes.layers):
        name = f"{LAYERS}.{layer}"
        if plan.ffn is not None:
            keep = zero_one(plan.ffn[layer], sizes.ffn)
            yield model.get_submodule(f"{name}.{DOWN}").register_forward_pre_hook(_before(keep))
        if plan.kv_groups is not None:
            keep = zero_one(plan.kv_groups[layer], sizes.kv_groups).repeat_interleave(sizes.queries * sizes.head_dim)
            yield model.get_submodule(f"{name}.{ATTENTION_OUT}").register_forward_pre_hook(_before(keep))


def _before(keep: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] * keep.to(inputs[0]),)

    return hook


def _skip_layers(model: PreTrainedModel, plan: PruningPlan) -> Iterator[RemovableHandle]:
    count = model.config.num_hidden_layers
    for layer in sorted(set(range(count)) - set(plan.kept_layers(count))):
        yield model.get_submodule(f"{LAYERS}.{layer}").register_forward_hook(_input_of)


def _input_of(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return inputs[0]


def zero_one(kept: tuple[int, ...], size: int) -> Tensor:
    """1 where an index is kept, 0 elsewhere: float32 [size].

    Args:
        kept: The indices.
        size: Number of all.
    """
    mask = torch.zeros(size)
    mask[list(kept)] = 1
    return mask
