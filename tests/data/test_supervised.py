"""Supervised rows: token for token what trl.SFTTrainer trains on, and what is said about rows that it could not."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from alignkit.data.load import load_rows, split_held_out
from alignkit.data.report import data_report
from alignkit.data.supervised import prompts_of, to_supervised_rows
from alignkit.data.supervised_report import CUT_AWAY, NOTHING_TRAINED
from alignkit.data.supervised_schema import supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.errors import DataError
from tests.data.rows import CHOSEN, QUESTIONS, message

ROWS = supervised_rows()


def forms() -> dict[str, Dataset]:
    """The same questions and answers in every form of supervised rows."""
    asked = [[message("system", "Be brief."), message("user", question)] for question in QUESTIONS]
    answered = [[message("assistant", text)] for text in CHOSEN]
    again = [[message("user", "Sure?"), message("assistant", "Yes.")]] * len(asked)
    talks = [a + b + c for a, b, c in zip(asked, answered, again, strict=True)]
    return {
        "text": Dataset.from_dict({"text": [q + a for q, a in zip(QUESTIONS, CHOSEN, strict=True)]}),
        "standard": Dataset.from_dict({"prompt": QUESTIONS, "completion": CHOSEN}),
        "conversational": Dataset.from_dict({"prompt": asked, "completion": answered}),
        "messages": Dataset.from_dict({"messages": talks}),
    }


def trl_rows(dataset: Dataset, tokenizer: Any, max_length: int | None, trained: TrainedTokens) -> list[Any]:
    """(input ids, labels) as TRL trains on them."""
    arguments = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start", dataset_text_field="text",
        assistant_only_loss=trained.assistant_only, shuffle_dataset=False,
    )  # fmt: skip
    only = "prompt" in dataset.column_names if trained.completion_only is None else trained.completion_only
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=only)
    prepared = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in prepared]


CASES = [
    ("text", TrainedTokens()),
    ("standard", TrainedTokens()),
    ("standard", TrainedTokens(completion_only=False)),
    ("conversational", TrainedTokens()),
    ("conversational", TrainedTokens(completion_only=False, assistant_only=True)),
    ("conversational", TrainedTokens(completion_only=True, assistant_only=True)),
    ("messages", TrainedTokens(assistant_only=False)),
    ("messages", TrainedTokens(assistant_only=True)),
]


@pytest.mark.parametrize("max_length", [None, 64, 40])
@pytest.mark.parametrize(("form", "trained"), CASES, ids=str)
def test_same_tokens_as_trl(
    tokenizer: PreTrainedTokenizerFast, form: str, trained: TrainedTokens, max_length: int | None
) -> None:
    rows, report = to_supervised_rows(
        forms()[form], tokenizer, max_length=max_length, trained=trained, max_dropped_fraction=0.99
    )
    theirs = trl_rows(forms()[form], tokenizer, max_length, trained)
    assert [(row["input_ids"], row["labels"]) for row in rows] == theirs
    assert report.num_rows == len(theirs) > 0
    assert report.num_tokens == sum(len(ids) for ids, _ in theirs)
    assert report.num_trained_tokens == sum(label != -100 for _, labels in theirs for label in labels[1:])
    if max_length == 40:
        assert report.num_truncated_rows + report.num_dropped > 0


def test_template_arguments_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    talkative = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{% if loud %}LOUD{% endif %}" + tokenizer.chat_template,
    )
    rows = [{"messages": [message("user", "2?"), message("assistant", "2")], "chat_template_kwargs": {"loud": True}}]
    for trained in (TrainedTokens(), TrainedTokens(assistant_only=True)):
        (row,), _ = to_supervised_rows(Dataset.from_list(rows), talkative, max_length=None, trained=trained)
        assert talkative.decode(row["input_ids"]).startswith("LOUD<|user|>")


def refusal(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        to_supervised_rows(Dataset.from_list(rows), tokenizer, **({"max_length": None} | options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "answer": "b"}, ("'prompt' is missing", "{prompt: question}", "{completion: answer}")),
        ({"prompt": "a", "respnse": "b"}, ("'completion' is missing", "Columns present: 'prompt', 'respnse'")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("write method: dpo", "column_map: {completion: chosen}")),
        ({"conversations": [message("user", "a")]}, ("column_map: {messages: conversations}",)),
        ({"content": "a"}, ("column_map: {text: content}",)),
        ({"text": ""}, ("text is empty",)),
        ({"text": None}, ("text is null",)),
        ({"text": 3}, ("text is int, expected text",)),
        ({"prompt": "a", "completion": " "}, ("completion is empty",)),
        ({"messages": "a"}, ("messages is str, expected a list of messages",)),
        ({"messages": []}, ("messages is empty",)),
        ({"messages": [{"from": "user", "value": "a"}]}, ("message without role",)),
        ({"messages": [message("user", "a"), message("assistant", "")]}, ("ends in an empty message",)),
        ({"prompt": [message("user", "a")], "completion": "b"}, ("completion is str, expected a list",)),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_rows_that_cannot_be_trained_on(tokenizer: Any, row: dict[str, Any], says: tuple[str, ...]) -> None:
    text = refusal([row], tokenizer)
    assert all(part in text for part in says), text


def test_what_shall_be_trained_must_be_there(tokenizer: Any) -> None:
    text, talk = {"text": "a"}, {"messages": [message("user", "a"), message("assistant", "b")]}
    only, assistant = TrainedTokens(completion_only=True), TrainedTokens(assistant_only=True)
    assert "completion_only_loss: true, but rows of text" in refusal([text], tokenizer, trained=only)
    assert "write assistant_only_loss: true" in refusal([talk], tokenizer, trained=only)
    assert "give messages" in refusal([text], tokenizer, trained=assistant)
    assert "no chat template" in refusal([talk], PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
    unmarked = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    message_ = refusal([talk], unmarked, trained=assistant)
    assert NOTHING_TRAINED in message_ and "{% generation %}" in message_ and "would do" not in message_


def test_rows_without_a_trained_token_left_are_counted_or_refused(tokenizer: Any) -> None:
    rows = [{"prompt": "1 2 3", "completion": " 4"}] * 9 + [{"prompt": "1 2 3 " * 20, "completion": " 4"}]
    kept, report = to_supervised_rows(Dataset.from_list(rows), tokenizer, max_length=16)
    assert report.dropped == {CUT_AWAY: 1} and len(kept) == 9
    text = refusal(rows, tokenizer, max_length=4)
    assert "10 of 10 rows are dropped" in text and "max_length is 4; 128 would do" in text
    assert "row: min" in text and "trained: min" in text


def test_a_stop_token_outside_the_marks_fails(tokenizer: Any) -> None:
    """The assistant's text is trained and its end is not: the model would never stop (USER_PAINS 3 and 4)."""
    template = tokenizer.chat_template.replace("message['content'] + eos_token", "message['content']").replace(
        "{%- endgeneration -%}", "{%- endgeneration -%}{{- eos_token -}}"
    )
    late = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", chat_template=template
    )
    rows = Dataset.from_list([{"messages": [message("user", "2?"), message("assistant", "4")]}] * 3)
    for asked, status in ((True, "fail"), (False, "ok"), (None, "ok")):
        trained = TrainedTokens(assistant_only=asked)
        converted = to_supervised_rows(rows, late, max_length=None, trained=trained)
        assert data_report({"train": converted}, late).checks["train"][1].status == status


