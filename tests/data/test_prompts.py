"""Prompts for online RL: the tokens that trl.GRPOTrainer makes of them, and what becomes of everything beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from alignkit.data.checks import Limits
from alignkit.data.json_values import dataset_of
from alignkit.data.load import load_rows, split_held_out
from alignkit.data.messages import as_messages
from alignkit.data.prompts import prompt_ids_of, to_prompt_rows
from alignkit.data.prompts_report import TOO_LONG
from alignkit.data.prompts_schema import REWARD_ARGUMENTS, prompt_rows
from alignkit.data.report import data_report
from alignkit.data.synthetic import arithmetic_prompts, tiny_model
from alignkit.errors import DataError
from tests.conftest import GSM8K
from tests.data.rows import QUESTIONS, message

Write = Callable[[str, Sequence[Any]], str]

ROWS = prompt_rows()
TALKS = [[message("system", "Be brief."), message("user", question)] for question in QUESTIONS]
LONGER = [message("user", "Hi"), message("assistant", "Hello."), message("user", "What is 2 + 2?")]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def trl_ids(prompts: list[Any], tokenizer: Any, **given: Any) -> list[list[int]]:
    """Token ids of prompts as TRL's trainer makes them."""
    defaults = {"_is_vlm": False, "environment_factories": None, "tools": [], "chat_template": None}
    trainer = SimpleNamespace(processing_class=tokenizer, **{**defaults, "chat_template_kwargs": {}} | given)
    ids, images, extra = GRPOTrainer._tokenize_prompts(trainer, prompts)
    assert images is None and extra == {}
    return ids


