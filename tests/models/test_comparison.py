"""What is run is compared first: heads, causality, neighbours in a batch and layouts, for every model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PromptTuningConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from alignkit.data.lengths import SAMPLED_ROWS, RowLengths
from alignkit.errors import ModelError
from alignkit.evals._data import EvaluationData
from alignkit.evals._trial import prepare_scoring
from alignkit.models._comparison import ScoringRun, disagreement, length_dependence, refuse_other_scores
from alignkit.models._forward import add_completion_head
from alignkit.models._layouts import choose_layout, confirmed
from alignkit.shapes import _tokens as _supervised
from alignkit.shapes._candidates import BridgeSettings
from tests.models.test_layouts import FAMILIES, SMALL, build
from tests.supervised import completions, make, token_rows
from tests.trainers import VOCABULARY, random_rows

ROWS = random_rows([(9, (5, 3)), (30, (8, 4)), (14, (1, 6)), (6, (3, 3))], seed=3)
PLAIN = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = SMALL | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "sep_token_id": 1}
HEADS: dict[str, dict[str, Any]] = {
    "modernbert-decoder": IDS | {"local_attention": 128, "global_attn_every_n_layers": 1, "cls_token_id": 1},
    "recurrent_gemma": IDS
    | {"lru_width": 32, "num_key_value_heads": 1, "num_hidden_layers": 3, "logits_soft_cap": 2.0},
}
"""Heads that do more than multiply by the output embeddings and what TRL knows of."""
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 20,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def tiny(family: str, settings: dict[str, Any]) -> Any:
    """A model whose head and attention matter: its weights are large."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def rope_model(kind: str) -> Any:
    limit = 20 if kind == "dynamic" else 128
    return build("llama", SMALL | {"rope_parameters": ROPES[kind], "max_position_embeddings": limit})


def with_window(model: Any, size: int = 12) -> Any:
    """Let the first layer of a model with eager attention look at the last few tokens, which no config says."""
    original = model.model.layers[0].self_attn.forward

    def windowed(hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        length = hidden_states.shape[1]
        if attention_mask is not None and attention_mask.shape[-1] == 0:  # a packed row, which has no mask to change
            return original(hidden_states, attention_mask=attention_mask, **kwargs)
        near = torch.ones(length, length).tril().triu(1 - size).bool()
        mask = torch.zeros(1, 1, length, length) if attention_mask is None else attention_mask
        return original(hidden_states, attention_mask=mask.masked_fill(~near, torch.finfo(mask.dtype).min), **kwargs)

    model.model.layers[0].self_attn.forward = windowed
    return model


def scored(model: Any) -> ScoringRun:
    add_completion_head(model)
    return ScoringRun("the policy", model, "float32")


@torch.no_grad()
def own_logps(model: Any, row: dict[str, Any], candidate: int) -> Tensor:
    """What the model itself gives for one completion, alone, from its logits."""
    prompt, completion = row["prompt_ids"], row["completion_ids"][candidate]
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion]


# --- heads and causality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HEADS)
def test_a_head_that_the_fused_one_is_not_is_refused(family: str) -> None:
    model = tiny(family, HEADS[family])
    run = scored(model)
    with run.scoring():
        fused = run.logps(ROWS[:1])[: len(ROWS[0]["completion_ids"][0])]
    assert (fused - own_logps(model, ROWS[0], 0)).abs().max() > 0.01, "or there would be nothing to refuse"
    with pytest.raises(ModelError, match=r"fused head differ by .* nats a token from those of the model's own logits"):
        refuse_other_scores(run, RowLengths.of(ROWS))


def test_a_model_that_reads_ahead_is_refused() -> None:
    model = tiny("bert", PLAIN | {"intermediate_size": 48})
    with pytest.raises(ModelError, match=r"BertLMHeadModel: a token sees later ones.*causal language model"):
        refuse_other_scores(scored(model), RowLengths.of(ROWS))


