"""The sliced model is the masked one in every family; and what is known to be wrong fails by the same measure."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.pruning.families import EMBEDDING
from alignkit.pruning.fold import Fold
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.slicing import pruned_model, zero_pad
from tests.pruning.tiny_families import (
    ALL,
    AXES,
    CASES,
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    WHOLE,
    WIDTH,
    WORDS,
    config,
    difference,
    exact_norms,
    folds_of,
    logits,
    masked_logits,
    model,
    token_ids,
)

EXACT, STOCK = 1e-9, 1e-4
"""Largest difference of a logit of size 5 or so: in float64 without stock code's float32 norms, and with stock code."""


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_the_pruned_model_is_the_masked_one(case: str, tied: bool) -> None:
    """Each axis alone, all together, and all together with maps behind every writer."""
    dense = model(case, dtype=torch.float64, tie_word_embeddings=tied)
    folds = folds_of(dense)
    with exact_norms(dense):
        whole = logits(dense)
    for plan, maps in [(plan, {}) for plan in (*AXES.values(), ALL)] + [(PruningPlan(), folds), (ALL, folds)]:
        pruned = pruned_model(dense, plan, folds=maps)
        with exact_norms(dense, pruned):
            expected, found = masked_logits(dense, plan, maps), logits(pruned)
        assert difference(found, expected) <= EXACT, plan
        assert difference(expected, whole) > 0.1, plan
        one_will_do = plan.hidden is None or case.startswith("gemma")
        assert pruned.config.tie_word_embeddings == (tied and one_will_do and not maps)


@pytest.mark.parametrize("case", CASES)
def test_the_pruned_model_is_the_masked_one_with_stock_code(case: str) -> None:
    """In float32, norms and all."""
    dense = model(case)
    folds = folds_of(dense)
    assert difference(logits(pruned_model(dense, ALL, folds=folds)), masked_logits(dense, ALL, folds)) <= STOCK


@pytest.mark.parametrize("case", CASES)
def test_a_tied_model_can_stay_tied(case: str) -> None:
    """The final norm takes the size of the stream out for the head too; with scaled embeddings there is none in it."""
    dense = model(case, dtype=torch.float64, tie_word_embeddings=True)
    folds = folds_of(dense, without=EMBEDDING)
    pruned = pruned_model(dense, ALL, folds=folds, keep_tied=True)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    with exact_norms(dense, pruned):
        assert difference(logits(pruned), masked_logits(dense, ALL, folds)) <= EXACT


def test_a_map_behind_the_embedding_parts_it_from_the_head() -> None:
    """One matrix cannot be both, so that keep_tied is refused."""
    dense = model("llama", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="keep_tied needs an embedding whose fold is the identity"):
        pruned_model(dense, AXES["hidden"], folds=folds_of(dense), keep_tied=True)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_pruned_is_nothing_changed(case: str, tied: bool) -> None:
    """With everything kept and maps that are the identity, every weight has the bits it had, and the same place."""
    dense = model(case, tie_word_embeddings=tied)
    identities = {
        name: Fold(fold.l0, torch.zeros_like(fold.l1), torch.ones_like(fold.v))
        for name, fold in folds_of(dense).items()
    }
    pruned = pruned_model(dense, WHOLE, folds=identities)
    written = {"head_dim": HEAD_DIM, "dtype": "float32"}
    assert pruned.config.to_dict() | written == dense.config.to_dict() | written
    before, after = dense.state_dict(), pruned.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.int32), after[name].view(torch.int32)), name


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_formula(case: str) -> None:
    """Every matrix shrinks by the axes it lies on."""
    dense = model(case)
    width, ffn, heads, groups, layers = 24, 20, 2, 1, 2
    assert count_of(dense) == formula(case, WIDTH, FFN, HEADS, GROUPS, LAYERS)
    extra = layers * width if case == "qwen2" else 0  # Written as a llama, with a bias of zeros.
    assert count_of(pruned_model(dense, ALL)) == formula(case, width, ffn, heads, groups, layers) + extra


def count_of(made: PreTrainedModel) -> int:
    """Numbers in a model."""
    return sum(parameter.numel() for parameter in made.parameters())


def formula(case: str, width: int, ffn: int, heads: int, groups: int, layers: int) -> int:
    """Numbers in an untied model of these sizes."""
    queries, keys = heads * HEAD_DIM, groups * HEAD_DIM
    matrices = 2 * width * queries + 2 * width * keys + 3 * width * ffn
    norms = width * (4 if case in ("gemma2", "gemma3") else 2)
    norms += 2 * HEAD_DIM if case.startswith(("qwen3", "gemma3")) else 0
    biases = queries + 2 * keys if case == "qwen2" or CASES[case][1].get("attention_bias") else 0
    biases += width if CASES[case][1].get("attention_bias") else 0
    biases += 2 * ffn + width if CASES[case][1].get("mlp_bias") else 0
    return layers * (matrices + norms + biases) + 2 * WORDS * width + width


