"""Contrast prompts and token rewards in the data layer: templates, tokenisation, order, truncation, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.contrast import DEFAULT_FILE, ContrastPrompts, load_contrast_prompts
from alignkit.data.schema import detect_kind
from alignkit.errors import ConfigError, DataError
from tests.data.rows import forms, message, pair

OWN = ContrastPrompts("{prompt}|{response}|good", "{prompt}|{response}|bad", True, "->")
BARE = ContrastPrompts("{prompt}|good", "{prompt}|bad", False, "->")


def converted(rows: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    options = {"max_length": None, "num_candidates": 2, **options}
    return list(to_candidate_rows(Dataset.from_list(list(rows)), tokenizer, **options)[0])


def refusal(rows: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        converted(rows, tokenizer, **options)
    return str(caught.value)


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_response", [True, False])
def test_the_shipped_templates_differ_at_their_end_alone(include_response: bool) -> None:
    prompts = load_contrast_prompts(include_response=include_response)
    better, worse = prompts.prompts("PROMPT", ["RESPONSE"])
    shared = len([None for a, b in zip(better, worse, strict=False) if a == b][: better.index("helpful")])
    assert better[: better.index("helpful")] == worse[: worse.index("unhelpful")] and shared > 20
    assert "PROMPT" in better[:shared] and ("RESPONSE" in better[:shared]) == include_response
    for good, bad in (("helpful", "unhelpful"), ("correct", "incorrect"), ("coherent", "incoherent")):
        assert f" {good}" in better and f" {bad}" in worse and f" {bad}" not in better
    assert " concise" in better and " verbose" in worse


def test_braces_in_texts_stay_what_they_are() -> None:
    prompts = OWN.prompts("{response} {x}", ["{prompt}", "b"])
    assert prompts == [
        "{response} {x}|{prompt}|good->",
        "{response} {x}|b|good->",
        "{response} {x}|{prompt}|bad->",
        "{response} {x}|b|bad->",
    ]


def test_the_last_user_message_is_revised_and_the_rest_kept() -> None:
    system, user, answer = message("system", "s"), message("user", "u"), message("assistant", "a")
    reply = [message("assistant", "x"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    better, worse = OWN.prompts([system, user], [reply])
    assert better == [system, message("user", 'u|x\n\n[{"name": "f"}]|good')]
    assert worse == [system, message("user", 'u|x\n\n[{"name": "f"}]|bad')]
    after_an_answer = BARE.prompts([user, answer], [reply, reply])
    assert after_an_answer == [[user, answer, message("user", f"u|{word}")] for word in ("good", "bad")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, ["version is 2; this alignkit reads version 1"]),
        ({"version": None}, ["version is None"]),
        ({"better": "x"}, ["unknown key 'better'"]),
        ({"plain_text_ending": None}, ["plain_text_ending is missing or not text"]),
        ({"with_response": {"better": "{prompt}{response}"}}, ["with_response must hold exactly the keys better and"]),
        (
            {"with_response": {"better": "{prompt}", "worse": "{prompt}{response}{x}"}},
            [
                "2 problems",
                "with_response.better lacks {response}",
                "with_response.worse has an unknown placeholder {x}",
            ],
        ),
        ({"without_response": {"better": 3, "worse": "{prompt}"}}, ["without_response.better is int, expected text"]),
    ],
)
def test_a_template_file_is_read_strictly(tmp_path: Path, change: dict[str, Any], expected: list[str]) -> None:
    content = yaml.safe_load(DEFAULT_FILE.read_text()) | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load_contrast_prompts(path)
    assert all(part in str(caught.value) for part in ["mine.yaml", *expected]), str(caught.value)


@pytest.mark.parametrize(("text", "expected"), [(None, "no such file"), ("- 1", "holds list"), ("{", "is not YAML")])
def test_a_template_file_that_is_none(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_contrast_prompts(tmp_path / "mine.yaml")


def test_another_file_is_used(tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT_FILE.read_text())
    content["without_response"]["better"] = "Please: {prompt}"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert load_contrast_prompts(tmp_path / "mine.yaml", include_response=False).better == "Please: {prompt}"


# --- tokenisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["standard", "standard_implicit", "conversational", "conversational_implicit"])
def test_prompts_are_added_and_nothing_else_changes(tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    rows = list(forms()[form])
    plain = converted(rows, tokenizer)
    contrasted = converted(rows, tokenizer, contrast=OWN)
    added = {"better_prompt_ids", "worse_prompt_ids", "source_row", "completion_lengths"}
    assert [{k: v for k, v in row.items() if k not in added} for row in contrasted] == plain
    assert all(set(row) - set(base) == added for row, base in zip(contrasted, plain, strict=True))


def test_plain_text_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = converted([pair("2 + 2 = ", "4", "5")], tokenizer, contrast=OWN)
    decoded = [[tokenizer.decode(ids) for ids in row[f"{side}_prompt_ids"]] for side in ("better", "worse")]
    assert decoded == [["2 + 2 = |4|good->", "2 + 2 = |5|good->"], ["2 + 2 = |4|bad->", "2 + 2 = |5|bad->"]]


def test_a_conversation_gets_a_new_user_message_and_the_same_header(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": [message("system", "Be brief."), message("user", "2 + 2?")], "chosen": "4", "rejected": "5"}
    (plain,) = converted([row], tokenizer)
    (contrasted,) = converted([row], tokenizer, contrast=BARE)
    assert contrasted["better_prompt_ids"][0] == contrasted["better_prompt_ids"][1]
    expected = tokenizer.decode(plain["prompt_ids"]).replace("2 + 2?", "2 + 2?|good")
    assert tokenizer.decode(contrasted["better_prompt_ids"][0]) == expected
    assert tokenizer.decode(contrasted["worse_prompt_ids"][1]) == expected.replace("good", "bad")


def test_an_end_the_plain_prompt_loses_is_lost_by_the_others_too(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template that opens the turn with a mark that it never writes: the completion follows the header without it."""
    opening = "{% if add_generation_prompt %}A:<hm>{% endif %}"
    body = (
        "{% for m in messages %}{{ 'A:' if m['role'] == 'assistant' else 'U:' }}{{ m['content'] + '\\n' }}{% endfor %}"
    )
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", chat_template=body + opening
    )
    row = {"prompt": [message("user", "q")], "chosen": "yes", "rejected": "no"}
    (found,) = converted([row], other, contrast=BARE)
    assert other.decode(found["prompt_ids"]) == "U:q\nA:"
    assert other.decode(found["better_prompt_ids"][0]) == "U:q|good\nA:"