def test_routing_that_mixes_tokens_is_refused() -> None:
    """Doge's mixture splits its router's logits across tokens; transformers' source says so too."""
    model = tiny("doge", IDS | {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8})
    with pytest.raises(ModelError, match=r"DogeForCausalLM: a token sees later ones.*routing mixes tokens"):
        refuse_other_scores(scored(model), RowLengths.of(ROWS))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "gpt_neox"])
def test_models_that_are_what_they_seem_pass(family: str) -> None:
    model = build(family, FAMILIES[family], "eager")
    refuse_other_scores(scored(model), RowLengths.of(ROWS))


def test_every_program_refuses_before_it_scores(make_trainer: Any, tmp_path: Path) -> None:
    family = "modernbert-decoder"
    build_it = lambda: tiny(family, HEADS[family])  # noqa: E731
    with pytest.raises(ModelError, match="the policy, ModernBert"):
        make_trainer(model=build_it(), ref_model=build_it(), train_dataset=Dataset.from_list(ROWS))
    with pytest.raises(ModelError, match="the reference, ModernBert"):
        make_trainer(ref_model=build_it(), train_dataset=Dataset.from_list(ROWS))
    with pytest.raises(ModelError, match="the helpful reference, ModernBert"):
        settings = BridgeSettings(negative_reference=build_it())
        make_trainer(settings=settings, train_dataset=Dataset.from_list(ROWS))
    flat = [{"input_ids": row["prompt_ids"] + row["completion_ids"][0]} for row in ROWS]
    supervised = Dataset.from_list([row | {"labels": row["input_ids"]} for row in flat])
    with pytest.raises(ModelError, match="the policy, ModernBert"):
        make(tmp_path, supervised, model=build_it())
    PartialState()
    evaluated = build_it()
    add_completion_head(evaluated)
    with pytest.raises(ModelError, match="the base, ModernBert"):
        data = EvaluationData(Dataset.from_list(ROWS), None, [], {})
        prepare_scoring(evaluated, data, "auto", batch_size=2, name="base")