def convert(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> tuple[Any, Any]:
    return to_prompt_rows(dataset_of(rows), tokenizer, **{"max_prompt_length": None} | options)


def refusal(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(rows, tokenizer, **options)
    return str(caught.value)


@pytest.mark.parametrize("prompts", [QUESTIONS, [*TALKS, LONGER]], ids=["text", "messages"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_tokens_counted_are_those_of_trl(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Any], streaming: bool
) -> None:
    rows = dataset_of([{"prompt": prompt, "number": i} for i, prompt in enumerate(prompts)])
    lengths = [len(ids) for ids in trl_ids(prompts, tokenizer)]
    limit = sorted(lengths)[-2]
    given = rows.to_iterable_dataset() if streaming else rows
    kept, report = to_prompt_rows(given, tokenizer, max_prompt_length=limit, max_dropped_fraction=0.5)
    expected = [i for i, length in enumerate(lengths) if length <= limit]
    assert list(kept) == [{"prompt": prompts[i], "number": i} for i in expected]
    assert report.dropped == {TOO_LONG: 1} and report.num_rows == len(expected) == len(prompts) - 1
    assert report.lengths["prompt"]["max"] == max(lengths) and report.lengths["prompt"]["min"] == min(lengths)
    assert report.is_sample == streaming
    theirs = [tuple(ids) for ids in trl_ids(prompts, tokenizer)]
    assert prompt_ids_of(given, tokenizer, 99) == theirs
    repeated = dataset_of([{"prompt": prompt} for prompt in (prompts[1], prompts[1], prompts[0], prompts[2])])
    assert prompt_ids_of(repeated, tokenizer, 2) == [theirs[1], theirs[0]]
    assert prompt_ids_of(kept, tokenizer, 99) == [theirs[i] for i in expected]


def test_arguments_of_the_chat_template_are_counted_as_trl_counts_them(tokenizer: PreTrainedTokenizerFast) -> None:
    talkative = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{% if loud %}LOUD{% endif %}{{ tools | tojson }}" + tokenizer.chat_template,
    )
    rows = [{"prompt": LONGER}]
    theirs = trl_ids([LONGER], talkative, tools=[TOOL], chat_template_kwargs={"loud": True})
    template = {"tools": [TOOL], "loud": True}
    _, report = convert(rows, talkative, template=template)
    assert report.lengths["prompt"]["max"] == len(theirs[0])
    assert prompt_ids_of(dataset_of(rows), talkative, 1, template) == [tuple(theirs[0])]
    shown = report.example(rows[0], talkative).prompt
    assert shown.startswith('LOUD[{"') and shown.endswith("What is 2 + 2?\n<|assistant|>\n")


def test_content_in_parts_reaches_the_model_as_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL hands parts to the template as they are, and this template knows text alone."""
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    kept, _ = convert([{"prompt": [{"role": "user", "content": parts}]}], tokenizer)
    plain = [[message("user", "What is 2 + 2?")]]
    assert trl_ids(list(kept["prompt"]), tokenizer) == trl_ids(plain, tokenizer)
    with pytest.raises(TypeError, match="can only concatenate list"):
        trl_ids([[{"role": "user", "content": parts}]], tokenizer)


CARRIED = [
    {"answer": 4, "checks": {"must": ["a"], "n": None}, "tags": [], "solution": "x"},
    {"answer": "four", "checks": {"other": 1.5}, "tags": [[1], None], "solution": None},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_other_column_stays_as_it_is(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, streaming: bool
) -> None:
    """Rewards must see what the file says, also what looks like messages, and each row its own types."""
    stored = json.dumps([message("user", "as text")])
    rows = [{"prompt": TALKS[i], "chosen": stored, "messages": [{"from": "human", "value": "a"}], **CARRIED[i]} for i in
            (0, 1)]  # fmt: skip
    path = write_jsonl("rows.jsonl", [{**row, "completion": "not handed on"} for row in rows])
    loaded = load_rows(path, family=ROWS, streaming=streaming)
    kept, report = to_prompt_rows(loaded, tokenizer, max_prompt_length=None)
    assert list(kept) == rows
    assert set(report.reward_columns) == {"chosen", "messages", "answer", "checks", "tags", "solution"}
    assert report.ignored_columns == ("completion",)
    assert "Be brief." in data_report({"train": (kept, report)}, tokenizer).render()


def test_a_column_that_a_stream_shows_late_is_not_lost(write_jsonl: Write) -> None:
    rows = [{"prompt": f"q{i}"} for i in range(99)]
    path = write_jsonl("rows.jsonl", [*rows, {"prompt": "a", "answer": None}, {"prompt": "b", "answer": 1}])
    assert load_rows(path, family=ROWS)[100] == {"prompt": "b", "answer": 1}
    with pytest.raises(DataError, match=r"rows.jsonl:101: column 'answer' is new here.*streaming: false"):
        list(load_rows(path, family=ROWS, streaming=True))


def test_typed_tables_keep_their_types(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": TALKS[:2], "answer": [4, 5], "score": [0.5, None], "ok": [True, False]})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    kept, _ = to_prompt_rows(load_rows(str(tmp_path / "rows.parquet"), family=ROWS), tokenizer, max_prompt_length=None)
    assert list(kept) == list(rows)
    assert {name: kept.features[name] for name in ("answer", "score", "ok")} == {
        name: rows.features[name] for name in ("answer", "score", "ok")
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_rename_and_keep_what_either_source_has(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, streaming: bool
) -> None:
    one = write_jsonl("one.jsonl", [{"prompt": "x", "question": f"q{i}", "answer": i} for i in range(6)])
    two = write_jsonl("two.jsonl", [{"question": f"r{i}", "answer": str(i), "topic": "maths"} for i in range(3)])
    column_map = {"prompt": "question", "solution": "answer"}
    family = prompt_rows(["solution"])
    loaded = load_rows([one, two], family=family, column_map=column_map, streaming=streaming, name_sources=True)
    kept, report = to_prompt_rows(loaded, tokenizer, max_prompt_length=None, required_columns=["solution"])
    found = {row["prompt"]: (row["solution"], row.get("topic")) for row in kept}
    assert found == {f"q{i}": (i, None) for i in range(6)} | {f"r{i}": (str(i), "maths") for i in range(3)}
    assert {(source.name, source.num_rows) for source in report.sources} == {(one, 6), (two, 3)}
    assert set(report.reward_columns) == set(next(iter(kept))) - {"prompt"} == {"solution", "topic"}
    text = data_report({"train": (kept, report)}, tokenizer).render()
    assert re.search(rf"train: {two} +3 +3 +33.3%\n", text) and "share of rows" in text


def test_csv_cells_stay_text(tokenizer: PreTrainedTokenizerFast, write_jsonl: Write) -> None:
    path = write_jsonl("rows.csv", ["question,answer,scores", '12+7=,019,"[1, 2]"'])
    loaded = load_rows(path, family=ROWS, column_map={"prompt": "question"})
    assert list(to_prompt_rows(loaded, tokenizer, max_prompt_length=None)[0]) == [
        {"prompt": "12+7=", "answer": "019", "scores": "[1, 2]"}
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "answer": "b"}, ("'prompt' is missing", "Write column_map: {prompt: question}")),
        ({"chosen": "ab", "rejected": "ac"}, ("may reach into the answers", "a column of its own")),
        ({"messages": LONGER}, ("column_map: {prompt: messages}", "take the answer at their end out")),
        ({"text": "a"}, ("column_map: {prompt: text}", "where all of it is one")),
        ({"input_ids": [1, 2]}, ("tokenised already",)),
        ({"prompt": "a", "image": "a.png"}, ("column 'image': alignkit trains on text alone",)),
        ({"prompt": "a", "completions": ["b"], "scores": [1]}, ("column_map: {row_completions: completions}",)),
        ({"prompt": "a", "log_metric": 1}, ("column 'log_metric': reward functions are given something else",)),
        ({"prompt": "a", "tools": [TOOL]}, ("column 'tools': every prompt is rendered with the one of the run",)),
        ({"prompt": ""}, ("prompt is empty",)),
        ({"prompt": None}, ("prompt is null",)),
        ({"prompt": 3}, ("prompt is int, expected text",)),
        ({"prompt": []}, ("prompt is empty: it needs at least one message",)),
        ({"prompt": [message("user", "a"), message("assistant", "b")]}, ("ends in the assistant's turn: leave",)),
        ({"prompt": [message("system", "a")]}, ("ends in a turn of role 'system': end it with the turn of the user",)),
        ({"prompt": [message("human", "a")]}, ("ends in a turn of role 'human': write 'user'",)),
        ({"prompt": [message("user", " ")]}, ("ends in an empty message: there is nothing to answer",)),
        ({"prompt": [{"role": "user"}]}, ("message without content",)),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_rows_that_cannot_be_learned_from(tokenizer: Any, row: dict[str, Any], says: tuple[str, ...]) -> None:
    text = refusal([row], tokenizer)
    assert all(part in text for part in says), text


def test_a_prompt_may_end_in_what_a_tool_said(tokenizer: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    template = "{{ messages[1]['tool_calls'][0]['function']['name'] }}" + tokenizer.chat_template
    calling = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", chat_template=template
    )
    talk = [message("user", "2 + 2?"), call, message("tool", "4")]
    kept, report = convert([{"prompt": talk}], calling)
    assert kept[0] == {"prompt": talk} and report.lengths["prompt"]["max"] == len(trl_ids([talk], calling)[0])


def test_what_rewards_need_must_be_in_every_row(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": None}, {"prompt": "c"}]
    text = refusal(rows, tokenizer, required_columns=["answer"])
    assert "answer is null: the rewards need it in every row\n     2 rows: row 1: null; row 2: null" in text
    text = refusal(rows, tokenizer, required_columns=["solution", "completion"])
    assert "column 'solution' is missing, which the rewards need. Did you mean 'answer'?" in text
    assert "Write column_map: {solution: answer}" in text and "column_map: {reference: completion}" in text
    assert len(convert(rows[:1], tokenizer, required_columns=["answer", "prompt"])[0]) == 1


def test_prompts_that_the_template_refuses_are_all_named(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template,
    )
    rows = [{"prompt": prompt, "answer": 1} for prompt in (LONGER, TALKS[0], LONGER, TALKS[1])]
    text = refusal(rows, strict)
    assert "no system role" in text and "2 rows: row 1: message 0 of prompt, role 'system'" in text
    with pytest.raises(DataError, match="no system role"):
        prompt_ids_of(dataset_of(rows), strict, 4)
    assert "no chat template" in refusal(rows, PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))


def test_too_many_prompts_too_long_are_refused(tokenizer: Any) -> None:
    rows = [{"prompt": "1 2 3"}] * 9 + [{"prompt": "1 2 3 " * 20}]
    kept, report = convert(rows, tokenizer, max_prompt_length=16)
    assert report.dropped == {TOO_LONG: 1} and len(kept) == 9
    check = data_report({"train": (kept, report)}, tokenizer).checks["train"][1]
    assert check.status == "warn" and "1 of 10 rows are longer than 16 tokens and dropped" in check.message
    text = refusal(rows, tokenizer, max_prompt_length=4)
    assert "10 of 10 rows are dropped" in text and "max_prompt_length is 4; 128 would do" in text
    assert "2 of 10 rows" not in refusal(rows, tokenizer, max_prompt_length=16, max_dropped_fraction=0.05)


def test_repeats_and_prompts_on_both_sides_are_found(tokenizer: Any) -> None:
    """Whatever else the rows hold, and in whatever order the keys of a message stand."""
    turned = [[{"content": m["content"], "role": m["role"]} for m in talk] for talk in TALKS]
    train = convert([{"prompt": talk, "answer": i} for i, talk in enumerate([*TALKS, turned[0]])], tokenizer)
    new = [message("user", "new")]
    held_out = convert([{"prompt": talk, "id": 7} for talk in (new, turned[1])], tokenizer, name="held-out")
    splits = {"train": train, "held-out": held_out}
    report = data_report(splits, tokenizer)
    assert report.repeats["train"].num_duplicates == 1 and report.repeats["held-out"].num_trained_on == 1
    assert report.checks["train"][-1].status == "warn" and "1 row (16.7%) repeats" in report.checks["train"][-1].message
    with pytest.raises(DataError, match=r"1 of 2 \(50.0%\) have a prompt that is trained on.*ose it"):
        report.raise_for_failures()
    data_report(splits, tokenizer, limits=Limits(allow_overlap=True)).raise_for_failures()
    apart = data_report({"train": train, "held-out": convert([{"prompt": new}], tokenizer)}, tokenizer)
    assert apart.checks["held-out"][-1].message == "no prompt of theirs is"


def test_the_report_shows_what_rewards_get_and_a_prompt(tokenizer: Any) -> None:
    rows = [{"prompt": talk, "answer": 1, "qtype": "a", "completion": "b"} for talk in TALKS]
    report = data_report({"train": convert(rows, tokenizer, template={"loud": True})}, tokenizer)
    assert {check.status for check in report.checks["train"]} == {"ok"}
    text = report.render()
    assert text.startswith("conversational prompts\nrows") and "cut at" not in text and "[[" not in text
    assert "train: columns for the rewards: answer, qtype\ntrain: columns not used: completion" in text
    assert "first row\n  prompt  <|system|>\\n\n          Be brief." in text and "<|assistant|>\\n" in text
    assert "tokens         min" in text and "before truncation" not in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["splits"][0]["reward_columns"] == ["answer", "qtype"] and "<|user|>" in data["example"]["prompt"]
    assert data["splits"][0]["template"] == {"loud": True}
    none = data_report({"train": convert([{"prompt": "a"}], tokenizer)}, tokenizer).render()
    assert "columns for the rewards: none" in none


def test_a_prompt_that_ends_in_a_stop_token_fails(tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL lets the model write behind the EOS that some tokenizers put behind every text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    eos = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, backend.token_to_id(eos))])
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|pad|>")
    assert trl_ids(["12+7="], ending)[0][-1] == ending.eos_token_id
    rows = [{"prompt": "12+7="}, {"prompt": "3+4="}]
    for given, stops, num_closed in ((ending, [], 2), (tokenizer, [], 0), (tokenizer, tokenizer("=")["input_ids"], 2)):
        kept, report = convert(rows, given, stop_token_ids=stops)
        assert report.num_closed_prompts == num_closed
        check = data_report({"train": (kept, report)}, given).checks["train"][2]
        assert check.status == ("fail" if num_closed else "ok")
        assert num_closed == 0 or "2 of 2 prompts end in a stop token" in check.message
    silent = tokenizer.chat_template.replace("{%- if add_generation_prompt -%}", "{%- if false -%}")
    silent = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos, chat_template=silent)
    check = data_report({"train": convert([{"prompt": LONGER}], silent)}, silent).checks["train"][2]
    assert check.status == "warn" and "the assistant's turn is not opened" in check.message


def test_plain_prompts_become_messages_and_are_held_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of the other columns none is taken for an answer, or for messages."""
    others = {"completion": None, "messages": LONGER, "checks": {"n": [1, None]}}
    rows = dataset_of([{**row, **others} for row in arithmetic_prompts(20, seed=0)])
    train, held_out = split_held_out(rows, 0.25, 0, ROWS)
    assert (len(train), len(held_out)) == (15, 5)
    for given in (train, train.to_iterable_dataset()):
        turned = as_messages(given, tokenizer, "train", ROWS.columns)
        kept, report = to_prompt_rows(turned, tokenizer, max_prompt_length=None)
        first = {**train[0], "prompt": [message("user", train[0]["prompt"])]}
        assert next(iter(kept)) == {name: value for name, value in first.items() if name != "completion"}
        assert report.conversational and report.reward_columns == ("answer", "messages", "checks")


@pytest.mark.parametrize("streaming", [False, True])
def test_trl_hands_the_columns_to_reward_functions(
    tokenizer: PreTrainedTokenizerFast, write_jsonl: Write, tmp_path: Path, streaming: bool
) -> None:
    sums = arithmetic_prompts(8, seed=0)
    rows = [
        {"prompt": [message("user", row["prompt"])], "answer": [row["answer"], i][i % 2], "checks": {"a": [i, None]}}
        for i, row in enumerate(sums)
    ]
    loaded = load_rows(write_jsonl("rows.jsonl", rows), family=ROWS, streaming=streaming)
    kept, _ = to_prompt_rows(loaded, tokenizer, max_prompt_length=None)
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, answer: Any, checks: Any, **given: Any) -> list[float]:
        seen.extend({"prompt": p, "answer": a, "checks": c} for p, a, c in zip(prompts, answer, checks, strict=True))
        assert set(given) == REWARD_ARGUMENTS - {"prompts", "completions", "environments"}
        return [float(len(completion[0]["content"])) for completion in completions]

    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    sizes = {"per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 2, "max_steps": 2}
    args = GRPOConfig(output_dir=str(tmp_path / "run"), **sizes, **quiet)
    model = tiny_model(tokenizer, seed=0)
    GRPOTrainer(model, reward, args=args, train_dataset=kept, processing_class=tokenizer).train()
    assert len(seen) == 16 and all(row in rows for row in seen) and len({str(row) for row in seen}) == 8


def test_questions_of_gsm8k(tokenizer: PreTrainedTokenizerFast) -> None:
    family, column_map = prompt_rows(["answer"]), {"prompt": "question", "answer": "ground_truth"}
    loaded = load_rows(str(GSM8K), family=family, column_map=column_map)
    kept, report = to_prompt_rows(loaded, tokenizer, max_prompt_length=400, max_dropped_fraction=0.2)
    raw = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    fitting = [row for row in raw if len(tokenizer(row["question"])["input_ids"]) <= 400]
    assert [(row["prompt"], row["answer"]) for row in kept] == [(r["question"], r["ground_truth"]) for r in fitting]
    assert kept[0]["6b_finetuning"] == fitting[0]["6b_finetuning"]
    assert report.num_rows_in == 60 and report.num_dropped == 60 - len(fitting)


@pytest.mark.shared
def test_all_of_gsm8k(tokenizer: PreTrainedTokenizerFast, shared: Path) -> None:
    """Train and test questions are apart, and every one is a prompt."""
    splits = {}
    for name in ("train", "test"):
        path = str(shared / "data" / "gsm8k" / f"{name}.jsonl")
        loaded = load_rows(path, family=prompt_rows(["answer"]), column_map={"prompt": "question"})
        splits[name] = to_prompt_rows(loaded, tokenizer, max_prompt_length=None, required_columns=["answer"], name=name)
    assert [report.num_rows for _, report in splits.values()] == [7473, 1319]
    report = data_report(splits, tokenizer)
    report.raise_for_failures()
    assert report.repeats["test"].num_trained_on == 0
