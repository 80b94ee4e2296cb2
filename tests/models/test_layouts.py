"""The two layouts compute the same numbers, on every architecture that is not refused, and ``auto`` explains itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.data.lengths import RowLengths
from alignkit.data.prefix import CandidateCollator
from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun, layout_difference
from alignkit.models._forward import add_completion_head, completion_forward, score_rows, use_packed_attention
from alignkit.models._layouts import choose_layout, confirmed, packing_obstacle
from tests.trainers import VOCABULARY, random_rows

ROWS = random_rows([(9, (5, 3)), (1, (4, 2)), (14, (1, 6)), (6, (3, 3, 4))], seed=3)
RAGGED = [*ROWS, *random_rows([(7, (2,)), (3, (1, 4, 2, 1, 5, 3, 2, 1)), (2, (3, 1, 2, 2))], seed=4)]
"""From one to eight completions, of one token and more, of prompts that have a prefix and one that has none."""
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "mistral": SMALL | {"sliding_window": 8},
    "phi3": SMALL | {"pad_token_id": 0},
    "olmo2": SMALL,
    "granite": SMALL,
    "gemma2": SMALL | {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": SMALL | {"head_dim": 8, "sliding_window": 8},
    "gpt_oss": SMALL | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "glm4": SMALL | {"head_dim": 8, "pad_token_id": 0},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    # Multi-head latent attention: values have another head size than queries and keys.
    "deepseek_v3": SMALL
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "qwen3_moe": SMALL | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "attn|position"),
    "bloom": ({"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "position ids"),
}


def build(family: str, settings: dict[str, Any], attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    if family in ("mamba", "bloom"):  # have no sdpa variant
        return AutoModelForCausalLM.from_config(config).eval()
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def token_logps(model: Any, layout: str, rows: list[dict[str, Any]] = ROWS) -> list[torch.Tensor]:
    inputs = CandidateCollator(0, layout)(rows)
    logps = completion_forward(model, inputs).token_logps
    mask = inputs["completion_mask"]
    assert torch.all(logps[~mask] == 0)
    return [logps[b, k][mask[b, k]] for b, row in enumerate(rows) for k in range(len(row["completion_ids"]))]


EAGER_ALONE = ("gemma2", "gpt_oss")
"""Soft caps and sinks exist in eager attention alone."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_in_values_and_gradients(family: str, attention: str) -> None:
    if family in EAGER_ALONE and attention != "eager":
        pytest.skip("what it does to attention logits exists in eager attention alone")
    model = build(family, FAMILIES[family], attention)
    add_completion_head(model)
    longest = max(len(r["prompt_ids"]) + len(c) for r in RAGGED for c in r["completion_ids"])
    assert packing_obstacle(model, longest=longest) is None
    use_packed_attention(model)
    values, gradients = [], []
    for layout in ("padded", "packed", "packed"):
        model.zero_grad()
        tokens = token_logps(model, layout, RAGGED)
        torch.cat([t * (i + 1) for i, t in enumerate(tokens)]).mean().backward()
        values.append(torch.cat(tokens).detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert len(values[0]) == sum(len(c) for r in RAGGED for c in r["completion_ids"])
    torch.testing.assert_close(values[1], values[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(values[1], values[2]) and torch.equal(gradients[1], gradients[2]), "not the same bits twice"


@pytest.mark.parametrize("family", REFUSED)
def test_architectures_that_cannot_are_refused(family: str) -> None:
    settings, reason = REFUSED[family]
    model = build(family, settings)
    with pytest.raises(ModelError, match=reason):
        choose_layout("packed", model, RowLengths.of(ROWS))
    choice = choose_layout("auto", model, RowLengths.of(ROWS))
    assert choice.layout == "padded"
    assert choice.reason


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        (ROWS, True),
        (random_rows([(5, (1, 1))]), True),
        (random_rows([(5, (4,)), (2, (9,))]), False),
        ([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], False),
    ],
    ids=["candidates", "one token each", "one completion", "supervised"],
)
def test_what_packing_saves_is_what_it_saves_of_these_rows(rows: Any, shared: bool) -> None:
    choice = choose_layout("auto", build("llama", SMALL), RowLengths.of(rows))
    assert choice.layout == "packed" and choice.reason.startswith("no padding")
    assert ("all of its completions" in choice.reason) == shared


def test_the_numerical_check_sees_what_the_config_hides() -> None:
    """The static rules can be wrong about an unknown architecture; running both layouts cannot."""
    model = build("mistral", SMALL | {"sliding_window": None})
    add_completion_head(model)
    row = random_rows([(30, (12, 12))])[0]
    run, lengths = ScoringRun("the policy", model, "float32"), RowLengths.of([row])
    assert layout_difference(run, row) < 1e-4
    original = model.model.rotary_emb.forward
    # An architecture that ignores position ids: every branch would sit where the row puts it.
    model.model.rotary_emb.forward = lambda x, position_ids: original(x, torch.arange(x.shape[1])[None])
    assert layout_difference(run, row) > 1e-2
    with pytest.raises(ModelError, match="the layouts differ by"):
        confirmed(choose_layout("packed", model, lengths), [run], lengths)
    choice = confirmed(choose_layout("auto", model, lengths), [run], lengths)
    assert choice.layout == "padded" and "the layouts differ by" in choice.reason


def test_lora_allows_packed_rows_and_prefix_tuning_does_not() -> None:
    lora = get_peft_model(
        build("qwen3", FAMILIES["qwen3"]), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    assert packing_obstacle(lora, longest=20) is None
    prefix = get_peft_model(
        build("qwen3", FAMILIES["qwen3"]), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    assert "virtual tokens" in packing_obstacle(prefix, longest=20)


def test_the_load_balancing_loss_counts_what_padded_rows_count() -> None:
    """Of every token as many times as padded rows hold it, the last of a completion too, which predicts nothing."""
    model = build("qwen3_moe", FAMILIES["qwen3_moe"])
    add_completion_head(model)
    use_packed_attention(model)
    found = []
    for layout in ("padded", "packed"):
        model.zero_grad()
        output = completion_forward(model, CandidateCollator(0, layout, counts_tokens=True)(ROWS), router_logits=True)
        output.aux_loss.backward()
        found.append(
            (output.aux_loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-4)


def test_packed_rows_are_as_long_as_the_bound_says() -> None:
    inputs = CandidateCollator(0, "packed")(random_rows([(384, (128, 128))]))
    assert inputs["input_ids"].shape == (1, 383 + 256)
    padded = CandidateCollator(0, "padded")(random_rows([(384, (128, 128))]))
    assert padded["input_ids"].shape == (2, 512)
    assert CandidateCollator(0, "padded", 64)(random_rows([(3, (4, 2))]))["input_ids"].shape == (2, 64)
    assert CandidateCollator(0, "packed", 64)(random_rows([(3, (4, 2))]))["input_ids"].shape == (1, 64)


def test_per_token_columns_follow_their_tokens() -> None:
    """A reference cached per token lands on the token it belongs to, in both layouts."""
    rows = [r | {"ref_token_logps": [[-float(t) for t in c] for c in r["completion_ids"]]} for r in ROWS]
    for layout in ("padded", "packed"):
        inputs = CandidateCollator(0, layout)(rows)
        labels = inputs["labels"][:, 1:] if layout == "padded" else inputs["shift_labels"]
        for b, row in enumerate(rows):
            for k, completion in enumerate(row["completion_ids"]):
                kept = inputs["ref_token_logps"][b, k][inputs["completion_mask"][b, k]]
                assert kept.tolist() == [-float(t) for t in completion]
        assert (labels != -100).sum() == inputs["completion_mask"].sum()


def test_score_rows_restores_the_order_and_ignores_padding() -> None:
    model = build("qwen3", FAMILIES["qwen3"])
    add_completion_head(model)
    use_packed_attention(model)
    one_by_one = [score_rows(model, [r], pad_token_id=0, layout="padded", batch_size=1, device="cpu")[0] for r in ROWS]
    for layout in ("padded", "packed"):
        together = score_rows(model, ROWS, pad_token_id=7, layout=layout, batch_size=3, device="cpu")
        for a, b in zip(one_by_one, together, strict=True):
            assert [len(x) for x in a] == [len(x) for x in b]
            for x, y in zip(a, b, strict=True):
                assert x == pytest.approx(y, abs=2e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_candidates_with_the_same_tokens_are_known(layout: str) -> None:
    row = {"prompt_ids": [5, 6], "completion_ids": [[7, 8], [9], [7, 8], [9], [7]], "scores": [4.0, 3.0, 2.0, 1.0, 0.0]}
    other = {"prompt_ids": [5], "completion_ids": [[7], [7]], "scores": [1.0, 0.0]}
    known = CandidateCollator(0, layout)([row, other])["first_equal"]
    assert known.tolist() == [[0, 1, 0, 1, 4], [0, 0, 2, 3, 4]]
