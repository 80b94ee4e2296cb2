"""What is trained is what ``apply_chat_template`` makes of a row's own JSON; what cannot be rendered is named."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.json_values import dataset_of
from alignkit.data.load import load_rows
from alignkit.data.negatives import check_prompts, prompt_token_ids
from alignkit.data.supervised import prompts_of, to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.errors import DataError
from tests.data.rows import message

Templated = Callable[[str], PreTrainedTokenizerFast]

EVERYTHING = (
    "{{ tools | tojson }}{{ extra | default('none') | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m | tojson }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes all that a template is given, so that nothing can be lost, added or changed unseen."""
CONCATENATES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
INTERPOLATES = CONCATENATES.replace("'<|' + m['role'] + '|>' + m['content'] + eos_token", "m.role }}: {{ m.content")
TAKES_PARTS = CONCATENATES.replace(
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}",
    "<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "[{{ part.text }}]{% endfor %}{% endif %}{{ eos_token }}",
)
DROPS_PARTS = TAKES_PARTS.replace("{% for part in m.content %}[{{ part.text }}]{% endfor %}", "")
KNOWN_ROLES = CONCATENATES.replace("{{ '<|'", "{% if m.role in ['user', 'assistant'] %}{{ '<|'").replace(
    "eos_token }}{% endfor", "eos_token }}{% endif %}{% endfor"
)
MARKED = CONCATENATES.replace(
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}",
    "<|{{ m.role }}|>{% generation %}{{ m.content + eos_token }}{% endgeneration %}",
)


@pytest.fixture(scope="module")
def templated(tokenizer: PreTrainedTokenizerFast) -> Templated:
    """The tokenizer with another chat template."""

    def make(template: str) -> PreTrainedTokenizerFast:
        backend = tokenizer.backend_tokenizer
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=template)

    return make


texts = st.one_of(st.text(max_size=6), st.sampled_from(["2024-01-10", "12:00:00", "7", "null", "[1]", "NaN"]))
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)
extras = {"name": texts, "reasoning_content": texts, "weight": numbers, "meta": values}
calls = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": values})}))


def turn(role: str, *, content: Any = texts) -> st.SearchStrategy[dict[str, Any]]:
    optional = extras | ({"tool_calls": calls} if role == "assistant" else {})
    return st.fixed_dictionaries({"role": st.just(role), "content": content}, optional=optional)


answers = st.builds(lambda text: "A" + text, texts)
row_strategy = st.fixed_dictionaries(
    {"messages": st.tuples(turn("system"), turn("user"), turn("assistant", content=answers)).map(list)},
    optional={
        "tools": st.one_of(st.none(), st.lists(st.dictionaries(texts, values, max_size=2), max_size=2)),
        "chat_template_kwargs": st.one_of(st.none(), st.fixed_dictionaries({}, optional={"extra": values})),
        "id": values,
    },
)
file_strategy = st.lists(row_strategy, min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(file_strategy, min_size=1, max_size=2), streaming=st.booleans())
def test_what_is_trained_is_what_the_template_makes_of_the_row(
    templated: Templated, files: list[list[dict[str, Any]]], streaming: bool
) -> None:
    tokenizer = templated(EVERYTHING)
    # A stream takes its columns from the first row of each file.
    lines = [[{**dict.fromkeys(("tools", "chat_template_kwargs")), **rows[0]}, *rows[1:]] for rows in files]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.jsonl") for number in range(len(files))]
        for path, rows in zip(paths, lines, strict=True):
            path.write_text("\n".join(map(json.dumps, rows)))
        loaded = load_rows([str(path) for path in paths], family=supervised_rows(), streaming=streaming)
        trained = [row["input_ids"] for row in to_supervised_rows(loaded, tokenizer, max_length=None)[0]]
        own = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    rendered = [
        tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), tokenize=False, **(row.get("chat_template_kwargs") or {})
        )
        for row in own
    ]
    assert sorted(trained) == sorted(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("form", ["messages", "pairs", "prompts", "marked"])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (CONCATENATES, "yes, sir<|endoftext|>"),
        (INTERPOLATES, "assistant: yes, sir"),
        (TAKES_PARTS, "[yes][, sir]<|endoftext|>"),
        (DROPS_PARTS, "yes, sir<|endoftext|>"),
    ],
    ids=["concatenates", "interpolates", "takes parts", "drops parts"],
)
def test_content_in_parts_is_its_text(templated: Templated, template: str, answer: str, form: str) -> None:
    tokenizer = templated(template)
    asked, answered = {"role": "user", "content": parts("q")}, {"role": "assistant", "content": parts("yes", ", sir")}
    if form == "pairs":
        row = {"prompt": [asked], "chosen": [answered], "rejected": [message("assistant", "no")]}
        ids = to_candidate_rows(Dataset.from_list([row]), tokenizer, max_length=None, num_candidates=2)[0][0]
        assert tokenizer.decode(ids["completion_ids"][0]).endswith(answer)
    elif form == "prompts":
        rows = [{"prompt": [asked, answered, asked]}]
        kind = check_prompts(rows, name="data", negatives=False)
        ids = prompt_token_ids(rows, tokenizer, kind, instruction=None, name="data")
        assert answer in tokenizer.decode(ids[0]) and "type" not in tokenizer.decode(ids[0])
    else:
        trained = TrainedTokens()
        if form == "marked":
            if template != CONCATENATES:
                return
            tokenizer, trained = templated(MARKED), TrainedTokens(assistant_only=True)
        row = {"messages": [asked, answered]}
        ids = to_supervised_rows(Dataset.from_list([row]), tokenizer, max_length=None, trained=trained)[0][0]
        text = tokenizer.decode(ids["input_ids"])
        assert text.endswith(answer) and "type" not in text


