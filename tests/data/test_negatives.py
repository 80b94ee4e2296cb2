"""Rows of prompt and rejected: which are recognised, what is said of others, and the lists they become."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import processors

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows, split_held_out
from alignkit.data.negative_schema import PromptKind, negative_rows, prompt_problems
from alignkit.data.negatives import (
    assemble_row,
    check_prompts,
    ignored_note,
    lack_samples,
    load_prompts,
    negative_text,
    prompt_token_ids,
)
from alignkit.data.schema import RowKind
from alignkit.errors import DataError
from tests.scripts.tiny import SPECIALS, TEMPLATE, byte_tokenizer

TEXT = {"prompt": "Name a prime.", "rejected": "Nine."}
USER = [{"role": "user", "content": "Name a prime."}]
ANSWER = [{"role": "assistant", "content": "Nine."}]
CHAT = {"prompt": USER, "rejected": ANSWER}
MIXED = {"prompt": USER, "rejected": "Nine."}
KIND_OF = {"text": PromptKind(False, True), "chat": PromptKind(True, True), "mixed": PromptKind(True, True, True)}
ROW_OF = {"text": TEXT, "chat": CHAT, "mixed": MIXED}
SAMPLED = {"prompt": "Name a prime.", "completions": ["Two.", "Nine."], "scores": [1, 0]}
FAMILY = negative_rows()


def refusal(rows: list[dict[str, Any]], **options: Any) -> str:
    """What is said of rows that cannot be sampled for."""
    with pytest.raises(DataError) as raised:
        check_prompts(rows, name="rows", **options)
    return str(raised.value)


@pytest.mark.parametrize("form", KIND_OF)
def test_forms(form: str) -> None:
    row = ROW_OF[form]
    assert check_prompts([row, row], name="rows") == KIND_OF[form]
    assert check_prompts([{**row, "chosen": None, "id": 3}], name="rows") == KIND_OF[form]
    prompts = PromptKind(KIND_OF[form].conversational, negatives=False)
    assert check_prompts([{"prompt": row["prompt"]}], name="rows", negatives=False) == prompts
    assert check_prompts([{**row, "rejected": 7.0}], name="rows", negatives=False) == prompts
    assert negative_text(row, KIND_OF[form]) == "Nine." and negative_text(row, prompts) is None


def test_what_is_left_out_is_said() -> None:
    assert ignored_note([TEXT]) is None
    assert ignored_note([{**TEXT, "chosen": "Two.", "scores": [1]}]) == "columns not used and left out: chosen, scores"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "the dataset is empty"),
        ([{"prompt": "a", "chosen": "b"}], "column 'rejected' is missing. Columns present: 'prompt', 'chosen'"),
        ([{"question": "a", "rejected": "b"}], "Did you mean 'question'? Write column_map: {prompt: question}"),
        ([{"prompt": "a", "worst": "b"}], "Did you mean 'worst'? Write column_map: {rejected: worst}"),
        ([{"chosen": "ab", "rejected": "ac"}], "may reach into the answers, so it cannot be sampled from"),
        (
            [{"prompt": "a", "rejected": ANSWER}],
            "the prompt is text, rejected is messages: write the prompt as messages",
        ),
        (
            [TEXT, {**TEXT, "rejected": None}],
            "rejected is null: every row needs one. Write it, or remove the row\n     1 row: row 1: null",
        ),
        (
            [TEXT, {"prompt": "a"}],
            "rejected is null: every row needs one. Write it, or remove the row\n     1 row: row 1: null",
        ),
        ([TEXT, {**TEXT, "rejected": math.nan}], "rejected is float, expected text\n     1 row: row 1: nan"),
        ([TEXT, {**TEXT, "rejected": " \n"}], "rejected is empty: it needs at least one character"),
        ([TEXT, {**TEXT, "prompt": 5}], "prompt is int, expected text\n     1 row: row 1: 5"),
        ([TEXT, {**TEXT, "prompt": ""}], "prompt is empty: it needs at least one character"),
        ([CHAT, {**CHAT, "rejected": "text"}], "rejected is str, expected a list of messages"),
        ([CHAT, {**CHAT, "rejected": []}], "rejected is empty: it needs at least one message"),
        ([CHAT, {**CHAT, "rejected": [{"role": "assistant"}]}], "rejected has a message without content"),
        ([CHAT, {**CHAT, "rejected": [{"content": "x"}]}], "rejected has a message without role"),
        ([CHAT, {**CHAT, "rejected": [{**ANSWER[0], "content": " "}]}], "rejected ends in an empty message"),
        ([CHAT, {**CHAT, "rejected": USER + ANSWER}], "rejected begins with the prompt: keep only the messages"),
        ([MIXED, CHAT], "rejected is list, expected text"),
    ],
)
def test_what_cannot_be_sampled_for(rows: list[dict[str, Any]], expected: str) -> None:
    assert expected in refusal(rows)


def test_every_kind_of_problem_is_in_one_message() -> None:
    rows = [TEXT, {**TEXT, "rejected": None}, {**TEXT, "prompt": 3, "rejected": ""}, {**TEXT, "rejected": None}]
    message = refusal(rows)
    assert "3 problems" in message and "2 rows: row 1: null; row 3: null" in message
    assert "1. rejected is null" in message and "2. prompt is int" in message and "3. rejected is empty" in message
    assert prompt_problems(TEXT, KIND_OF["text"]) == []


@pytest.mark.parametrize("form", KIND_OF)
def test_a_row_is_the_samples_then_the_negative(form: str) -> None:
    given = {**ROW_OF[form], "chosen": "Two.", "id": 7, "weight": math.nan, "tools": None}
    row = assemble_row(given, ["Two.", "Three."], KIND_OF[form])
    if form == "text":
        assert row["completions"] == ["Two.", "Three.", "Nine."]
    else:
        contents = [[(message["role"], message["content"]) for message in one] for one in row["completions"]]
        assert contents == [[("assistant", text)] for text in ("Two.", "Three.", "Nine.")]
    assert row["prompt"] == given["prompt"] and row["scores"] == [1.0, 1.0, 0.0]
    assert {name: row[name] for name in set(row) - {"prompt", "completions", "scores"}} == {
        "id": 7,
        "weight": None,
        "tools": None,
    }
    assert assemble_row(given, ["Two.", "Three."], KIND_OF[form], [0.5, 2, -1])["scores"] == [0.5, 2, -1]
    alone = PromptKind(KIND_OF[form].conversational, negatives=False)
    row = assemble_row(given, ["Two.", "Three."], alone, [3.0, 1.0])
    assert len(row["completions"]) == 2 and row["scores"] == [3.0, 1.0] and "rejected" not in row


@pytest.mark.parametrize("form", KIND_OF)
def test_assembled_rows_are_candidate_lists(form: str) -> None:
    rows = [assemble_row(ROW_OF[form], ["Two.", "Three.", "Five."][:k], KIND_OF[form]) for k in (1, 3, 2)]
    tokenizer = byte_tokenizer()
    converted, report = to_candidate_rows(Dataset.from_list(rows), tokenizer, max_length=None, num_candidates=None)
    assert report.candidates_per_row == {2: 1, 3: 1, 4: 1} and report.num_dropped == 0
    assert converted["scores"] == [[1, 0], [1, 1, 1, 0], [1, 1, 0]]
    assert tokenizer.decode(converted[1]["completion_ids"][3]) == "Nine.<|end|>"


def test_an_instruction_comes_before_the_prompt_and_only_while_sampling() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|user|>{{", "{{ '<|user|>' if m['role'] == 'user' else '#' }}{{")

    def shown(row: dict[str, Any], instruction: str | None) -> str:
        kind = check_prompts([row], name="rows")
        return tokenizer.decode(prompt_token_ids([row], tokenizer, kind, instruction=instruction, name="rows")[0])

    assert shown(TEXT, None) == "Name a prime." and shown(TEXT, "Be kind.") == "Be kind.\n\nName a prime."
    assert shown(CHAT, None) == "<|user|>Name a prime.<|assistant|>"
    assert shown(CHAT, "Be kind.") == "#Be kind.<|user|>Name a prime.<|assistant|>"
    system = {"prompt": [{"role": "system", "content": "Short."}, *USER], "rejected": ANSWER}
    assert shown(system, "Be kind.") == "#Be kind.\n\nShort.<|user|>Name a prime.<|assistant|>"


def test_prompts_are_the_tokens_that_training_will_see() -> None:
    tokenizer = byte_tokenizer()
    for row in (TEXT, CHAT):
        kind = check_prompts([row], name="rows")
        ids = prompt_token_ids([row], tokenizer, kind, instruction=None, name="rows")
        dataset = Dataset.from_list([assemble_row(row, ["Two."], kind)])
        trained, _ = to_candidate_rows(dataset, tokenizer, max_length=None, num_candidates=None)
        assert ids == trained["prompt_ids"]


def test_a_tokenizer_that_ends_every_text() -> None:
    tokenizer = byte_tokenizer()
    end = (SPECIALS[1], tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    ids = prompt_token_ids([TEXT], tokenizer, KIND_OF["text"], instruction=None, name="rows")
    assert tokenizer.decode(ids[0]) == "Name a prime."


@pytest.mark.parametrize(
    ("template", "instruction", "expected"),
    [
        (TEMPLATE.replace("{% else %}", "{% elif m['role'] == 'user' %}"), "Be kind.", "leaves system messages out"),
        (
            "{{ raise_exception('System role not supported') }}",
            "Be kind.",
            "takes it. If it takes no system message, leave the instruction out",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            None,
            "cannot render a message: roles must alternate. Change",
        ),
        (None, None, "the tokenizer has no chat template"),
    ],
)
def test_templates_that_cannot_take_the_prompt(template: str | None, instruction: str | None, expected: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError) as raised:
        prompt_token_ids([CHAT], tokenizer, KIND_OF["chat"], instruction=instruction, name="rows")
    assert expected in str(raised.value)


def test_loading(write_jsonl: Callable[..., str]) -> None:
    first = write_jsonl("first.jsonl", [{"question": f"q{i}", "rejected": "r", "id": i} for i in range(3)])
    second = write_jsonl("second.jsonl", [{"question": "q3", "rejected": "r", "meta": {"source": "web"}}])
    rows = load_prompts([first, second], column_map={"prompt": "question"})
    assert [row["prompt"] for row in rows] == ["q0", "q1", "q2", "q3"]
    assert rows[1] == {"prompt": "q1", "rejected": "r", "id": 1} and rows[3]["meta"] == {"source": "web"}
    assert len(load_prompts([first, second], column_map={"prompt": "question"}, max_rows=2)) == 2
    json.dumps(rows)
    with pytest.raises(DataError, match="prompt is mapped to 'query'"):
        load_prompts([first], column_map={"prompt": "query"})
    with pytest.raises(DataError, match="not found"):
        load_prompts([first + "x.jsonl"])


def detected(row: dict[str, Any]) -> Any:
    """The kind that the family of a method made of negatives finds in a row."""
    return FAMILY.detect(list(row), [row], name="rows")


@pytest.mark.parametrize("form", KIND_OF)
def test_the_family_takes_negatives_and_lists_of_samples(form: str) -> None:
    assert detected({**ROW_OF[form], "chosen": "Two."}) == KIND_OF[form]
    assert detected(SAMPLED) == RowKind(lists=True, conversational=False)
    # What the sampling script writes may carry the columns it was made from.
    assert detected({**ROW_OF[form], **SAMPLED}) == RowKind(lists=True, conversational=False)
    names = ["prompt", "rejected", "completions", "scores", "tools", "chat_template_kwargs", "chosen", "token_rewards"]
    assert list(FAMILY.columns) == names
    assert len({str(kind) for kind in KIND_OF.values()}) == 3


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "chosen"], "column 'rejected' is missing. Columns present: 'prompt', 'chosen'"),
        (["prompt", "completions"], "column 'scores' is missing"),
        (["rejected", "completions", "scores"], "column 'prompt' is missing"),
        (["prompt", "responses", "rewards"], "Did you mean 'responses'? Write column_map: {completions: responses}"),
        (["chosen", "rejected"], "may reach into the answers, so it cannot be sampled from"),
        (["question", "chosen", "rejected"], "Did you mean 'question'? Write column_map: {prompt: question}"),
    ],
)
def test_rows_of_neither_form_are_told_what_they_lack(columns: list[str], expected: str) -> None:
    with pytest.raises(DataError) as raised:
        detected(dict.fromkeys(columns, "x"))
    assert expected in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_negatives_load_like_any_other_rows(write_jsonl: Callable[..., str], streaming: bool) -> None:
    first = write_jsonl(
        "first.jsonl", [{"question": f"a{i}", "rejected": "r", "chosen": "c", "id": i} for i in range(9)]
    )
    second = write_jsonl("second.jsonl", [{"question": f"b{i}", "rejected": "r", "chosen": "c"} for i in range(3)])
    options: dict[str, Any] = {"column_map": {"prompt": "question"}, "streaming": streaming, "family": FAMILY}
    rows = load_rows(first, max_rows=2, **options)
    assert list(rows) == [{"prompt": f"a{i}", "rejected": "r", "chosen": "c"} for i in range(2)]
    assert lack_samples(rows, "rows")
    mixed = list(load_rows([first, second], **options))
    assert sorted(row["prompt"] for row in mixed) == [f"a{i}" for i in range(9)] + [f"b{i}" for i in range(3)]
    if not streaming:
        sources = [{"path": first, "weight": 2}, {"path": second, "weight": 1}]
        drawn = [row["prompt"] for row in load_rows(sources, **options)]
        assert len(set(drawn)) == len(drawn) == 9 and sum(prompt.startswith("a") for prompt in drawn) == 6
    sampled = write_jsonl("sampled.jsonl", [SAMPLED, {**SAMPLED, "id": 1}])
    lists = load_rows(sampled, streaming=streaming, family=FAMILY)
    assert list(lists) == [SAMPLED, SAMPLED] and not lack_samples(lists, "rows")
    with pytest.raises(DataError, match="standard prompts with a rejected answer\n.*standard candidate lists"):
        load_rows([write_jsonl("plain.jsonl", [TEXT]), sampled], streaming=streaming, family=FAMILY)


def test_held_out_negatives_share_no_prompt() -> None:
    rows = Dataset.from_list([{"prompt": f"q{i // 2}", "rejected": f"r{i}"} for i in range(20)])
    train, held_out = split_held_out(rows, 0.3, 0, FAMILY)
    assert len(held_out) == 6 and not {*train["prompt"]} & {*held_out["prompt"]}