def test_a_comparison_leaves_no_trace() -> None:
    model = build("qwen3", FAMILIES["qwen3"])
    run = scored(model)
    model.train()
    model.model.embed_tokens.eval()
    state = torch.get_rng_state()
    choice = choose_layout("packed", model, RowLengths.of(ROWS))
    refuse_other_scores(run, RowLengths.of(ROWS))
    assert confirmed(choice, [run], RowLengths.of(ROWS)) == choice
    assert model.training and not model.model.embed_tokens.training
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_half_precision_one_token_in_a_hundred_may_be_off_by_more() -> None:
    exact, other = torch.zeros(200), torch.zeros(200)
    other[:2] = 0.5
    assert disagreement(exact, other, "bfloat16") == 0.0
    assert disagreement(exact, other, "float32") == 0.5
    other[2:5] = 0.4
    assert disagreement(exact, other, "bfloat16") == pytest.approx(0.4)
    other[7] = float("nan")
    assert not disagreement(exact, other, "bfloat16") <= 1e9


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "quantized"])
def test_of_fewer_than_a_hundred_tokens_every_one_counts(precision: str) -> None:
    for count in (1, 2, 12, 63, 99):
        exact, other = torch.zeros(count), torch.zeros(count)
        other[count // 2] = 7.0
        assert disagreement(exact, other, precision) == 7.0, count
    assert disagreement(torch.zeros(0), torch.zeros(0), precision) == 0.0


@pytest.mark.parametrize("rows", [[[5]], [[5], [7]], [[5], [7, 9, 11, 3]]], ids=str)
def test_a_row_of_one_token_has_no_log_prob_that_could_differ(rows: list[list[int]]) -> None:
    refuse_other_scores(scored(build("qwen3", FAMILIES["qwen3"])), RowLengths.of([{"input_ids": ids} for ids in rows]))


def test_rows_beyond_a_table_of_positions_are_refused_by_name() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    refuse_other_scores(scored(model), RowLengths.of([{"input_ids": list(range(16))}]))
    with pytest.raises(ModelError, match="a table of 16 positions and the longest row 17 tokens. Write max_length: 16"):
        refuse_other_scores(scored(model), RowLengths.of([{"input_ids": list(range(17))}]))


# --- rows beside one another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROPES)
def test_a_position_encoding_that_changes_with_the_longest_row_is_refused(kind: str, make_trainer: Any) -> None:
    model = rope_model(kind)
    short, long = ROWS[0], ROWS[1]
    alone = own_logps(model, short, 0)
    batch = torch.zeros(2, 38, dtype=torch.long)
    for b, row in enumerate((short, long)):
        ids = row["prompt_ids"] + row["completion_ids"][0]
        batch[b, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        beside = model(input_ids=batch, attention_mask=(batch > 0).long()).logits[0, 8:13].log_softmax(-1)
    assert (beside[range(5), short["completion_ids"][0]] - alone).abs().max() > 0.01, "the rows depend on each other"
    with pytest.raises(ModelError, match=r"longer than 20 tokens.*Write max_length: 20"):
        make_trainer(model=rope_model(kind), ref_model=rope_model(kind), train_dataset=Dataset.from_list(ROWS))
    # What no rule knows by name is seen by running it.
    with pytest.raises(ModelError, match="a row beside a longer one differs"):
        refuse_other_scores(scored(rope_model(kind)), RowLengths.of(ROWS))
    short_rows = Dataset.from_list([ROWS[0], ROWS[3]])
    make_trainer(model=rope_model(kind), ref_model=rope_model(kind), train_dataset=short_rows)


def test_rows_that_stand_alone_or_are_all_long_may_be_run_under_longrope() -> None:
    model = rope_model("longrope")
    all_long = RowLengths.of(random_rows([(30, (8, 4)), (40, (3, 9))]))
    mixed, straddling = RowLengths.of(ROWS[:2]), RowLengths.of(random_rows([(15, (3, 9))]))
    assert length_dependence(model, all_long, together=True) is None
    assert length_dependence(model, mixed, together=False) is None
    assert length_dependence(model, mixed, together=True) is not None
    assert length_dependence(model, straddling, together=False) is not None
    stream = RowLengths.of(iter(ROWS[:1]), max_length=64)
    assert "up to 64" in str(length_dependence(model, stream, together=False)), "rows to come are not known"
    assert length_dependence(rope_model("dynamic"), mixed, together=False) is not None, "it remembers longer rows"


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precompute", [False, True])
def test_the_layout_is_that_of_every_model_that_is_run(make_trainer: Any, tmp_path: Path, precompute: bool) -> None:
    reference, other = build("mistral", FAMILIES["mistral"]), build("mistral", FAMILIES["mistral"])
    reference.config.attention_chunk_size = 8
    arguments = {"precompute_ref_log_probs": precompute, "max_steps": 1}
    rows = Dataset.from_list(ROWS)
    settings = BridgeSettings(reference_cache=tmp_path / "cache")
    trainer = make_trainer(ref_model=reference, settings=settings, arguments=arguments, train_dataset=rows)
    assert trainer.layout.layout == "padded" and "the reference: the attention chunk size" in trainer.layout.reason
    inputs = trainer.data_collator(list(trainer.train_dataset))
    found = inputs["ref_token_logps"] if precompute else trainer.reference.token_logps(inputs)
    for b, row in enumerate(ROWS):
        for k in (0, 1):
            assert float(found[b, k].sum()) == pytest.approx(float(own_logps(other, row, k).sum()), abs=1e-4)


def test_a_window_that_no_rule_knows_is_seen_on_the_longest_row() -> None:
    """A layer that looks at the last 16 tokens: a packed row of sixteen tokens would not have shown it."""
    model = with_window(build("qwen3", FAMILIES["qwen3"], "eager"), 16)
    run, lengths = scored(model), RowLengths.of(ROWS)
    choice = confirmed(choose_layout("auto", model, lengths), [run], lengths)
    assert choice.layout == "padded" and "the layouts differ by" in choice.reason
    for name, size in (("window_size", 16), ("keep_window_size", 16)):
        named = build("qwen3", FAMILIES["qwen3"])
        setattr(named.config, name, size)
        found = choose_layout("auto", named, lengths)
        assert found.layout == "padded" and "window size of 16 tokens" in found.reason


def test_the_longest_row_counts_wherever_it_is() -> None:
    """A window that only one sequence outgrows, in a row that is not the longest when it is packed."""
    model = with_window(build("qwen3", FAMILIES["qwen3"], "eager"), 64)
    short = random_rows([(20, (30, 30, 30))] * (SAMPLED_ROWS + 10))
    rows = [*short, *random_rows([(64, (15,))])]
    run = scored(model)
    for found, layout in ((RowLengths.of(short), "packed"), (RowLengths.of(rows), "padded")):
        assert confirmed(choose_layout("auto", model, found), [run], found).layout == layout


def test_what_cannot_run_packed_rows_is_padded_and_says_why(make_trainer: Any) -> None:
    alibi = PLAIN | {"alibi": True, "multi_query": False, "new_decoder_architecture": False}
    model = tiny("falcon", alibi)
    trainer = make_trainer(
        model=model, train_dataset=Dataset.from_list(ROWS), peft_config=None, ref_model=tiny("falcon", alibi)
    )
    assert trainer.layout.layout == "padded"
    assert "FalconForCausalLM cannot run packed rows (ModelError: its attention, " in trainer.layout.reason
    with pytest.raises(ModelError, match=r"layout: packed cannot be used: the policy, Falcon.*cannot run"):
        make_trainer(
            model=model,
            ref_model=tiny("falcon", alibi),
            settings=BridgeSettings("packed"),
            train_dataset=Dataset.from_list(ROWS),
        )


def test_adapters_with_virtual_tokens_are_seen_before_they_are_there(make_trainer: Any) -> None:
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = make_trainer(peft_config=adapter)
    assert trainer.layout.layout == "padded" and "virtual tokens" in trainer.layout.reason


# --- packing and lengths ---------------------------------------------------------------------------------------------


def test_packing_that_sdpa_cannot_do_is_not_sent_to_sdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_supervised, "packing_difference", lambda model, rows: 1.0)
    with pytest.raises(ModelError, match=r"attn_implementation: sdpa rows .*see each other\. Write packing: false"):
        make(tmp_path, token_rows(completions(16)), packing=True, max_length=256)


def test_lengths_are_those_of_every_row_however_it_is_held() -> None:
    held = [RowLengths.of(ROWS), RowLengths.of(Dataset.from_list(ROWS)), RowLengths.of(ROWS[:1], ROWS[1:])]
    for lengths in held:
        assert lengths.shortest.tolist() == [12, 34, 15, 9]
        assert lengths.longest.tolist() == [14, 38, 20, 9]
        assert (lengths.packed, lengths.bound, lengths.is_complete) == (41, 38, True)
        assert lengths.longest_row["completion_ids"] == ROWS[1]["completion_ids"]
        assert lengths.short_sequence["completion_ids"] == [ROWS[3]["completion_ids"][0]]
        assert lengths.long_sequence["completion_ids"] == [ROWS[1]["completion_ids"][0]]
    flat = Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    assert RowLengths.of(flat).longest.tolist() == [3, 2]
    assert RowLengths.of(flat).longest_row["completion_ids"] == [[2, 3]]
    stream = RowLengths.of(iter(ROWS * SAMPLED_ROWS), max_length=90)
    assert (len(stream.longest), stream.bound, stream.is_complete) == (SAMPLED_ROWS, 90, False)
