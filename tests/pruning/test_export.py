"""What an export leaves on disk: a model that stock code loads whole, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import alignkit.pruning.export as module
from alignkit.errors import ModelError
from alignkit.models.export import TOLERANCES
from alignkit.pruning.export import export
from alignkit.pruning.plan import PLAN_FILE, PruningPlan
from alignkit.pruning.slicing import pruned_model
from tests.pruning.tiny_families import (
    ALL,
    AXES,
    CASES,
    HEAD_DIM,
    WORDS,
    difference,
    folds_of,
    logits,
    masked_logits,
    model,
    token_ids,
)

TEXTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7]]


def tokenizer(kind: type = PreTrainedTokenizerFast, shift: int = 0) -> Any:
    """One token a word, as many as the models have."""
    words = {str(word): (word + shift) % WORDS for word in range(WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return kind(tokenizer_object=backend, unk_token="0", eos_token="1")


class SavedAsAnother(PreTrainedTokenizerFast):
    """What comes back from disk has the same words under other numbers."""

    def save_pretrained(self, folder: Any, **options: Any) -> Any:
        """Write the other one."""
        return tokenizer(shift=1).save_pretrained(folder, **options)


@pytest.mark.parametrize("case", CASES)
def test_stock_code_loads_what_is_saved_whole(case: str, tmp_path: Path) -> None:
    """No weight missing, unexpected or of another shape; the same answers, and the config says all sizes."""
    dense = model(case)
    folds = folds_of(dense)
    pruned_model(dense, ALL, folds=folds).save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert difference(logits(loaded), masked_logits(dense, ALL, folds)) <= 1e-4
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (24, HEAD_DIM, 2)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, not_cached = (loaded.generate(token_ids(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, not_cached)


def test_an_export_is_verified_in_a_fresh_process(tmp_path: Path) -> None:
    """Rounded once, loaded by stock transformers alone; the report says what was, what is, and how far they are."""
    model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    # A temperature for nothing, as published models have it; transformers saves that only as it was loaded.
    (tmp_path / "dense" / "generation_config.json").write_text('{"temperature": 0.3}')
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").train()
    output = tmp_path / "models" / "small"
    report = export(dense, ALL, output, tokenizer=tokenizer(), texts=TEXTS, folds=folds_of(dense), dtype="bfloat16")
    assert dense.training
    assert [path.name for path in output.parent.iterdir()] == ["small"]
    assert PruningPlan.load(output) == ALL
    assert AutoTokenizer.from_pretrained(output)("3 4")["input_ids"] == [3, 4]
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert (loaded.dtype, loaded.generation_config.temperature) == (torch.bfloat16, 0.3)
    assert (report.model_type, report.is_tied, report.plan) == ("llama", False, ALL.digest())
    assert (report.dense.axes.hidden, report.pruned.axes.hidden) == (32, 24)
    assert (report.dense.axes.kv_groups, report.pruned.axes.heads) == (2, 2)
    assert report.pruned.parameters == sum(p.numel() for p in loaded.parameters()) == report.verification.parameters
    assert report.pruned.bytes == (output / "model.safetensors").stat().st_size
    assert report.dense.bytes == 2 * sum(p.numel() for p in dense.parameters())
    assert report.exact.max_abs < 1e-4 < report.verification.max_error < TOLERANCES["bfloat16"]
    assert f"two matrices now, {WORDS * 24:,} numbers more" in report.notes[0]
    assert "written as a llama" in report.notes[1]
    assert json.loads(json.dumps(report.to_json()))["verification"]["parameters"] == report.pruned.parameters


def test_what_other_programs_get_wrong_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that assumes a pattern of windows when layers are gone, or one matrix where there are two."""
    monkeypatch.setattr(module, "verify", lambda draft, *_: _Verified(bytes=1))
    options: dict[str, Any] = {"tokenizer": tokenizer(), "texts": TEXTS}
    tied = model("gemma2", tie_word_embeddings=True)
    assert export(tied, AXES["hidden"], tmp_path / "narrower", **options).notes == ()
    assert "layer_types" in export(tied, AXES["layers"], tmp_path / "shorter", **options).notes[0]
    assert "as its head too" in export(model("gemma2"), AXES["ffn"], tmp_path / "untied", **options).notes[0]


class _Verified:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_nothing_is_left_of_an_export_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fresh process, or before; an empty folder that was there stays."""

    def refuse(draft: Path, *_: Any) -> None:
        assert (draft / "model.safetensors").is_file()
        raise ModelError("is not the masked model")

    output = tmp_path / "small"
    output.mkdir()
    dense, options = model("llama"), {"tokenizer": tokenizer(), "texts": TEXTS}
    monkeypatch.setattr(module, "verify", refuse)
    with pytest.raises(ModelError, match="is not the masked model"):
        export(dense, ALL, output, **options)
    assert [path.name for path in tmp_path.rglob("*")] == ["small"]

    monkeypatch.setattr(
        module, "pruned_model", lambda *_, **__: pruned_model(dense, PruningPlan(hidden=tuple(range(24))))
    )
    with pytest.raises(ModelError, match=r"differs from the masked one by up to .* before any rounding"):
        export(dense, AXES["hidden"], output, **options)
    monkeypatch.undo()
    with pytest.raises(
        ModelError, match="the tokenizer, loaded beside the pruned model, cuts '1 2 3 4 5 6 7' otherwise"
    ):
        export(dense, ALL, output, **options | {"tokenizer": tokenizer(SavedAsAnother)})
    assert [path.name for path in tmp_path.rglob("*")] == ["small"]
    (output / PLAN_FILE).write_text("{}")
    with pytest.raises(ModelError, match="is not empty"):
        export(dense, ALL, output, **options)
    assert (output / PLAN_FILE).read_text() == "{}"


def test_what_cannot_be_exported_is_told_at_once(tmp_path: Path) -> None:
    """A model that was rounded before, and tokens that it does not have."""
    with pytest.raises(ModelError, match=r"weights in torch.bfloat16: load it in float32"):
        export(model("llama").bfloat16(), ALL, tmp_path / "small", tokenizer=tokenizer(), texts=TEXTS)
    larger = tokenizer()
    larger.add_tokens(["more"])
    with pytest.raises(ModelError, match="beyond the model"):
        export(model("llama"), ALL, tmp_path / "small", tokenizer=larger, texts=[[1, WORDS]])
    assert not any(tmp_path.iterdir())
