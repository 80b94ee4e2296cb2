"""Rows as others write them: refused with advice that leads to something that works, or read as what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from alignkit.data import formats
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.columns import RowFamily
from alignkit.data.load import load_rows
from alignkit.data.negative_schema import negative_rows
from alignkit.data.recognition import said_formats
from alignkit.data.schema import preference_rows
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.errors import DataError
from alignkit.parts.catalogue import KINDS
from alignkit.parts.data_format import format_names
from tests.data.rows import message, pair

Write = Callable[[str, Sequence[Any]], str]

FAMILIES = {
    "preference": (preference_rows(), pair()),
    "supervised": (supervised_rows(), {"prompt": "q", "completion": "a"}),
    "negatives": (negative_rows(), {"prompt": "q", "rejected": "a"}),
}
KTO = [{"prompt": "q", "completion": "good", "label": True}, {"prompt": "q", "completion": "bad", "label": False}]


def refusal(path: str, family: RowFamily, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        load_rows(path, family=family, **options)
    return str(refused.value)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("column", ["image", "images", "audio"])
def test_columns_of_pictures_and_sound_are_refused(write_jsonl: Write, name: str, column: str) -> None:
    family, row = FAMILIES[name]
    assert len(load_rows(write_jsonl("text.jsonl", [row]), family=family)) == 1
    text = refusal(write_jsonl("seen.jsonl", [{**row, column: "a.png"}]), family)
    assert f"column {column!r}" in text and "would train these rows without what the column holds" in text


def test_parts_of_a_message_that_are_not_text_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    def row(kind: str) -> dict[str, Any]:
        content = [{"type": "text", "text": "What is it?"}, {"type": kind, kind: "a.png"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [content[0]]}]}

    with pytest.raises(DataError, match=r"content that is not text \(image_url\).*alignkit trains on text alone"):
        to_supervised_rows(Dataset.from_list([row("image_url")]), tokenizer, max_length=None)


def test_unpaired_rows_are_led_to_kto_and_to_lists(write_jsonl: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    text = refusal(write_jsonl("kto.jsonl", KTO), preference_rows(2))
    assert "unpaired: write method: kto" in text and "prompt, completions and scores" in text
    assert "Did you mean" not in text
    # What the advice says, done:
    lists = [{"prompt": "q", "completions": ["good", "bad"], "scores": [1, 0]}]
    rows, _ = to_candidate_rows(
        load_rows(write_jsonl("lists.jsonl", lists)), tokenizer, max_length=None, num_candidates=2
    )
    assert tokenizer.decode(rows[0]["completion_ids"][0]) == "good<|endoftext|>"
    good = [{"prompt": row["prompt"], "completion": row["completion"]} for row in KTO if row["label"]]
    assert len(load_rows(write_jsonl("good.jsonl", good), family=supervised_rows())) == 1
    bad = [{"prompt": row["prompt"], "rejected": row["completion"]} for row in KTO if not row["label"]]
    assert len(load_rows(write_jsonl("bad.jsonl", bad), family=negative_rows())) == 1


def test_unpaired_rows_are_not_trained_as_if_all_were_good(write_jsonl: Write) -> None:
    text = refusal(write_jsonl("kto.jsonl", KTO), supervised_rows())
    assert "column 'label'" in text and "rows that it calls bad would be trained" in text


@pytest.mark.parametrize("family", [preference_rows(), supervised_rows()], ids=["preference", "supervised"])
def test_tokenised_rows_are_named_as_such(write_jsonl: Write, family: RowFamily) -> None:
    row = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}
    text = refusal(write_jsonl("ids.jsonl", [row]), family)
    assert "tokenised already" in text and "Give the rows as text or messages" in text and "Did you mean" not in text


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


TURNS = [
    turn("system", "Be brief."),
    turn("human", "2 + 2?"),
    turn("gpt", "4"),
    turn("human", "Sure?"),
    turn("gpt", "Yes"),
]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
TALK = [message(ROLES[one["from"]], one["value"]) for one in TURNS]


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("stored", [False, True], ids=["json", "text"])
def test_sharegpt_conversations_are_read_as_messages(
    write_jsonl: Write, tokenizer: PreTrainedTokenizerFast, streaming: bool, stored: bool
) -> None:
    path = write_jsonl("talks.jsonl", [{"conversations": json.dumps(TURNS) if stored else TURNS}] * 2)
    mapped = load_rows(path, family=supervised_rows(), column_map={"messages": "conversations"}, streaming=streaming)
    loaded = load_rows(path, family=supervised_rows(), streaming=streaming)
    assert list(loaded) == list(mapped) == [{"messages": TALK}] * 2
    assert said_formats(loaded) == (f"sharegpt (conversations): {path}",)
    assert said_formats(mapped) == (f"sharegpt (messages): {path}",)
    rows, _ = to_supervised_rows(loaded, tokenizer, max_length=None)
    assert next(iter(rows))["input_ids"] == list(tokenizer.apply_chat_template(TALK, return_dict=False))


def test_sharegpt_pairs(write_jsonl: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"conversations": TURNS[:2], "chosen": TURNS[2], "rejected": turn("gpt", "5")}
    path = write_jsonl("pairs.jsonl", [row])
    mapped = load_rows(path, family=preference_rows(2), column_map={"prompt": "conversations"})
    loaded = load_rows(path, family=preference_rows(2))
    assert loaded[0] == mapped[0] == {"prompt": TALK[:2], "chosen": [TALK[2]], "rejected": [message("assistant", "5")]}
    rows, _ = to_candidate_rows(loaded, tokenizer, max_length=None, num_candidates=2)
    assert tokenizer.decode(rows[0]["completion_ids"][1]) == "5<|endoftext|>"


def test_a_speaker_of_whom_it_is_not_clear_who_that_is(write_jsonl: Write) -> None:
    path = write_jsonl(
        "tools.jsonl", [{"messages": TURNS}, {"messages": [turn("human", "q"), turn("function_call", "{}")]}]
    )
    text = refusal(path, supervised_rows())
    assert "row 1: messages has a turn that is from 'function_call'" in text and "{role, content}" in text


SPARE = """
from alignkit.parts.data_format import DataFormat

FORMAT = DataFormat(
    name="spare",
    summary="Questions and answers in turn, separated by bars.",
    holds=lambda values: all(isinstance(value, str) and "|" in value for value in values),
    messages=lambda value, index, column, name: [
        {"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(value.split("|"))
    ],
)
"""


def test_a_data_format_is_added_by_a_file(write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "spare.py").write_text(SPARE)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(folder)])
    assert {"sharegpt", "spare"} <= set(format_names())
    assert "separated by bars" in next(kind for kind in KINDS if kind.title == "data formats").summaries()["spare"]
    path = write_jsonl("bars.jsonl", [{"messages": "q|a"}, {"messages": "why|so|then|thus"}])
    loaded = load_rows(path, family=supervised_rows())
    assert loaded[0]["messages"] == [message("user", "q"), message("assistant", "a")]
    assert [turn["role"] for turn in loaded[1]["messages"]] == ["user", "assistant"] * 2
