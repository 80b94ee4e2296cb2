"""What programs report of a model is what its own logits say, whichever layout and attention it is run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignkit.evals import _trial
from alignkit.models._segments import OWN
from tests.scripts.conftest import Script
from tests.scripts.tiny import byte_tokenizer, save_model, write_rows

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
MODERNBERT = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"} | {
    "local_attention": 128, "global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 1,
}  # fmt: skip


def save(folder: Path, family: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A model of a family with large weights, saved with the tokenizer of bytes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def with_window(folder: Path, size: int) -> PreTrainedModel:
    """A model in which a token sees ``size`` tokens."""
    return save(folder, "mistral", SHAPE | {"sliding_window": size})


def pairs(count: int, prompt_length: int) -> list[dict[str, str]]:
    """Answers so short beside their prompts that packed rows cost less."""
    return [{"prompt": f"{i:>{prompt_length}}", "chosen": f"{i % 7}", "rejected": f"{i % 5}!"} for i in range(count)]


@torch.no_grad()
def chosen_logps(model: PreTrainedModel, rows: list[dict[str, str]]) -> float:
    """Mean log-prob of the chosen answers, from the logits of each sequence alone."""
    tokenizer, total = byte_tokenizer(), 0.0
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(row["prompt"] + row["chosen"] + "<|end|>")["input_ids"]])
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        total += float(logps[start - 1 :].sum())
    return total / len(rows)


@pytest.fixture
def evaluated(run_script: Script, tmp_path: Path) -> Any:
    """A call of scripts/evaluate.py; returns what it wrote."""

    def run(*words: str | Path) -> dict[str, Any]:
        output = tmp_path / "evaluation.json"
        assert run_script("evaluate", *words, "--num_samples", "0", "--use_cpu", "--output", output) == 0
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    return run


def test_a_base_with_a_window_sees_the_same_tokens_in_packed_rows(evaluated: Any, tmp_path: Path) -> None:
    """Twelve tokens of its own sequence, not those that stand before a branch in the row."""
    rows = pairs(6, 40)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    base = with_window(tmp_path / "base", 12)
    save_model(tmp_path / "model")
    found = evaluated("--model", tmp_path / "model", "--compare_base", tmp_path / "base", "--data", data)
    assert found["base_metrics"]["logps/chosen"]["mean"] == pytest.approx(chosen_logps(base, rows), abs=1e-4)
    assert found["layout"] == found["base_layout"] == "packed"


def test_a_window_that_one_row_of_three_hundred_outgrows(evaluated: Any, tmp_path: Path) -> None:
    rows = [*pairs(299, 24), *pairs(1, 90)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = with_window(tmp_path / "model", 48)
    found = evaluated("--model", tmp_path / "model", "--batch_size", "64", "--data", data)
    assert found["layout"] == "packed"
    assert found["metrics"]["logps/chosen"]["mean"] == pytest.approx(chosen_logps(model, rows), abs=1e-4)


def test_packed_rows_are_evaluated_with_the_attention_of_training(
    evaluated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the base of an adapter as for the model."""
    save_model(tmp_path / "model")
    save_model(tmp_path / "base", seed=1)
    data = write_rows(tmp_path / "rows.jsonl", pairs(3, 40))
    seen, score = [], _trial.score_over_ranks

    def watched(model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append((options["layout"], model.config._attn_implementation))
        return score(model, *arguments, **options)

    monkeypatch.setattr(_trial, "score_over_ranks", watched)
    evaluated("--model", tmp_path / "model", "--compare_base", tmp_path / "base", "--data", data)
    assert seen == [("packed", OWN["sdpa"])] * 2


@pytest.mark.parametrize("program", ["evaluate", "token_rewards"])
def test_programs_refuse_a_head_that_the_fused_one_is_not(
    program: str, run_script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ModernBERT's decoder puts a layer between its backbone and the output embeddings."""
    save(tmp_path / "model", "modernbert-decoder", MODERNBERT)
    data, output = write_rows(tmp_path / "rows.jsonl", pairs(3, 20)), tmp_path / "output.jsonl"
    assert run_script(program, "--model", tmp_path / "model", "--data", data, "--use_cpu", "--output", output) == 2
    assert "those of the model's own logits" in capsys.readouterr().err and not output.exists()