def test_source_rows_survive_drops_and_streams_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("q", "same", "same"), pair("1 2:", "3 4 5 6", "7"), pair("1 2:", "3", "7")]
    found = converted(rows, tokenizer, contrast=BARE, max_dropped_fraction=0.5, max_length=8)
    assert [row["source_row"] for row in found] == [1, 2]
    whole = converted(rows[1:], tokenizer)
    assert [row["completion_lengths"] for row in found] == [[len(c) for c in row["completion_ids"]] for row in whole]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(DataError, match=r"alignkit score, or write streaming: false"):
        to_candidate_rows(stream, tokenizer, max_length=None, num_candidates=2, contrast=BARE)


# --- rows that carry token rewards ------------------------------------------------------------------------------------


def rewarded(tokenizer: Any, count: int = 3, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs with the rewards 0, 1/8, 2/8, ... on the chosen and -0, -1/8, ... on the rejected side, and their ids."""
    pairs = [pair(f"{i} + 1 =", f" {i + 1} of them", f" {i} or so, I am sure") for i in range(count)]
    ids = converted(pairs, tokenizer)
    for row, found in zip(pairs, ids, strict=True):
        chosen, rejected = (len(completion) for completion in found["completion_ids"])
        row["chosen_token_rewards"] = [t / 8 for t in range(chosen)]
        row["rejected_token_rewards"] = [-t / 8 for t in range(rejected)]
    return [{**row, **changes} for row in pairs], ids


def test_rewards_are_cut_with_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, whole = rewarded(tokenizer)
    for limit in (None, *range(len(whole[0]["prompt_ids"]) + 2, len(whole[0]["prompt_ids"]) + 10)):
        for row, ids in zip(converted(pairs, tokenizer, max_length=limit), whole, strict=True):
            room = None if limit is None else limit - len(row["prompt_ids"])
            assert row["completion_ids"] == [completion[:room] for completion in ids["completion_ids"]]
            assert row["token_rewards"] == [
                [sign * t / 8 for t in range(len(completion))]
                for sign, completion in zip((1, -1), row["completion_ids"], strict=True)
            ]


def test_rewards_of_lists_move_with_their_completions(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, scores = ["a", "b c", "d", "e f g"], [0.0, 2.0, 1.0, 2.0]
    lengths = [len(tokenizer(text + tokenizer.eos_token)["input_ids"]) for text in texts]
    rewards = [[float(k)] * length for k, length in enumerate(lengths)]
    row = {"prompt": "q:", "completions": texts, "scores": scores, "token_rewards": rewards}
    (found,) = converted([row], tokenizer, num_candidates=None)
    assert found["scores"] == [2.0, 2.0, 1.0, 0.0]
    assert found["token_rewards"] == [rewards[k] for k in (1, 3, 2, 0)]
    two = {name: value[:2] if isinstance(value, list) else value for name, value in row.items()}
    (as_pair,) = converted([two], tokenizer)
    assert as_pair["token_rewards"] == rewards[1::-1] and as_pair["scores"] == [1.0, 0.0]


def test_contrast_prompts_are_not_made_for_rows_with_rewards(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, _ = rewarded(tokenizer)
    (first, *_) = converted(pairs, tokenizer, contrast=OWN)
    assert set(first) == {"prompt_ids", "completion_ids", "scores", "token_rewards"}


def test_streamed_rewards_are_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, _ = rewarded(tokenizer, 100)
    stream = Dataset.from_list(pairs).to_iterable_dataset()
    rows, report = to_candidate_rows(stream, tokenizer, max_length=12, num_candidates=2)
    assert list(rows) == converted(pairs, tokenizer, max_length=12)
    assert report.kind.endswith("token rewards")
    pairs[80]["chosen_token_rewards"] += [0.0]
    late, _ = to_candidate_rows(
        Dataset.from_list(pairs).to_iterable_dataset(), tokenizer, max_length=None, num_candidates=2
    )
    with pytest.raises(DataError, match="row 80: [0-9]+ rewards for [0-9]+ tokens"):
        list(late)


def longer(values: list[float]) -> list[float]:
    return [*values, 0.0]


@pytest.mark.parametrize("change", [longer, lambda values: values[:-1], lambda values: []])
def test_a_wrong_length_is_refused_with_examples(
    tokenizer: PreTrainedTokenizerFast, change: Callable[[list[float]], list[float]]
) -> None:
    pairs, ids = rewarded(tokenizer, 6)
    for row in pairs[2:]:
        row["rejected_token_rewards"] = change(row["rejected_token_rewards"])
    text = refusal(pairs, tokenizer, max_length=8, name="mine")
    tokens = len(ids[2]["completion_ids"][1])
    given = len(change([0.0] * tokens))
    assert text.startswith("mine: rows that cannot be trained on (the first row is row 0): 1 problem")
    assert f"4 rows: row 2: {given} rewards for {tokens} tokens; row 3: " in text and text.endswith("...")
    assert "EOS included, counted before truncation" in text and "alignkit score" in text


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (None, "chosen_token_rewards is null: give every completion token rewards, or none"),
        ("0.1 0.2", "chosen_token_rewards holds str, expected lists of numbers"),
        ([0.1, None], "holds something that is not a number"),
        ([0.1, math.nan], "holds NaN or infinity"),
        ([math.inf, 0.1], "holds NaN or infinity"),
    ],
)
def test_bad_values_are_refused(tokenizer: PreTrainedTokenizerFast, rewards: Any, expected: str) -> None:
    pairs, _ = rewarded(tokenizer, 1, chosen_token_rewards=rewards)
    assert expected in refusal(pairs, tokenizer)


def test_bad_lists_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "q:", "completions": ["a", "b"], "scores": [0, 1], "token_rewards": [[0.1, 0.2]]}
    text = refusal([row], tokenizer, num_candidates=None)
    assert "token_rewards and completions differ in number" in text and "2 completions, 1 lists" in text


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "chosen", "rejected", "chosen_token_rewards"], "pairs take chosen_token_rewards and rejected_"),
        (["prompt", "chosen", "rejected", "token_rewards"], "pairs take chosen_token_rewards and rejected_"),
        (["prompt", "completions", "scores", "chosen_token_rewards"], "candidate lists take token_rewards"),
    ],
)
def test_reward_columns_must_fit_the_form(columns: list[str], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        detect_kind(columns, [dict.fromkeys(columns, "x")], name="rows")
