"""Tokenizers and files for the data tests; caches stay in the test's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from alignkit.data.synthetic import make_corpus, train_tokenizer
from tests.conftest import GSM8K


@pytest.fixture(autouse=True)
def _caches_in_the_test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, trained on the synthetic corpus."""
    return train_tokenizer(make_corpus(300, seed=0), vocab_size=320)


@pytest.fixture(scope="session")
def gsm8k_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on GSM8K solutions, so another vocabulary, with a template that writes a newline after EOS."""
    questions = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer([[{"role": "user", "content": q["ground_truth"]}] for q in questions], vocab_size=600)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- endgeneration -%}", "{%- endgeneration -%}{{- '\\n' -}}"
    )
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[Any]], str]:
    """Write rows, or lines of text as they are, to a file in the test's folder and return its path."""

    def write(name: str, rows: Sequence[Any]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
