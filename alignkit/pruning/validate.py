"""Whether stock code can load what a plan leaves, and under which config: asked before anything is computed.

All that is wrong with a plan is said at once, each with the nearest thing that works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import lcm
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from alignkit.errors import ModelError
from alignkit.pruning.families import Family, Sizes, find_family, sizes_of, writer_names
from alignkit.pruning.fold import Fold
from alignkit.pruning.plan import PruningPlan

TENSOR_CORES, SMALL_MODELS = 128, 64
"""Multiples that a hidden width should have: fast kernels and quantised files want the first, or the second."""

_CONFIG_FIELDS = {"ffn": "intermediate_size", "kv_groups": "num_key_value_heads"}


def target_config(plan: PruningPlan, config: PreTrainedConfig, *, keep_tied: bool = False) -> PreTrainedConfig:
    """Stock config of the pruned model, with the width of a head written out.

    A llama whose hidden width is no multiple of its heads becomes a mistral without a sliding window, which computes
    the same and has no such rule. A qwen2 whose heads no longer fill the hidden width becomes a llama with biases, as
    vLLM and llama.cpp ignore a qwen2's width of a head. Embedding and head of a gemma stay one matrix, which costs
    nothing: it scales embeddings by the root of the hidden size, so the matrix itself is only cut.

    Args:
        plan: What is kept.
        config: Of the dense model; stays as it is.
        keep_tied: Keep one matrix as embedding and head although hidden channels go, whatever the family.

    Raises:
        ModelError: No stock class loads it; lists everything that is wrong.
    """
    family, dense = find_family(config), sizes_of(config)
    _refuse(plan, [*_problems_of_model(config), *_misfits(plan, dense)])
    pruned = pruned_sizes(plan, config)
    target, misfit = _target_type(family, pruned, plan, config)
    _refuse(plan, [*_uneven(plan, dense), *misfit, *_problems_of_ties(config, keep_tied)])
    stays_tied = pruned.hidden == dense.hidden or family.scales_embedding
    values = config.to_dict()
    for key in ("architectures", "model_type", "transformers_version", "sliding_window_pattern"):
        values.pop(key, None)
    values |= {
        "hidden_size": pruned.hidden,
        "intermediate_size": pruned.ffn,
        "num_attention_heads": pruned.heads,
        "num_key_value_heads": pruned.kv_groups,
        "num_hidden_layers": pruned.layers,
        "head_dim": pruned.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings and (keep_tied or stays_tied),
    }
    values |= _fields_by_layer(plan, dense, values)
    if target != family.model_type:
        values = _as_other_type(target, values)
    return AutoConfig.for_model(target, **values)


def pruned_sizes(plan: PruningPlan, config: PreTrainedConfig) -> Sizes:
    """Sizes of the pruned model; where counts differ between layers, the largest.

    Args:
        plan: A plan that fits.
        config: Of the dense model.
    """
    dense = sizes_of(config)
    layers = plan.kept_layers(dense.layers)
    groups = dense.kv_groups if plan.kv_groups is None else max(len(plan.kv_groups[layer]) for layer in layers)
    return Sizes(
        hidden=dense.hidden if plan.hidden is None else len(plan.hidden),
        ffn=dense.ffn if plan.ffn is None else max(len(plan.ffn[layer]) for layer in layers),
        kv_groups=groups,
        layers=len(layers),
        heads=groups * dense.queries,
        head_dim=dense.head_dim,
    )


def next_width(config: PreTrainedConfig, wanted: int, *, kv_groups: int | None = None) -> int:
    """The smallest hidden width of at least ``wanted`` that loads everywhere and runs fast.

    That is a multiple of the number of heads and of 128; where the next of them is the dense width, of 64 instead, or
    of the number of heads alone.

    Args:
        config: Of the dense model.
        wanted: Channels asked for.
        kv_groups: Key/value heads that are kept; None: all.

    Raises:
        ModelError: It is not between 1 and the dense width.
    """
    sizes = sizes_of(config)
    if not 1 <= wanted <= sizes.hidden:
        raise ModelError(f"a hidden width of {wanted} was asked for; write one from 1 to {sizes.hidden}, the dense one")
    heads = sizes.queries * (kv_groups or sizes.kv_groups)
    for step in (lcm(heads, TENSOR_CORES), lcm(heads, SMALL_MODELS), heads):
        width = -(-wanted // step) * step
        if width < sizes.hidden:
            return width
    return sizes.hidden


def check_fit(plan: PruningPlan, config: PreTrainedConfig) -> None:
    """Raise ModelError unless a plan is one for this model, whatever may be exported.

    Args:
        plan: The plan.
        config: Of the dense model.
    """
    find_family(config)
    _refuse(plan, _misfits(plan, sizes_of(config)))


def check_folds(folds: Mapping[str, Fold], config: PreTrainedConfig) -> None:
    """Raise ModelError unless each fold is behind a writer of the residual stream and as wide as that.

    Args:
        folds: By the full name of the writer.
        config: Of the dense model.
    """
    names = writer_names(config)
    if strangers := [name for name in folds if name not in names]:
        raise ModelError(
            f"a fold is keyed to {strangers[0]!r}, which does not write to the residual stream. What does: {names[0]}, "
            f"{names[1]}, {names[2]} and so on by layer."
        )
    for name, fold in folds.items():
        if not fold.has_shape(config.hidden_size):
            shapes = [list(factor.shape) for factor in (fold.l0, fold.l1, fold.v)]
            raise ModelError(
                f"the fold of {name} has l0, l1, v of shapes {shapes}; with a hidden size of {config.hidden_size} they "
                f"must be [r, {config.hidden_size}], [{config.hidden_size}, r] and [{config.hidden_size}]"
            )


def _refuse(plan: PruningPlan, found: Iterable[str]) -> None:
    if problems := list(found):
        listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ModelError(f"the pruning plan {plan.digest()[:8]} cannot be used:{listed}")


def _misfits(plan: PruningPlan, sizes: Sizes) -> Iterator[str]:
    """Indices beyond the model, and lists that are not one a layer."""
    for axis, size in (("hidden", sizes.hidden), ("layers", sizes.layers)):
        kept = getattr(plan, axis)
        if kept is not None and kept[-1] >= size:
            yield f"{axis} keeps index {kept[-1]}, but the model has {size}: write indices from 0 to {size - 1}"
    for axis, size in (("ffn", sizes.ffn), ("kv_groups", sizes.kv_groups)):
        lists = getattr(plan, axis)
        if lists is None:
            continue
        if len(lists) != sizes.layers:
            yield (
                f"{axis} has {len(lists)} lists, but the dense model has {sizes.layers} layers: write one for each, "
                "dropped ones too"
            )
        elif (largest := max(kept[-1] for kept in lists)) >= size:
            yield f"{axis} keeps index {largest}, but a layer has {size}: write indices from 0 to {size - 1}"


def _uneven(plan: PruningPlan, dense: Sizes) -> Iterator[str]:
    """Axes whose counts differ between the kept layers."""
    for axis, field in _CONFIG_FIELDS.items():
        lists = getattr(plan, axis)
        if lists is None:
            continue
        counts = [len(lists[layer]) for layer in plan.kept_layers(dense.layers)]
        if min(counts) < max(counts):
            yield (
                f"{axis} keeps {min(counts)} in one layer and {max(counts)} in another, but a stock config has one "
                f"{field} for all layers. Keep the same number in each, such as {round(sum(counts) / len(counts))}, or "
                "fill the smaller ones up with zeros (alignkit.pruning.slicing.zero_pad), which saves nothing in them"
            )


def _problems_of_model(config: PreTrainedConfig) -> Iterator[str]:
    values = config.to_dict()
    if values.get("quantization_config"):
        yield (
            "the model is quantised, and codes of mixed or cut rows do not exist. Load it dequantised, export in "
            "bfloat16 or float32, and quantise the exported model"
        )
    if values.get("per_layer_config"):
        yield "the config has sizes by layer (per_layer_config), which stock code of this family does not read"


def _problems_of_ties(config: PreTrainedConfig, keep_tied: bool) -> Iterator[str]:
    if keep_tied and not config.tie_word_embeddings:
        yield "embedding and head of the model are two matrices already: leave out keep_tied"


def _target_type(
    family: Family, pruned: Sizes, plan: PruningPlan, config: PreTrainedConfig
) -> tuple[str, Sequence[str]]:
    """Model type of the export, and why there is none."""
    values, target = config.to_dict(), family.model_type
    if target == "qwen2" and pruned.hidden != pruned.heads * pruned.head_dim:
        target = "llama"
        if any(
            values["layer_types"][layer] != "full_attention" for layer in plan.kept_layers(config.num_hidden_layers)
        ):
            return target, [
                "a qwen2 whose heads do not fill the hidden width must be written as a llama, since vLLM and llama.cpp "
                "ignore its width of a head, and a llama has no sliding window. Prune ffn or layers instead, or a "
                "model with use_sliding_window: false"
            ]
    needs_multiple = target == "llama" or family.width_of_heads
    if not needs_multiple or pruned.hidden % pruned.heads == 0:
        return target, []
    if family.model_type == "llama" and not (values["attention_bias"] or values["mlp_bias"]):
        return "mistral", []
    return target, [_no_multiple(target, pruned, sizes_of(config))]


def _no_multiple(target: str, pruned: Sizes, dense: Sizes) -> str:
    """What to say of a width that is no multiple of the heads: the nearest widths and numbers of groups that are."""
    below = pruned.hidden // pruned.heads * pruned.heads
    widths = [width for width in (below, below + pruned.heads) if 0 < width <= dense.hidden]
    groups = [count for count in range(1, dense.kv_groups + 1) if pruned.hidden % (count * dense.queries) == 0]
    ways = [f"{' or '.join(map(str, widths))} hidden channels"] if widths else []
    ways += [f"{' or '.join(map(str, groups[-3:]))} of kv_groups"] if groups else []
    return (
        f"a {target} must have a hidden size that is a multiple of its attention heads, and {pruned.hidden} is none of "
        f"{pruned.heads}. Keep {', or '.join(ways)}"
    )


def _fields_by_layer(plan: PruningPlan, dense: Sizes, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config that speak of single layers, for the kept ones."""
    layers, fields = plan.kept_layers(dense.layers), {}
    if values.get("layer_types") is not None:
        fields["layer_types"] = [values["layer_types"][layer] for layer in layers]
    if len(layers) < dense.layers and values.get("max_window_layers") is not None:
        fields["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in layers)
    return fields


def _as_other_type(target: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config as one of ``target``: a llama as a mistral, or a qwen2 as a llama."""
    without = {"attention_bias", "mlp_bias", "pretraining_tp"} if target == "mistral" else {"layer_types"}
    without |= {"sliding_window", "use_sliding_window", "max_window_layers"}
    kept = {key: value for key, value in values.items() if key not in without}
    return kept | ({"sliding_window": None} if target == "mistral" else {"attention_bias": True, "mlp_bias": False})
