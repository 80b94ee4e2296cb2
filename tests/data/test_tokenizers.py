"""What a tokenizer adds of its own to plain text: a BOS stays, an EOS is neither doubled nor put behind a prompt."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.contrast import ContrastPrompts
from alignkit.data.report import data_report
from alignkit.data.supervised import prompts_of, to_supervised_rows
from tests.data.rows import pair

EOS, BOS = "<|endoftext|>", "<|system|>"


@pytest.fixture(params=[f"$A {EOS}", f"{BOS} $A {EOS}"], ids=["eos", "bos and eos"])
def ending(request: Any, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that puts EOS behind every text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = [(token, backend.token_to_id(token)) for token in (EOS, BOS)]
    backend.post_processor = TemplateProcessing(single=request.param, special_tokens=special)
    bos = {"bos_token": BOS} if BOS in request.param else {}
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token="<|pad|>", **bos)
    assert ending("a")["input_ids"][-1] == ending.eos_token_id
    return ending


def expected_ids(text: str, tokenizer: Any) -> list[int]:
    """The text as it stands, behind BOS where the tokenizer has one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_completion_ends_in_one_eos_and_a_prompt_in_none(ending: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([pair("What is 2 + 2?", " 4", f" 5{EOS}")])
    rows, report = to_candidate_rows(dataset, ending, max_length=None, num_candidates=2)
    assert rows[0]["prompt_ids"] == expected_ids("What is 2 + 2?", ending)
    assert [ending.decode(ids) for ids in rows[0]["completion_ids"]] == [f" 4{EOS}", f" 5{EOS}"]
    assert {check.status for check in data_report({"train": (rows, report)}, ending).checks["train"]} == {"ok"}


@pytest.mark.parametrize("row", [{"prompt": "2 + 2 =", "completion": " 4"}, {"text": "2 + 2 = 4"}], ids=str)
def test_a_supervised_row_ends_in_one_eos(ending: PreTrainedTokenizerFast, row: dict[str, str]) -> None:
    rows, report = to_supervised_rows(Dataset.from_list([row]), ending, max_length=None)
    assert rows[0]["input_ids"] == expected_ids(f"2 + 2 = 4{EOS}", ending)
    assert {check.status for check in data_report({"train": (rows, report)}, ending).checks["train"]} == {"ok"}


def test_prompts_to_answer_are_open(ending: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completion": " 4"}])
    assert prompts_of(dataset, ending, 1) == [tuple(expected_ids("2 + 2 =", ending))]


def test_contrast_prompts_are_open(ending: PreTrainedTokenizerFast) -> None:
    contrast = ContrastPrompts("{prompt} good", "{prompt} bad", include_response=False, plain_text_ending=":")
    rows, _ = to_candidate_rows(
        Dataset.from_list([pair("q")]), ending, max_length=None, num_candidates=2, contrast=contrast
    )
    assert rows[0]["better_prompt_ids"][0] == expected_ids("q good:", ending)
