"""What a model can do without: a score for everything that can be pruned, and the plan that keeps the highest.

Scores of a *structure* (a hidden channel, a feed-forward channel, a KV group, a layer) by criterion:

| criterion | hidden channel | feed-forward channel | KV group | layer |
|---|---|---|---|---|
| ``magnitude`` | norm of the weights that go with it | the same | the same | the same |
| ``activation`` | RMS of it in what attention, MLPs and the head read, mean over these | RMS of what the down projection reads | the same of the output projection | Block Influence |
| ``gradient`` | sum of abs(gradient x weight) over the weights that go with it | the same | the same | the same |

Weights are those of matrices and of biases that go with rows; norms are left out. The gradient is that of the mean loss
of all labelled tokens. Activations are those of tokens that are not masked. Neither depends on how rows are batched.

Where it comes from: activations as in Minitron (Muralidharan et al. 2024), aggregated by the root mean square over all
tokens, where that takes means and norms over sequences and batches in turn; abs(gradient x weight) as LLM-Pruner's
element-wise first-order score (Ma et al. 2023). Fidelity: reconstruction of both; the aggregation is ours.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.modes import evaluating
from alignkit.pruning.depth import BlockInfluence
from alignkit.pruning.families import (
    ATTENTION_OUT,
    DOWN,
    EMBEDDING,
    GATE,
    HEAD,
    KEY,
    LAYERS,
    QUERY,
    UP,
    VALUE,
    find_family,
    sizes_of,
)
from alignkit.pruning.groups import Part, ffn_groups, kv_groups, rows_of, sums_by_group
from alignkit.pruning.plan import PruningPlan

CRITERIA = ("magnitude", "activation", "gradient")

_READERS, _WRITERS = (QUERY, KEY, VALUE, GATE, UP), (ATTENTION_OUT, DOWN)
"""Linear maps of a layer, by what they do with the residual stream."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """Scores of all structures of a model, float64; the higher, the more it is needed.

    Attributes:
        hidden: [hidden size].
        ffn: [layers, intermediate size].
        kv_groups: [layers, key-value heads].
        layers: [layers].
    """

    hidden: Tensor
    ffn: Tensor
    kv_groups: Tensor
    layers: Tensor


def importance(model: PreTrainedModel, batches: Iterable[Batch], criterion: str) -> Scores:
    """Score every structure.

    Args:
        model: Plain, of a family that can be pruned; left as it was.
        batches: Of ``input_ids``, ``attention_mask`` and, for ``gradient``, ``labels``; none are looked at for
            ``magnitude``.
        criterion: One of :data:`CRITERIA`.

    Raises:
        ModelError: The model is of no such family, or no token counts.
    """
    find_family(model.config)
    with evaluating(model):
        if criterion == "activation":
            return _by_activation(model, batches)
        if criterion == "magnitude":
            return _by_weight(model, lambda name: model.get_parameter(name).detach().float().square(), root=True)
        gradients = _gradients(model, batches)
        return _by_weight(model, lambda name: (gradients[name] * model.get_parameter(name).detach()).abs(), root=False)


def plan_by_importance(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    criterion: str,
    hidden: int | None = None,
    ffn: int | None = None,
    kv_groups: int | None = None,
    drop_layers: int = 0,
) -> PruningPlan:
    """The plan that keeps the highest scores on the axes that are named; of equal scores the first.

    All scores are those of the whole model: they are not taken anew once something has gone.

    Args:
        model, batches, criterion: As in :func:`importance`.
        hidden: Hidden channels to keep; None keeps all.
        ffn: Feed-forward channels to keep in each layer.
        kv_groups: KV groups to keep in each layer.
        drop_layers: Layers to drop.

    Raises:
        ModelError: As in :func:`importance`, or more is to be kept than there is, or nothing.
    """
    found = importance(model, batches, criterion)
    layers = len(found.layers)
    return PruningPlan(
        hidden=None if hidden is None else strongest(found.hidden, hidden, "hidden channels"),
        ffn=None if ffn is None else tuple(strongest(row, ffn, "feed-forward channels") for row in found.ffn),
        kv_groups=None
        if kv_groups is None
        else tuple(strongest(row, kv_groups, "KV groups") for row in found.kv_groups),
        layers=strongest(found.layers, layers - drop_layers, "layers") if drop_layers else None,
    )


def strongest(scores: Tensor, count: int, of: str) -> tuple[int, ...]:
    """Indices of the ``count`` highest scores, ascending; of equal scores the first.

    Args:
        scores: One number a structure.
        count: How many.
        of: What they are scores of, for the message.

    Raises:
        ModelError: ``count`` is not between 1 and the number of scores.
    """
    if not 1 <= count <= len(scores):
        raise ModelError(f"{count} of {len(scores)} {of} cannot be kept. Keep from 1 to {len(scores)}")
    order = scores.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _by_weight(model: PreTrainedModel, value: Callable[[str], Tensor], *, root: bool) -> Scores:
    """Scores that are sums over the weights that go with a structure, or the square roots of such sums.

    Args:
        model: Whose weights they are.
        value: Something >= 0 for every number of a parameter, by its name.
        root: Whether square roots are taken.
    """
    layers, hidden = range(sizes_of(model.config).layers), sizes_of(model.config).hidden
    found = Scores(
        hidden=_sums(value, _hidden_parts(model), hidden),
        ffn=torch.stack([_sums(value, groups.parts, groups.count) for groups in ffn_groups(model)]),
        kv_groups=torch.stack([_sums(value, groups.parts, groups.count) for groups in kv_groups(model)]),
        layers=torch.cat([_sums(value, _layer_parts(model, index), 1) for index in layers]),
    )
    return Scores(*(scores.sqrt() if root else scores for scores in vars(found).values()))


def _sums(value: Callable[[str], Tensor], parts: Sequence[Part], count: int) -> Tensor:
    return torch.stack([sums_by_group(value(part.name), part.dim, count).cpu() for part in parts]).sum(0)


def _layer_parts(model: PreTrainedModel, index: int) -> list[Part]:
    return rows_of(model, [f"{LAYERS}.{index}.{name}" for name in (*_READERS, *_WRITERS)])


def _hidden_parts(model: PreTrainedModel) -> list[Part]:
    """The columns of every matrix that reads hidden channels, and the rows of every one that writes them."""
    layers = [f"{LAYERS}.{index}" for index in range(sizes_of(model.config).layers)]
    columns = [EMBEDDING, *(f"{layer}.{name}" for layer in layers for name in _READERS)]
    if not model.config.tie_word_embeddings:
        columns.append(HEAD)
    rows = [f"{layer}.{name}" for layer in layers for name in _WRITERS]
    return [*(Part(f"{name}.weight", 1) for name in columns), *rows_of(model, rows)]


def _gradients(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The gradient of every parameter, float32, of the mean loss over all labelled tokens."""
    named = dict(model.named_parameters())
    trained = {name: parameter.requires_grad for name, parameter in named.items()}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in named.items()}
    tokens = 0
    model.requires_grad_(True)
    try:
        for batch in batches:
            inputs = _inputs(model, batch)
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            labels = batch["labels"].to(logits.device)[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            tokens += int((labels != -100).sum())
            for total, gradient in zip(sums.values(), torch.autograd.grad(loss, list(named.values())), strict=True):
                total += gradient
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(trained[name])
    _refuse_without(tokens, "labelled token")
    return {name: total / tokens for name, total in sums.items()}


@torch.no_grad()
def _by_activation(model: PreTrainedModel, batches: Iterable[Batch]) -> Scores:
    sizes = sizes_of(model.config)
    layers = [model.get_submodule(f"{LAYERS}.{i}") for i in range(sizes.layers)]
    reads = [_InputSquares([layer.get_submodule(name) for layer in layers]) for name in (QUERY, GATE)]
    attention, mlp = (_InputSquares([layer.get_submodule(name) for layer in layers]) for name in _WRITERS)
    influence = BlockInfluence(layers)
    watchers = (*reads, attention, mlp, influence)
    tokens, head = 0, torch.zeros(sizes.hidden, dtype=torch.float64)
    try:
        for batch in batches:
            inputs = _inputs(model, batch)
            mask = inputs["attention_mask"].bool()
            tokens += int(mask.sum())
            for watcher in watchers:
                watcher.mask = mask
            last = model.base_model(**inputs, use_cache=False).last_hidden_state
            head += last[mask.to(last.device)].double().square().sum(0).cpu()
    finally:
        for watcher in watchers:
            watcher.close()
    _refuse_without(tokens, "token that is not masked")
    read = torch.cat([*(watcher.means(tokens) for watcher in reads), head[None] / tokens])
    heads = attention.means(tokens).unflatten(1, (sizes.kv_groups, -1)).mean(-1).sqrt()
    return Scores(read.sqrt().mean(0), mlp.means(tokens).sqrt(), heads, influence.scores())


class _InputSquares:
    """Sums over tokens of the squares of what modules are given, one row a module.

    Attributes:
        mask: [B, S] bool, the tokens of the batch that count.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.mask: Tensor
        self._sums: list[Tensor | float] = [0.0] * len(modules)
        self._handles = [module.register_forward_pre_hook(self._hook(i)) for i, module in enumerate(modules)]

    def _hook(self, index: int) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            counted = args[0][self.mask.to(args[0].device)]
            self._sums[index] += counted.double().square().sum(0).cpu()

        return look

    def means(self, tokens: int) -> Tensor:
        """Mean squares, [modules, features]."""
        return torch.stack([total for total in self._sums if isinstance(total, Tensor)]) / tokens

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


def _inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """What the model is called with."""
    return {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}


def _refuse_without(tokens: int, what: str) -> None:
    if not tokens:
        raise ModelError(f"no {what} was given to score the model by. Give rows that have some")