def refusal(tokenizer: Any, odd: list[Any], *, streaming: bool = False, **options: Any) -> str:
    """What is said of nine good rows with an odd one in sixth place."""
    good = {"messages": [message("user", "q"), message("assistant", "a")]}
    rows = [good] * 5 + [{"messages": odd}] + [good] * 4
    with tempfile.TemporaryDirectory() as folder, pytest.raises(DataError) as caught:
        path = Path(folder, "rows.jsonl")
        path.write_text("\n".join(map(json.dumps, rows)))
        loaded = load_rows(str(path), family=supervised_rows(), streaming=streaming)
        to_supervised_rows(loaded, tokenizer, max_length=None, **options)
    return str(caught.value)


RAISES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CONCATENATES
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CONCATENATES
)
ENDS = "{% if messages[-1].role == 'user' and not add_generation_prompt %}{{ raise_exception('no answer') }}{% endif %}"
CALL = [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("template", "odd", "says"),
    [
        (RAISES, [message("system", "s"), message("user", "q"), message("assistant", "a")],
         "row 5: message 0 of messages, role 'system': 's'|System role not supported"),
        (ALTERNATES, [message("user", "q"), message("user", "r"), message("assistant", "a")],
         "row 5: message 1 of messages, role 'user': 'r'|roles must alternate"),
        (ENDS + CONCATENATES, [message("user", "q"), message("assistant", "a"), message("user", "r")],
         "row 5: message 2 of messages, role 'user': 'r'|no answer"),
        (CONCATENATES, [message("user", "q"), {"role": "assistant", "content": None, "tool_calls": CALL}],
         "row 5: message 1 of messages, role 'assistant': None|Its content is null: write \"\""),
        (CONCATENATES, [message("user", "q"), {"role": "assistant", "content": "", "tool_calls": CALL}],
         "row 5: message 1 of messages|does not write tool calls"),
        (KNOWN_ROLES, [message("developer", "q"), message("assistant", "a")],
         "row 5: message 0 of messages, role 'developer': 'q'|write 'system'"),
        (CONCATENATES, [message("user", "q"), {"role": "assistant", "content": 0}], "row 5: |whose content is int"),
        (CONCATENATES, [message("user", "q"), {"role": "assistant", "content": [{"type": "text"}]}],
         "row 5: |whose content is list"),
        (CONCATENATES, [message("user", "q"), {"role": "assistant", "content": parts("")}], "row 5: |empty message"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_rendered_is_named(
    templated: Templated, template: str, odd: list[Any], says: str, streaming: bool
) -> None:
    text = refusal(templated(template), odd, streaming=streaming)
    assert all(part in text for part in says.split("|")), text
    assert "1 problem\n" in text and "1 row: " in text, "one message for one row"


def test_rows_of_the_same_fault_are_counted_together(templated: Templated) -> None:
    row = {"prompt": [message("system", "s"), message("user", "q")]}
    pairs = [row | {"chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]}] * 7
    with pytest.raises(DataError) as caught:
        to_candidate_rows(Dataset.from_list(pairs), templated(RAISES), max_length=None, num_candidates=2)
    assert "7 rows: row 0: message 0 of prompt + chosen, role 'system'" in str(caught.value)
    with pytest.raises(DataError, match="System role not supported(.|\n)*2 rows: row 0: message 0 of prompt"):
        prompt_token_ids([row] * 2, templated(RAISES), check_prompts([row], name="data", negatives=False),
                         instruction=None, name="data")  # fmt: skip
    talks = Dataset.from_list([{"messages": row["prompt"] + [message("assistant", "a")]}])
    with pytest.raises(DataError, match="row 0: message 0 of prompt"):
        prompts_of(talks, templated(RAISES), 1)


def test_marked_turns_are_refused_alike(templated: Templated) -> None:
    trained = TrainedTokens(assistant_only=True)
    odd = [message("user", "q"), {"role": "assistant", "content": None, "tool_calls": CALL}]
    assert "row 5: message 1 of messages" in refusal(templated(MARKED), odd, trained=trained)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"tools": "[oops"}, "tools is text that is no JSON"),
        ({"tools": {"name": "f"}}, "tools is dict, expected list"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is list, expected dict"),
        ({"chat_template_kwargs": {"tokenize": True}}, "holds 'tokenize', which is not the row's to set"),
    ],
)
def test_what_a_row_brings_for_the_template_is_checked(templated: Templated, extra: Any, says: str) -> None:
    row = {"messages": [message("user", "q"), message("assistant", "a")], **extra}
    with pytest.raises(DataError, match=says):
        to_supervised_rows(Dataset.from_list([row]), templated(CONCATENATES), max_length=None)


def test_template_arguments_may_be_json_text(templated: Templated) -> None:
    row = {"messages": [message("user", "q"), message("assistant", "a")]}
    given = {"tools": [{"name": "f", "x": None}], "chat_template_kwargs": {"extra": [1, "2"]}}
    stored = {name: json.dumps(value) for name, value in given.items()}
    tokenizer = templated(EVERYTHING)
    (ids,), _ = to_supervised_rows(Dataset.from_list([row | stored]), tokenizer, max_length=None)
    expected = tokenizer.apply_chat_template(row["messages"], tools=given["tools"], extra=[1, "2"], tokenize=False)
    assert tokenizer.decode(ids["input_ids"]) == expected


TAKES_TOOLS = "{% if tools %}T{{ tools | tojson }}{% endif %}"
WRITES_CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
)
TEXT_CALLS = WRITES_CALLS.replace("arguments | tojson", "arguments")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def called(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [message("user", "q"), {"role": "assistant", "content": "", "tool_calls": [call]}]


def test_tools_that_the_template_leaves_out_are_refused(templated: Templated) -> None:
    rows = [{"messages": called({"city": "Łódź"}), "tools": tools} for tools in (None, [TOOL], json.dumps([TOOL]))]
    tokenizer = templated(WRITES_CALLS)
    with pytest.raises(DataError) as refused:
        to_supervised_rows(dataset_of(rows), tokenizer, max_length=None)
    assert "the chat template leaves out the tools" in str(refused.value) and "row 1: " in str(refused.value)
    pairs = [{"prompt": rows[1]["messages"][:1], "chosen": "a", "rejected": "b", "tools": [TOOL]}]
    with pytest.raises(DataError, match="leaves out the tools"):
        to_candidate_rows(dataset_of(pairs), tokenizer, max_length=None, num_candidates=2)
    tokenizer = templated(TAKES_TOOLS + WRITES_CALLS)
    found, report = to_supervised_rows(dataset_of(rows), tokenizer, max_length=None)
    assert [tokenizer.decode(row["input_ids"]).startswith("T[") for row in found] == [False, True, True]
    assert report.num_rows_with_tools == 2
    assert "rows with tools, which the chat template writes: 2" in report.notes()


def test_a_template_that_says_tools_only_here_is_believed(templated: Templated) -> None:
    only_with_a_system_prompt = "{% if tools and messages[0].role == 'system' %}T{{ tools | tojson }}{% endif %}"
    tokenizer = templated(only_with_a_system_prompt + WRITES_CALLS)
    talk = [message("system", "s"), message("user", "q"), message("assistant", "a")]
    rows, _ = to_supervised_rows(dataset_of([{"messages": talk, "tools": [TOOL]}]), tokenizer, max_length=None)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("T[")
    with pytest.raises(DataError, match="leaves out the tools"):
        to_supervised_rows(dataset_of([{"messages": talk[1:], "tools": [TOOL]}]), tokenizer, max_length=None)


def test_no_tools_may_be_said_with_nothing(templated: Templated) -> None:
    talk = [message("user", "q"), message("assistant", "a")]
    rows = [{"messages": talk, "tools": none} for none in (None, "", " ", "[]")]
    found, report = to_supervised_rows(dataset_of(rows), templated(WRITES_CALLS), max_length=None)
    assert len({tuple(row["input_ids"]) for row in found}) == 1 and report.num_rows_with_tools == 0


@pytest.mark.parametrize("template", [WRITES_CALLS, TEXT_CALLS])
def test_arguments_of_a_call_are_not_quoted_twice(templated: Templated, template: str) -> None:
    tokenizer = templated(template)
    text = '{"city": "Łódź"}'
    rows = [{"messages": called(text)}, {"messages": called(json.loads(text))}, {"messages": called("no object")}]
    found, _ = to_supervised_rows(dataset_of(rows), tokenizer, max_length=None)
    shown = [
        tokenizer.decode(row["input_ids"]).partition("weather")[2].removesuffix(tokenizer.eos_token) for row in found
    ]
    assert shown[0] == text
    assert shown[1] == (text if template == WRITES_CALLS else str(json.loads(text)))
    assert shown[2] == ('"no object"' if template == WRITES_CALLS else "no object")