def test_the_report_marks_trained_tokens(tokenizer: Any) -> None:
    rows, trained = forms()["messages"], TrainedTokens(assistant_only=True)
    converted = to_supervised_rows(rows, tokenizer, max_length=60, trained=trained, max_dropped_fraction=0.9)
    report = data_report({"train": converted}, tokenizer)
    text = report.render()
    assert text.startswith("messages\nrows")
    whole = to_supervised_rows(rows, tokenizer, max_length=None, trained=trained)
    assert "<|assistant|>\\n[[" in text and "[[Yes.<|endoftext|>]]" in data_report({"train": whole}, tokenizer).render()
    counts = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert counts["trained tokens"][2] == str(converted[1].num_trained_tokens)
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data["splits"][0]["lengths"]) == {"row", "trained"} and data["example"]["spans"]


def test_streams_are_the_same_rows(tokenizer: Any) -> None:
    for rows in forms().values():
        table, _ = to_supervised_rows(rows, tokenizer, max_length=64, max_dropped_fraction=0.9)
        stream, report = to_supervised_rows(
            rows.to_iterable_dataset(), tokenizer, max_length=64, max_dropped_fraction=0.9
        )
        assert list(stream) == list(table) and report.is_sample


def test_prompts_end_where_the_model_answers(tokenizer: Any) -> None:
    found = {form: [tokenizer.decode(p) for p in prompts_of(rows, tokenizer, 2)] for form, rows in forms().items()}
    assert found["text"] == []
    assert found["standard"] == QUESTIONS[:2]
    assert found["conversational"] == found["messages"]
    assert all(prompt.endswith("<|assistant|>\n") and "Sure" not in prompt for prompt in found["messages"])


def test_files_hold_out_and_mixtures(write_jsonl: Any) -> None:
    rows = [{"messages": [message("user", f"q{i % 3}"), message("assistant", f"a{i}")], "id": i} for i in range(9)]
    path = write_jsonl("talks.jsonl", rows)
    loaded = load_rows(path, family=ROWS)
    assert loaded.column_names == ["messages"]
    parts = split_held_out(loaded, 0.3, 0, ROWS)
    asked = [{row["messages"][0]["content"] for row in part} for part in parts]
    assert [len(part) for part in parts] == [6, 3] and not asked[0] & asked[1], "no question is on both sides"
    mapped = write_jsonl("mapped.jsonl", [{"q": "a", "a": "b"}])
    assert list(load_rows(mapped, column_map={"prompt": "q", "completion": "a"}, family=ROWS)) == [
        {"prompt": "a", "completion": "b"}
    ]
    for streaming in (False, True):
        assert len(list(load_rows([path, path], family=ROWS, streaming=streaming))) == 18
    with pytest.raises(DataError, match="different forms"):
        load_rows([path, write_jsonl("text.jsonl", [{"text": "a"}])], family=ROWS)
    with pytest.raises(
        DataError, match="'chosen' is not a column of ours; ours are prompt, completion, messages, text"
    ):
        load_rows(path, column_map={"chosen": "messages"}, family=ROWS)


def test_a_csv_may_have_lists_that_are_not_read(write_jsonl: Any) -> None:
    path = write_jsonl("scored.csv", ["prompt,completion,scores", 'a,b,"[1]"'])
    assert list(load_rows(path, family=ROWS)) == [{"prompt": "a", "completion": "b"}]
