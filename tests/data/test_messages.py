"""Plain prompts and answers as messages: what is trained is what the chat template writes for those messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.checks import TEMPLATE_CHECK
from alignkit.data.load import load_rows
from alignkit.data.messages import as_messages, rows_as_messages
from alignkit.data.negatives import check_prompts, prompt_token_ids
from alignkit.data.report import DataReport, data_report
from alignkit.data.supervised import prompts_of, to_supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.errors import DataError
from alignkit.shapes.tokens import SupervisedConfig
from tests.data.rows import CHOSEN, QUESTIONS, REJECTED, message, pair

Write = Callable[[str, Sequence[Any]], str]
PAIRS = [pair(*row) for row in zip(QUESTIONS, CHOSEN, REJECTED, strict=True)]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
LISTS = [
    {"prompt": q, "completions": [a, b], "scores": [0, 1]} for q, a, b in zip(QUESTIONS, REJECTED, CHOSEN, strict=True)
]


def rendered(tokenizer: Any, prompt: str, answer: str | None = None) -> list[int]:
    """What the chat template writes, tokenised."""
    talk = [message("user", prompt)] + ([] if answer is None else [message("assistant", answer)])
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=answer is None, return_dict=False)
    return list(ids)


@pytest.mark.parametrize("rows", [PAIRS, LISTS], ids=["pairs", "lists"])
@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_preference_rows(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, rows: list[dict[str, Any]], streaming: bool
) -> None:
    loaded = load_rows(write_jsonl("rows.jsonl", rows), streaming=streaming)
    found, _ = to_candidate_rows(as_messages(loaded, tokenizer, "rows"), tokenizer, max_length=None, num_candidates=2)
    for row, given in zip(found, PAIRS, strict=True):
        assert row["prompt_ids"] == rendered(tokenizer, given["prompt"])
        for side, ids in zip(("chosen", "rejected"), row["completion_ids"], strict=True):
            assert row["prompt_ids"] + ids == rendered(tokenizer, given["prompt"], given[side])


def test_supervised_rows_and_the_prompts_of_their_report(tokenizer: PreTrainedTokenizerFast) -> None:
    talks = as_messages(Dataset.from_list(ANSWERS), tokenizer, "rows")
    found, _ = to_supervised_rows(talks, tokenizer, max_length=None, trained=TrainedTokens(assistant_only=True))
    for row, given in zip(found, ANSWERS, strict=True):
        whole = rendered(tokenizer, given["prompt"], given["completion"])
        start = len(rendered(tokenizer, given["prompt"]))
        assert row["input_ids"] == whole and row["labels"] == [-100] * start + whole[start:]
    assert list(prompts_of(talks, tokenizer, 1)[0]) == rendered(tokenizer, QUESTIONS[0])
    values = {"assistant_only_loss": True, "apply_chat_template": True}
    SupervisedConfig.row_family(values).detect(list(ANSWERS[0]), ANSWERS, name="rows")


def test_prompts_to_sample_for(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_as_messages([{"prompt": q, "rejected": "no", "id": 7} for q in QUESTIONS], tokenizer, "rows")
    assert rows[0] == {"prompt": [message("user", QUESTIONS[0])], "rejected": "no", "id": 7}
    kind = check_prompts(rows, name="rows")
    ids = prompt_token_ids(rows, tokenizer, kind, instruction=None, name="rows")
    assert ids == [rendered(tokenizer, question) for question in QUESTIONS]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "no column 'prompt'"),
        ({"chosen": "ab", "rejected": "ac"}, "no column 'prompt'"),
        ({"messages": [message("user", "a")]}, "are messages, to which the chat template is applied in any case"),
        (pair([message("user", "a")]), "are messages, to which the chat template is applied in any case"),
        (pair(None), "prompt is null"),
    ],
    ids=str,
)
def test_rows_that_cannot_become_messages(tokenizer: PreTrainedTokenizerFast, row: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        as_messages(Dataset.from_list([row]), tokenizer, "rows")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        as_messages(Dataset.from_list([pair()]), bare, "rows")


def report(rows: Sequence[Any], tokenizer: Any) -> DataReport:
    convert = to_supervised_rows if "chosen" not in rows[0] else to_candidate_rows
    options: Any = {"max_length": None} | ({"num_candidates": 2} if "chosen" in rows[0] else {})
    return data_report({"train": convert(Dataset.from_list(list(rows)), tokenizer, **options)}, tokenizer)


@pytest.mark.parametrize("rows", [PAIRS, ANSWERS, [{"text": "a b"}]], ids=["pairs", "answers", "text"])
def test_plain_text_beside_a_chat_template_is_said_loudly(tokenizer: PreTrainedTokenizerFast, rows: Any) -> None:
    found = report(rows, tokenizer)
    check = found.checks["train"][0]
    assert (check.name, check.status) == (TEMPLATE_CHECK, "warn") and "apply_chat_template: true" in check.message
    assert found.render().splitlines()[0].endswith("NO CHAT TEMPLATE IS APPLIED, see the checks")
    held_out = replace(found, checks={**found.checks, "held-out": found.checks["train"]})
    shown = held_out.render()
    assert "warn  chat template: not applied: the rows are plain text" in shown
    assert shown.count("not applied") == 1, "what holds for all rows of a form is said once"
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    quiet = report(rows, bare)
    assert quiet.checks["train"][0].status == "ok" and "TEMPLATE" not in quiet.render().splitlines()[0]


def test_a_transcript_becomes_the_turns_that_it_holds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    hh = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2 + 2?\n\nAssistant:"
    rows = [{"chosen": f"{hh} 4", "rejected": f"{hh} 5"}, {"chosen": f"{hh} four", "rejected": f"{hh} five"}]
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [message("user", "Hi"), message("assistant", "Yes?"), message("user", "2 + 2?")]
    for streaming in (False, True):
        plain = load_rows(str(path), streaming=streaming)
        assert next(iter(plain)) == {"prompt": hh, "chosen": " 4", "rejected": " 5"}
        found = list(as_messages(plain, tokenizer, "train"))
        assert found[0] == {"prompt": turns, "chosen": "4", "rejected": "5"}
        assert found[1] == {"prompt": turns, "chosen": "four", "rejected": "five"}
    mixed = [{"prompt": "What is a Human:?", "chosen": " a", "rejected": "b"}]
    assert list(as_messages(Dataset.from_list(mixed), tokenizer, "train")) == [
        {"prompt": [message("user", "What is a Human:?")], "chosen": " a", "rejected": "b"}
    ]
