"""New tokens: one id each, an embedding that begins as the mean and is learnt, saved and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit import train_preference, train_sft
from alignkit.errors import ModelError
from alignkit.models.export import merge_adapter
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource, load_adapter
from alignkit.parametrizations._policy import load_model
from alignkit.shapes.candidates import PreferenceConfig
from alignkit.shapes.tokens import SupervisedConfig
from tests.programs.conftest import WORDS, pairs, save_model, write_rows

NEW = ["<think>", "</think>"]
FIRST = len(WORDS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "chosen": f"<think> {row['chosen']} </think>"} for row in pairs(8)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    return tmp_path


def keys(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": "model",
        "data": "rows.jsonl",
        "method": "sft",
        "output_dir": "run",
        "use_cpu": True,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_samples": 0,
        "save_strategy": "no",
        "new_tokens": NEW,
    }
    return config | changes


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return found


@pytest.mark.parametrize(
    ("parametrization", "tied", "spare"), [("full", True, 0), ("lora", True, 0), ("lora", False, 0), ("lora", False, 5)]
)
def test_they_are_learnt_saved_and_merged(
    parametrization: str, tied: bool, spare: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(place / "model", tie_word_embeddings=tied, vocab_size=FIRST + spare)
    trainer = train_sft(SupervisedConfig(**keys(parametrization=parametrization)))
    assert "no training row holds" not in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(place / "run")
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in NEW] == [[FIRST], [FIRST + 1]]
    assert tokenizer("w5<think>w6")["input_ids"] == [8, FIRST, 9]

    old = AutoModelForCausalLM.from_pretrained(place / "model")
    size = max(FIRST + spare, FIRST + len(NEW))
    ids = [8, FIRST, 9, FIRST + 1, 1]
    tuned = logits(trainer.model, ids)
    assert tuned.shape == (5, size)
    # By hand: the base with rows that are the mean of the others, which is where training began.
    old.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for weight in {id(w): w for w in (old.model.embed_tokens.weight, old.lm_head.weight)}.values():
            weight[FIRST : FIRST + 2] = weight[:FIRST].mean(0)
    begun = logits(old, ids)
    assert float((tuned - begun).abs().max()) > 0.05 and not torch.allclose(tuned[:, FIRST], begun[:, FIRST])
    if parametrization == "full":
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(place / "run"), ids), tuned, atol=1e-5)
        return
    with trainer.model.disable_adapter():
        assert torch.allclose(logits(trainer.model, ids), begun, atol=1e-5), "the reference is where training began"
    adapter = read_adapter("run")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(place / "model"), adapter)
    assert torch.allclose(logits(loaded, ids), tuned, atol=1e-5)
    merge_adapter(adapter, ModelSource("model"), place / "merged", tokenizer=tokenizer, prompts=[ids])
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(place / "merged"), ids), tuned, atol=1e-4)


@pytest.mark.parametrize("reference", ["copy", "precomputed"])
def test_every_kind_of_reference_begins_where_the_policy_does(
    reference: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(place / "model")
    how = {"method": "dpo", "data": "pairs.jsonl", "logging_steps": 1, "max_steps": 1, "parametrization": "full"}
    how["new_tokens"] = [*NEW, "<thnik>"]
    train_preference(PreferenceConfig(**keys(**how, reference=reference)))
    assert "`new_tokens`: no training row holds '<thnik>': nothing" in capsys.readouterr().err
    first = json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["logratio/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("new", [["w5"], ["<a>", "<a>"]])
def test_what_is_a_token_already_is_refused(new: list[str], place: Path) -> None:
    save_model(place / "model")
    with pytest.raises(ModelError, match=f"{new[-1]!r} is a token of 'model' already, or stands there twice"):
        load_model(SupervisedConfig(**keys(new_tokens=new)), "model")
