"""A tokenizer with more tokens than its model has embeddings: refused where one of them is used, in every program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from alignkit.data.supervised_tokens import TOKEN_FEATURES
from alignkit.data.tokenization import CANDIDATE_FEATURES
from alignkit.errors import ModelError
from alignkit.models.vocabulary import check_token_ids, num_embeddings
from tests.scripts.conftest import Script
from tests.scripts.tiny import byte_tokenizer, save_adapter, save_model, tiny_model, write_rows

SIZE = 260
ROW = {"prompt": "Say it: ", "chosen": "<|new|>", "rejected": "no"}


def larger_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    assert tokenizer.add_tokens(["<|new|>", "<|other|>"]) == 2 and len(tokenizer) == SIZE + 2
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with too large a tokenizer, an adapter on it, and rows that use a token too many, or do not."""
    root = tmp_path_factory.mktemp("vocabulary")
    save_model(root / "model")
    save_adapter(root / "model", root / "adapter")
    larger_tokenizer().save_pretrained(root / "model")
    write_rows(root / "used.jsonl", [ROW, {**ROW, "prompt": "<|new|> "}])
    write_rows(root / "unused.jsonl", [{**ROW, "chosen": "yes"}])
    return root


def rows_of(ids: list[int]) -> Dataset:
    return Dataset.from_list([{"input_ids": [1], "labels": [1]}, {"input_ids": ids, "labels": ids}], TOKEN_FEATURES)


@pytest.mark.parametrize("kind", ["plain", "LoRA on the embeddings", "embeddings trained in full"])
def test_refused_where_the_model_itself_fails(kind: str) -> None:
    model = tiny_model()
    if kind != "plain":
        how = {"target_modules": ["embed_tokens"]} if "LoRA" in kind else {"modules_to_save": ["embed_tokens"]}
        targets = {"target_modules": ["q_proj"]} | how
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **targets))
    assert num_embeddings(model) == SIZE
    tokenizer = larger_tokenizer()
    for ids in ([5, SIZE - 1], [5, SIZE], [SIZE + 1, 5]):
        with torch.no_grad():
            works = True
            try:
                model(input_ids=torch.tensor([ids]))
            except IndexError:
                works = False
        for rows in (rows_of(ids), [[1], ids]):
            if works:
                check_token_ids(model, tokenizer, {"a row": rows}, name="it")
                continue
            with pytest.raises(ModelError, match=rf"a row uses '<\|\w+\|>' \(id {max(ids)}\)"):
                check_token_ids(model, tokenizer, {"a row": rows}, name="it")


def test_padding_candidates_and_streams() -> None:
    model, tokenizer = tiny_model(), larger_tokenizer()
    row = {"prompt_ids": [1], "completion_ids": [[1, 2], [3, SIZE]], "scores": [1.0, 0.0]}
    candidates = Dataset.from_list([row], CANDIDATE_FEATURES)
    with pytest.raises(ModelError, match="a row uses '<|new|>'"):
        check_token_ids(model, tokenizer, {"a row": candidates}, name="it")
    with pytest.raises(ModelError, match="Write streaming: false"):
        check_token_ids(model, tokenizer, {"a row": rows_of([1]).to_iterable_dataset()}, name="it")
    check_token_ids(model, byte_tokenizer(), {"a row": rows_of([1]).to_iterable_dataset()}, name="it")
    tokenizer.pad_token = "<|other|>"
    with pytest.raises(ModelError, match=r"padding uses '<\|other\|>' .*tokenizer.pad_token = tokenizer.eos_token"):
        check_token_ids(model, tokenizer, {"a row": rows_of([1])}, name="it")
    check_token_ids(model, tokenizer, {"a row": rows_of([1])}, name="it", pads=False)


def test_every_script_says_it_once(
    run_script: Script, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, used = ("--model", place / "model"), ("--data", place / "used.jsonl")
    scripts = {
        "evaluate": (*model, *used, "--use_cpu"),
        "token_rewards": (*model, *used, "--use_cpu", "--output", tmp_path / "rewards.jsonl"),
        "sample_candidates": (*model, *used, "--use_cpu", "--output", tmp_path / "samples.jsonl"),
        "merge_adapter": ("--adapter", place / "adapter", *used, "--output", tmp_path / "merged"),
    }
    for name, words in scripts.items():
        assert run_script(name, *words) == 2, name
        errors = capsys.readouterr().err
        assert errors.count("error: ") == 1 and "uses '<|new|>' (id 260)" in errors, errors
        assert "resize_token_embeddings" in errors
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")) == []


def test_tokens_that_no_row_uses_do_no_harm(run_script: Script, place: Path, tmp_path: Path) -> None:
    words = ("--model", place / "model", "--data", place / "unused.jsonl", "--use_cpu", "--max_new_tokens", "2")
    assert run_script("evaluate", *words, "--output", tmp_path / "found.json") == 0
    assert json.loads((tmp_path / "found.json").read_text())["data"]["held-out"]["rows"] == 1
