"""Token for token what trl.DPOTrainer trains on."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from tests.data.rows import forms, message, trl_rows

FORMS = ("standard", "standard_implicit", "conversational", "conversational_implicit")


def assert_equal_to_trl(dataset: Dataset, tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    ours, report = to_candidate_rows(
        dataset, tokenizer, max_length=max_length, num_candidates=2, max_dropped_fraction=0.99
    )
    theirs = trl_rows(dataset, tokenizer, max_length)
    assert [(row["prompt_ids"], row["completion_ids"]) for row in ours] == theirs
    assert report.num_rows == len(theirs) > 0
    assert all(row["scores"] == [1.0, 0.0] for row in ours)
    return list(ours)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_length", [None, 64, 40])
def test_same_tokens(tokenizer: PreTrainedTokenizerFast, form: str, max_length: int | None) -> None:
    assert_equal_to_trl(forms()[form], tokenizer, max_length)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_length", [None, 56, 40])
def test_same_tokens_with_another_tokenizer(
    gsm8k_tokenizer: PreTrainedTokenizerFast, form: str, max_length: int | None
) -> None:
    assert_equal_to_trl(forms()[form], gsm8k_tokenizer, max_length)


def test_truncation_was_exercised(tokenizer: PreTrainedTokenizerFast) -> None:
    _, report = to_candidate_rows(
        forms()["standard"], tokenizer, max_length=40, num_candidates=2, max_dropped_fraction=0.99
    )
    assert report.num_truncated_completions > 0
    assert report.dropped


def test_prompt_end_that_merges_with_the_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    # " apples" is one token of this vocabulary, so the space at the end of the prompt belongs to the completion.
    dataset = Dataset.from_dict({"prompt": ["Mia has "], "chosen": ["apples"], "rejected": ["books"]})
    (row,) = assert_equal_to_trl(dataset, tokenizer, None)
    assert tokenizer.decode(row["prompt_ids"]) == "Mia has"
    assert tokenizer.decode(row["completion_ids"][0]) == " apples<|endoftext|>"


def test_template_arguments_and_tools(tokenizer: PreTrainedTokenizerFast) -> None:
    template = (
        "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}{% if loud %}LOUD{% endif %}"
        + tokenizer.chat_template
    )
    with_template = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=template,
    )
    tools = '[{"type": "function", "function": {"name": "calculator"}}]'
    dataset = Dataset.from_dict(
        {
            "prompt": [[message("user", "2 + 2?")]] * 2,
            "chosen": [[message("assistant", "4")]] * 2,
            "rejected": [[message("assistant", "5")]] * 2,
            "tools": [tools, None],
            "chat_template_kwargs": [{"loud": True}, {"loud": False}],
        }
    )
    first, second = assert_equal_to_trl(dataset, with_template, None)
    assert with_template.decode(first["prompt_ids"]).startswith("calculatorLOUD<|user|>")
    assert with_template.decode(second["prompt_ids"]).startswith("<|user|>")


def test_template_that_renders_the_prompt_alone_differently(tokenizer: PreTrainedTokenizerFast) -> None:
    template = tokenizer.chat_template.replace(
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}",
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\nthink:' -}}",
    )
    assert template != tokenizer.chat_template
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=template,
    )
    assert_equal_to_trl(forms()["conversational"], other, 64)
    _, report = to_candidate_rows(forms()["conversational"], other, max_length=None, num_candidates=2)
    assert report.num_cut_prompts == report.num_rows_in
    assert report.cut_prompt_end == "think:"


@pytest.mark.parametrize("form", FORMS)
def test_tokenizer_that_adds_bos(tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 2)])
    with_bos = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|system|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=tokenizer.chat_template,
    )
    rows = assert_equal_to_trl(forms()[form], with_bos, 64)
    # Either the tokenizer or, for messages, the template writes the one at the beginning.
    assert all(row["prompt_ids"][0] == 2 and row["prompt_ids"][1] != 2 for row in rows)


def test_one_side_is_the_beginning_of_the_other(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict({"chosen": ["Q: why? A: yes"], "rejected": ["Q: why? A: yes, of course"]})
    assert_equal_to_trl(dataset, tokenizer, None)
