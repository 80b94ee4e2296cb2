"""The masked model: what is zero in it, what no weight of it depends on, and that it is the dense one again after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import ModelError
from alignkit.pruning.families import find_family
from alignkit.pruning.fold import Fold
from alignkit.pruning.masks import masked
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.slicing import pruned_model
from tests.pruning.tiny_families import ALL, AXES, CASES, LAYERS, WIDTH, WORDS, folds_of, logits, model, token_ids


@pytest.mark.parametrize("case", CASES)
def test_dropped_channels_of_the_stream_are_zero_at_every_layer(case: str) -> None:
    """Before and after each layer and both of its branches, maps behind the writers or not."""
    dense = model(case)
    dropped = sorted(set(range(WIDTH)) - set(AXES["hidden"].hidden))
    seen: list[Tensor] = []

    def look(module: Any, inputs: Any, output: Tensor) -> None:
        seen.append(output.detach())

    family = find_family(dense.config)
    wide = [*family.norms, *family.post_norms]
    for maps in ({}, folds_of(dense)):
        seen.clear()
        with masked(dense, AXES["hidden"], folds=maps):
            # Registered after the masks, so that they see what the next module sees.
            modules = [dense.model.embed_tokens, dense.model.norm, *dense.model.layers]
            modules += [layer.get_submodule(name) for layer in dense.model.layers for name in wide]
            modules += [layer.self_attn.o_proj for layer in dense.model.layers]
            modules += [layer.mlp.down_proj for layer in dense.model.layers]
            handles = [module.register_forward_hook(look) for module in modules]
            logits(dense)
            for handle in handles:
                handle.remove()
        assert len(seen) == 2 + LAYERS * (3 + len(wide))
        for output in seen:
            assert output[..., dropped].abs().max() == 0
            assert (output[..., list(AXES["hidden"].hidden)].abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("case", ["llama-biases", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_what_is_removed_is_what_nothing_depends_on(case: str) -> None:
    """The gradient of the masked model finds, weight by weight, what is coupled; exactly that is what slicing takes.

    In each weight the entries with a gradient are whole rows times whole columns, as many as the pruned weight has.
    """
    dense = model(case, dtype=torch.float64)
    every_word = torch.arange(WORDS)[None]
    with masked(dense, ALL):
        loss = dense(torch.cat([every_word, token_ids(1)], 1)).logits.square().sum()
    loss.backward()
    pruned = dict(pruned_model(dense, ALL).named_parameters())
    for name, parameter in dense.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer == 1:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        used = parameter.grad != 0
        shape = pruned[name.replace(f"layers.{layer}", f"layers.{ALL.layers.index(layer)}") if layer else name].shape
        rows, columns = used.flatten(1).any(1) if used.ndim > 1 else used, used.any(0) if used.ndim > 1 else None
        assert int(rows.sum()) == shape[0], name
        if columns is not None:
            assert int(columns.sum()) == shape[1], name
            assert torch.equal(used, rows[:, None] & columns), name


def test_the_dense_model_is_back_after() -> None:
    """Bit by bit, also when something is raised inside."""
    dense = model("gemma2")
    before = logits(dense)
    with masked(dense, ALL, folds=folds_of(dense)) as inside:
        assert inside is dense
        assert not torch.equal(logits(dense), before)
    assert torch.equal(logits(dense), before)
    with pytest.raises(KeyError), masked(dense, ALL):
        raise KeyError
    assert torch.equal(logits(dense), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())


def test_counts_may_differ_between_layers_and_layers_may_be_ignored() -> None:
    """The mask of a dropped layer changes nothing, and a model need not be exportable to be masked."""
    dense = model("llama")
    uneven = [tuple(range(count)) for count in (8, 20, 33)]
    with masked(dense, PruningPlan(ffn=tuple(uneven), layers=(0, 2))):
        one = logits(dense)
    uneven[1] = (39,)
    with masked(dense, PruningPlan(ffn=tuple(uneven), layers=(0, 2))):
        assert torch.equal(logits(dense), one)


@pytest.mark.parametrize(
    ("plan", "folds", "message"),
    [
        (PruningPlan(hidden=(0, WIDTH)), {}, f"hidden keeps index {WIDTH}"),
        (PruningPlan(ffn=((0,),)), {}, "ffn has 1 lists, but the dense model has 3 layers"),
        (
            PruningPlan(),
            {"model.layers.0.mlp.up_proj": None},
            "does not write to the residual stream. What does: model",
        ),
        (
            PruningPlan(),
            {"model.embed_tokens": Fold(torch.zeros(2, 8), torch.zeros(8, 2), torch.ones(8))},
            r"of shapes \[\[2, 8\], \[8, 2\], \[8\]\]; .* they must be \[r, 32\], \[32, r\] and \[32\]",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(plan: PruningPlan, folds: dict[str, Any], message: str) -> None:
    """Before any hook is there."""
    dense = model("llama")
    for use in (masked, pruned_model):
        with pytest.raises(ModelError, match=message):
            with use(dense, plan, folds=folds):
                pass
