"""Which plans stock configs can say, what they are said as, and what is told of the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoConfig, Gemma2Config, Gemma3Config, LlamaConfig

from alignkit.errors import ModelError
from alignkit.pruning.families import FAMILIES, find_family, writers
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.validate import next_width, target_config
from tests.pruning.tiny_families import ALL, AXES, CASES, FFN, HEAD_DIM, LAYERS, WIDTH, config, model


def keep(width: int) -> PruningPlan:
    """The first channels of the residual stream."""
    return PruningPlan(hidden=tuple(range(width)))


@pytest.mark.parametrize("case", CASES)
def test_a_plan_becomes_sizes_and_nothing_else(case: str) -> None:
    """Whatever is no size stays: the width of a head, the scale of queries, vocabulary, epsilon, rotary settings."""
    dense = config(case)
    pruned = target_config(ALL, dense)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "head_dim": HEAD_DIM,
    }
    assert {name: getattr(pruned, name) for name in sizes} == sizes
    before, after = dense.to_dict(), pruned.to_dict()
    may_differ = {*sizes, "layer_types", "max_window_layers", "model_type"}
    if case == "qwen2":
        may_differ |= {"use_sliding_window", "sliding_window", "attention_bias", "mlp_bias", "pretraining_tp"}
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= may_differ
    assert pruned.model_type == ("llama" if case == "qwen2" else dense.model_type)


def test_layers_keep_their_kind_of_attention() -> None:
    """Lists by layer are trimmed by what is kept, not by length; the first windowed layer moves with them."""
    plan = PruningPlan(layers=(0, 2))
    assert target_config(plan, config("gemma2")).layer_types == ["sliding_attention", "sliding_attention"]
    assert target_config(PruningPlan(layers=(1, 2)), config("gemma3")).layer_types == [
        "full_attention",
        "sliding_attention",
    ]
    qwen3 = target_config(plan, config("qwen3", max_window_layers=2))
    assert qwen3.layer_types == ["full_attention", "sliding_attention"]
    assert qwen3.max_window_layers == 1


@pytest.mark.parametrize("model_class", [LlamaConfig, Gemma2Config])
def test_stock_code_refuses_a_width_that_is_no_multiple_of_the_heads(model_class: type) -> None:
    """The reason for the refusals and the way out below: without it they can go."""
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        model_class(hidden_size=26, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def test_a_llama_of_such_a_width_is_written_as_a_mistral() -> None:
    """Without a window it computes the same, rotary scaling included."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    pruned = target_config(keep(26), config("llama", rope_parameters=rope))
    assert (pruned.model_type, pruned.hidden_size, pruned.sliding_window) == ("mistral", 26, None)
    assert pruned.rope_parameters == config("llama", rope_parameters=rope).rope_parameters


@pytest.mark.parametrize(
    ("case", "plan", "message"),
    [
        (
            "llama-biases",
            keep(26),
            r"a llama must .* 26 is none of 4. Keep 24 or 28 hidden channels, or 1 of kv_groups$",
        ),
        ("gemma2", keep(30), r"a gemma2 must .* 30 is none of 4. Keep 28 or 32 hidden channels, or 1 of kv_groups$"),
        ("gemma3", keep(3), r"a gemma3_text must .* 3 is none of 4. Keep 4 hidden channels$"),
        ("qwen2", keep(26), r"a llama must .* 26 is none of 4. Keep 24 or 28 hidden channels, or 1 of kv_groups$"),
    ],
)
def test_a_width_without_a_way_out_is_refused_with_the_next_ones(case: str, plan: PruningPlan, message: str) -> None:
    """And with the numbers of groups for which it would do."""
    with pytest.raises(ModelError, match=message):
        target_config(plan, config(case))


def test_a_qwen2_whose_heads_fill_it_stays_one() -> None:
    """Otherwise it becomes a llama with biases, which other programs load at any width."""
    for plan in (AXES["ffn"], AXES["layers"], PruningPlan(hidden=tuple(range(16)), kv_groups=((0,),) * LAYERS)):
        assert target_config(plan, config("qwen2")).model_type == "qwen2"
    for plan in (AXES["hidden"], AXES["kv_groups"]):
        pruned = target_config(plan, config("qwen2"))
        assert (pruned.model_type, pruned.attention_bias, pruned.mlp_bias) == ("llama", True, False)
    windowed = config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ModelError, match="a llama has no sliding window. Prune ffn or layers instead"):
        target_config(AXES["hidden"], windowed)
    first = PruningPlan(layers=(0,)).merged_with(AXES["hidden"])  # The one layer without a window.
    assert target_config(first, windowed).model_type == "llama"