def test_uneven_counts_are_filled_up_with_zeros() -> None:
    """The filled model says what the uneven plan means, and can be sliced."""
    uneven = PruningPlan(
        ffn=(tuple(range(8)), tuple(range(4, 36)), tuple(range(20))), kv_groups=((0, 1), (1,), (0,)), layers=(0, 1)
    )
    dense = model("llama-biases", dtype=torch.float64)
    folds = folds_of(dense)
    with exact_norms(dense):
        expected = masked_logits(dense, uneven, folds)
    even = zero_pad(dense, uneven)
    assert [len(kept) for kept in even.ffn[:2]] == [32, 32]
    assert [len(kept) for kept in even.kv_groups[:2]] == [2, 2]
    pruned = pruned_model(dense, even, folds=folds)
    with exact_norms(pruned):
        assert difference(logits(pruned), expected) <= EXACT


# What is known to be wrong, by the same measure.


def rescaled_by_norms(case: str, *, scale_epsilon: bool) -> tuple[float, PreTrainedModel]:
    """Error of a model whose norms alone make up for the width, as the released code of PAT has it; and that model."""
    dense = model(case, dtype=torch.float64)
    plan, ratio = AXES["hidden"], 24 / WIDTH
    pruned = pruned_model(dense, plan)
    with torch.no_grad():  # The norms are w sqrt(D / d) already; the stream goes back to its own size.
        for name, parameter in pruned.named_parameters():
            if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
                parameter.div_(ratio**0.5)
    if scale_epsilon:
        for name, module in pruned.named_modules():
            if "norm" in name:
                module.variance_epsilon /= ratio
    with exact_norms(dense, pruned):
        return difference(logits(pruned), masked_logits(dense, plan)), pruned


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mistral"])
def test_scaling_the_norms_without_epsilon_is_wrong(case: str) -> None:
    """As released; the error is that of epsilon against the mean square of the stream."""
    error, _ = rescaled_by_norms(case, scale_epsilon=False)
    assert 1e-5 < error < 1


def test_scaling_epsilon_too_is_right_unless_other_norms_share_it() -> None:
    """The norms of queries and keys of a qwen3 have the same epsilon and no pruned channel."""
    assert rescaled_by_norms("llama", scale_epsilon=True)[0] <= EXACT
    assert rescaled_by_norms("qwen3", scale_epsilon=True)[0] > 1e-5


def test_a_fold_without_v_is_wrong() -> None:
    """Which the released merge leaves out."""
    dense = model("llama", dtype=torch.float64)
    folds = folds_of(dense)
    without = {name: Fold(fold.l0, fold.l1, torch.ones_like(fold.v)) for name, fold in folds.items()}
    pruned = pruned_model(dense, ALL, folds=without)
    with exact_norms(dense, pruned):
        assert difference(logits(pruned), masked_logits(dense, ALL, folds)) > 0.1


def test_pruning_within_a_head_is_wrong() -> None:
    """Stock code computes rotary frequencies and the scale of attention from the width of a head."""
    dense = model("llama", dtype=torch.float64)
    half = HEAD_DIM // 2
    narrow = AutoModelForCausalLM.from_config(config("llama", head_dim=half), dtype=torch.float64).eval()
    # Channel i turns together with i + half, so pairs go; the masked model has zeros in both.
    kept = [head * HEAD_DIM + i for head in range(HEADS) for i in (0, 1, half, half + 1)]
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            weight = dense.get_parameter(name)
            rows = (
                kept[: parameter.shape[0]]
                if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
                else None
            )
            weight = weight if rows is None else weight[rows]
            parameter.copy_(weight[:, kept] if "o_proj" in name else weight)
        for layer in dense.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                dropped = sorted(set(range(projection.out_features)) - set(kept))
                projection.weight[dropped] = 0
    with exact_norms(dense, narrow):
        assert difference(logits(narrow), logits(dense)) > 0.1


def test_a_shorter_model_generates_with_its_cache_what_it_generates_without() -> None:
    """Layers are renumbered, and each has the window it had."""
    for case in ("qwen3", "gemma2", "gemma3"):
        pruned = pruned_model(model(case), ALL)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        with_cache, without = (pruned.generate(token_ids(), use_cache=use, **options) for use in (True, False))
        assert torch.equal(with_cache, without)
        assert with_cache.shape[1] == token_ids().shape[1] + 6
