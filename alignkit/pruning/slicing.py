"""The weights of a pruned model: maps merged into the writers of the residual stream, and slices taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from alignkit.errors import ModelError
from alignkit.pruning.families import (
    ATTENTION_OUT,
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    KEY,
    LAYERS,
    QUERY,
    UP,
    VALUE,
    Family,
    Sizes,
    find_family,
    sizes_of,
)
from alignkit.pruning.fold import Fold, index_of, norm_weight
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.validate import check_fit, check_folds, pruned_sizes, target_config


@torch.no_grad()
def pruned_model(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    folds: Mapping[str, Fold] | None = None,
    keep_tied: bool = False,
) -> PreTrainedModel:
    """A new stock model that computes what :func:`~alignkit.pruning.masks.masked` does.

    Args:
        model: A plain dense model, adapters merged; it stays as it is.
        plan: What is kept, the same number in every layer.
        folds: Map behind a writer of the residual stream, by its full name; others have none.
        keep_tied: Keep one matrix as embedding and head; the final norm makes up for its size.

    Returns:
        The model in evaluation mode on the device of ``model``; float64 if that is, float32 otherwise.

    Raises:
        ModelError: No stock class loads it, or a fold does not fit.
    """
    config = target_config(plan, model.config, keep_tied=keep_tied)
    check_folds(folds or {}, model.config)
    folds = {name: fold for name, fold in (folds or {}).items() if not fold.is_identity}
    _check_ties(model)
    if EMBEDDING in folds and config.tie_word_embeddings:
        if keep_tied:
            raise ModelError(
                "keep_tied needs an embedding whose fold is the identity: the head would be changed with it. Leave "
                f"keep_tied out, or train with pat_keep_tied: true, which puts no map behind {EMBEDDING}"
            )
        config.tie_word_embeddings = False
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    with no_init_weights():  # Random numbers for every weight would take minutes, and each is filled below.
        pruned = AutoModelForCausalLM.from_config(config, dtype=dtype).to(model.device)
    pruned.tie_weights()
    slices = _Slices(model, plan, folds, is_tied=config.tie_word_embeddings)
    unfilled = dict(pruned.named_parameters())
    for name, value in slices.of_model():
        unfilled.pop(name).copy_(value)
    # A llama made of a qwen2 has one bias more in each layer.
    for name in [name for name in unfilled if name.endswith(f"{ATTENTION_OUT}.bias")]:
        unfilled.pop(name).zero_()
    if unfilled:
        raise ModelError(f"weights of the pruned model have no source in the dense one, such as {min(unfilled)}")
    pruned.generation_config = deepcopy(model.generation_config)
    return pruned.eval()


@torch.no_grad()
def zero_pad(model: PreTrainedModel, plan: PruningPlan) -> PruningPlan:
    """Make the counts of a plan equal in all layers, filling up with structures whose output is zeroed in ``model``.

    What the masked model says stays as it was under the plan given; a layer that is filled up saves nothing there.

    Args:
        model: A plain dense model; columns of its attention and MLP outputs become zero.
        plan: A plan whose counts may differ between layers.

    Returns:
        The plan that keeps as many in each layer as the given one does in the fullest.

    Raises:
        ModelError: The plan does not fit the model.
    """
    check_fit(plan, model.config)
    dense, largest = sizes_of(model.config), pruned_sizes(plan, model.config)
    padded = {}
    for axis, module, size, count, width in (
        ("ffn", DOWN, dense.ffn, largest.ffn, 1),
        ("kv_groups", ATTENTION_OUT, dense.kv_groups, largest.kv_groups, dense.queries * dense.head_dim),
    ):
        if (lists := getattr(plan, axis)) is None:
            continue
        padded[axis] = list(lists)
        for layer in plan.kept_layers(dense.layers):
            dropped = [index for index in range(size) if index not in set(lists[layer])]
            added = dropped[: count - len(lists[layer])]
            weight = model.get_submodule(f"{LAYERS}.{layer}.{module}").weight
            for index in added:
                weight[:, index * width : (index + 1) * width] = 0
            padded[axis][layer] = tuple(sorted((*lists[layer], *added)))
    return replace(plan, **{axis: tuple(lists) for axis, lists in padded.items()})


def _check_ties(model: PreTrainedModel) -> None:
    head, embedding = model.get_submodule(HEAD).weight, model.get_submodule(EMBEDDING).weight
    if model.config.tie_word_embeddings and head is not embedding and not torch.equal(head, embedding):
        raise ModelError(
            "the config says that embedding and head are one matrix, but they differ. Set tie_word_embeddings to false "
            "in the config of the model"
        )


@dataclass
class _Slices:
    """The weights of the pruned model, one at a time; names are those of the pruned model."""

    model: PreTrainedModel
    plan: PruningPlan
    folds: Mapping[str, Fold]
    is_tied: bool

    def __post_init__(self) -> None:
        self.family: Family = find_family(self.model.config)
        self.sizes: Sizes = sizes_of(self.model.config)
        self.stream = index_of(self.plan.hidden, self.sizes.hidden, self.model.device)
        self.shrink = (len(self.stream) / self.sizes.hidden) ** 0.5

    def of_model(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight."""
        # Scaled by the root of the hidden size, embeddings come out c times as large by themselves.
        scaled = self.family.scales_embedding
        embedding = self._written(EMBEDDING, self._weight(EMBEDDING).T, 1.0 if scaled else self.shrink).T
        yield f"{EMBEDDING}.weight", embedding
        if not self.is_tied:
            yield f"{HEAD}.weight", self._weight(HEAD)[:, self.stream]
        # One matrix for both holds the c of the embedding, so the final norm takes it out for the head too.
        shrink = self.shrink**2 if self.is_tied and not scaled else self.shrink
        yield f"{FINAL_NORM}.weight", self._norm(self._weight(FINAL_NORM), shrink)
        for number, layer in enumerate(self.plan.kept_layers(self.sizes.layers)):
            for name, value in self._of_layer(layer):
                yield f"{LAYERS}.{number}.{name}", value

    def _of_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        inner = index_of(None if self.plan.ffn is None else self.plan.ffn[layer], self.sizes.ffn, self.model.device)
        groups = None if self.plan.kv_groups is None else self.plan.kv_groups[layer]
        heads = index_of(groups, self.sizes.kv_groups, self.model.device)
        keys, queries = self._channels(heads, 1), self._channels(heads, self.sizes.queries)
        rows = {QUERY: queries, KEY: keys, VALUE: keys, GATE: inner, UP: inner}
        columns = {ATTENTION_OUT: queries, DOWN: inner}
        for name, value in self.model.get_submodule(f"{LAYERS}.{layer}").named_parameters():
            module, _, kind = name.rpartition(".")
            if module in rows:
                value = value[rows[module]]
                yield name, value[:, self.stream] if kind == "weight" else value
            elif module in columns:
                value = value[:, columns[module]] if kind == "weight" else value
                yield name, self._written(f"{LAYERS}.{layer}.{module}", value, self.shrink)
            elif module in self.family.norms:
                yield name, self._norm(value, self.shrink)
            elif module in self.family.post_norms:
                yield name, value[self.stream]  # What it reads and what it writes are both c times as large.
            else:
                yield name, value  # Norms of queries and keys, as wide as a head.

    def _weight(self, module: str) -> Tensor:
        weight: Tensor = self.model.get_submodule(module).weight
        return weight

    def _written(self, writer: str, value: Tensor, shrink: float) -> Tensor:
        """c (R W)[K, :] of a weight [D, inputs], or c (R b)[K] of a bias."""
        value = value.double()
        if fold := self.folds.get(writer):
            value = fold.apply(value.T).T if value.ndim > 1 else fold.apply(value)
        return value[self.stream] * shrink

    def _norm(self, weight: Tensor, shrink: float) -> Tensor:
        return norm_weight(weight[self.stream].double(), shrink, adds_one=self.family.adds_one)

    def _channels(self, heads: Tensor, each: int) -> Tensor:
        """Channels of the heads of groups that have ``each``."""
        width = each * self.sizes.head_dim
        return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()