def test_counts_that_differ_between_layers_are_refused() -> None:
    """Of the layers that are kept; with what fits, and the way to fill up."""
    uneven = PruningPlan(ffn=((0,), (0, 1, 2), (0, 1)), kv_groups=((0,), (0, 1), (1,)))
    with pytest.raises(ModelError) as caught:
        target_config(uneven, config("llama"))
    message = str(caught.value)
    assert "ffn keeps 1 in one layer and 3 in another" in message
    assert "one intermediate_size for all layers. Keep the same number in each, such as 2, or fill" in message
    assert "kv_groups keeps 1 in one layer and 2 in another" in message
    assert target_config(PruningPlan(ffn=((0, 1), (0,), (1, 2)), layers=(0, 2)), config("llama")).intermediate_size == 2


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """A plan for another model, and a model that cannot be one."""
    other = PruningPlan(hidden=(0, WIDTH), ffn=((0, FFN),) * LAYERS, kv_groups=((0,),), layers=(LAYERS,))
    dense = config("llama", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError) as caught:
        target_config(other, dense)
    message = str(caught.value)
    for number, part in enumerate(
        (
            "the model is quantised, .* Load it dequantised",
            f"hidden keeps index {WIDTH}, but the model has {WIDTH}: write indices from 0 to {WIDTH - 1}",
            f"layers keeps index {LAYERS}, but the model has {LAYERS}",
            f"ffn keeps index {FFN}, but a layer has {FFN}",
            f"kv_groups has 1 lists, but the dense model has {LAYERS} layers",
        ),
        1,
    ):
        assert re.search(rf"\n  {number}\. .*{part}", message), message


def test_ties() -> None:
    """Hidden channels part embedding and head unless asked to keep them, or scaled by width; nothing else does."""
    tied = config("llama", tie_word_embeddings=True)
    assert not target_config(AXES["hidden"], tied).tie_word_embeddings
    assert target_config(AXES["hidden"], tied, keep_tied=True).tie_word_embeddings
    for axis in ("ffn", "kv_groups", "layers"):
        assert target_config(AXES[axis], tied).tie_word_embeddings
    assert target_config(AXES["hidden"], config("gemma", tie_word_embeddings=True)).tie_word_embeddings
    assert not target_config(AXES["hidden"], config("gemma")).tie_word_embeddings
    with pytest.raises(ModelError, match="two matrices already: leave out keep_tied"):
        target_config(AXES["hidden"], config("llama"), keep_tied=True)


@pytest.mark.parametrize(
    ("hidden", "heads", "wanted", "width"),
    [
        (4096, 32, 2868, 2944),  # PAT's width of 30 % for Llama-2-7B, which stock code refuses.
        (4096, 32, 3072, 3072),
        (2048, 32, 1500, 1536),
        (5120, 40, 3584, 3840),  # 40 heads: multiples of 640.
        (896, 14, 672, 672),  # Multiples of 896 and 448 leave nothing to prune: of 14.
        (896, 14, 673, 686),
        (1152, 9, 500, 1152 // 2),  # Multiples of 1152 leave nothing, those of 576 do.
        (32, 4, 23, 24),
        (32, 4, 32, 32),
        (32, 4, 29, 32),
    ],
)
def test_the_next_width_loads_everywhere(hidden: int, heads: int, wanted: int, width: int) -> None:
    """A multiple of the heads, and of 128 or 64 where that leaves anything to prune."""
    dense = LlamaConfig(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=1)
    assert next_width(dense, wanted) == width
    assert width == hidden or target_config(keep(width), dense).model_type == "llama"


def test_the_next_width_knows_how_many_heads_stay() -> None:
    """With fewer of them there are more widths."""
    dense = LlamaConfig(hidden_size=896, num_attention_heads=14, num_key_value_heads=7)
    assert next_width(dense, 500, kv_groups=4) == 512
    with pytest.raises(ModelError, match="write one from 1 to 896"):
        next_width(dense, 897)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt2", {}, "LayerNorm subtracts the mean"),
        ("opt", {}, "LayerNorm subtracts the mean"),
        ("phi", {}, "LayerNorm subtracts the mean"),
        ("phi3", {"pad_token_id": None}, "fused.*save the model as a mistral"),
        ("mixtral", {}, "mixture of experts"),
        ("qwen3_moe", {}, "mixture of experts"),
        ("mamba", {}, "What can be: gemma, "),
    ],
)
def test_other_families_are_refused_by_name(model_type: str, settings: dict[str, Any], reason: str) -> None:
    """With the reason, and the families that work."""
    with pytest.raises(ModelError, match=f"'{model_type}' cannot be pruned.*{reason}") as caught:
        find_family(AutoConfig.for_model(model_type, **settings))
    assert all(name in str(caught.value) for name in FAMILIES)


def test_a_model_with_a_vision_tower_is_sent_to_its_text_half() -> None:
    """Whose weights have other names."""
    with pytest.raises(
        ModelError, match="'gemma3' cannot be pruned: it is the model with a vision tower. Load its text"
    ):
        find_family(Gemma3Config())


def test_the_writers_of_the_stream_are_its_modules_of_that_width() -> None:
    """Embedding first, then by layer; each is a module whose output is as wide as the stream and no reader's."""
    for case in CASES:
        dense = model(case)
        names = writers(dense)
        assert len(names) == 1 + 2 * LAYERS
        wide = [
            name
            for name, module in dense.named_modules()
            if "norm" not in name and "head" not in name
            # Queries are as many as the stream is wide here, so they are left out by name.
            and hasattr(module, "weight") and WIDTH in (module.weight.shape[0], module.weight.shape[-1])
            and name.rpartition(".")[2] not in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        ]  # fmt: skip
        assert names == wide
