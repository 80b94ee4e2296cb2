"""Candidate rows: validation, order, truncation, what is dropped and counted, streaming, caching."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from alignkit.data import conversion
from alignkit.data.candidate_report import (
    EQUAL_AFTER_CUT,
    EQUAL_SCORES,
    IDENTICAL,
    LOST_PROMPT,
    NO_ROOM,
    NO_TOKENS,
    ConversionReport,
)
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows
from alignkit.data.synthetic import make_corpus, train_tokenizer
from alignkit.errors import DataError
from tests.data.rows import forms, message, pair

EOS = 1


def converted(rows: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> tuple[list[Any], ConversionReport]:
    options = {"max_length": None, "num_candidates": 2, **options}
    dataset, report = to_candidate_rows(Dataset.from_list(list(rows)), tokenizer, **options)
    return list(dataset), report


def message_of(rows: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        converted(rows, tokenizer, **options)
    return str(caught.value)


def test_candidate_lists_are_sorted_by_descending_score_and_ties_keep_their_order(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [
        {"prompt": "q:", "completions": ["low", "high", "mid"], "scores": [-1.5, 4, 2]},
        {"prompt": "q:", "completions": ["a", "b", "c", "d"], "scores": [0, 1, 0, 1]},
    ]
    found, report = converted(rows, tokenizer, num_candidates=None)
    texts = [[tokenizer.decode(ids).removesuffix("<|endoftext|>") for ids in row["completion_ids"]] for row in found]
    assert texts == [["high", "mid", "low"], ["b", "d", "a", "c"]]
    assert found[0]["scores"] == [4.0, 2.0, -1.5] and found[1]["scores"] == [1.0, 1.0, 0.0, 0.0]
    assert tokenizer.decode(found[0]["prompt_ids"]) == "q:"
    assert report.candidates_per_row == {3: 1, 4: 1}
    assert report.mean_score_gap == pytest.approx((5.5 + 1) / 2)


def test_a_pair_method_sorts_lists_of_two(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "q:", "completions": ["worse", "better"], "scores": [0.2, 0.9]},
        {"prompt": "q:", "completions": ["better", "worse"], "scores": [7, -7]},
    ]
    found, report = converted(rows, tokenizer)
    for row in found:
        assert [tokenizer.decode(ids) for ids in row["completion_ids"]] == ["better<|endoftext|>", "worse<|endoftext|>"]
        assert row["scores"] == [1.0, 0.0]
    assert report.mean_score_gap == pytest.approx((0.7 + 14) / 2)


def test_text_answers_to_a_conversation_become_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    user = [message("user", "2 + 2?")]
    as_text, _ = converted([pair(user, "4", "5")], tokenizer)
    as_messages, _ = converted([pair(user, [message("assistant", "4")], [message("assistant", "5")])], tokenizer)
    assert as_text == as_messages


def test_a_prompt_repeated_beside_conversations_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = list(forms()["conversational_implicit"])
    assert converted([row | {"prompt": "q"} for row in whole], tokenizer)[0] == converted(whole, tokenizer)[0]


def test_every_kind_of_bad_row_is_in_one_error(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 0.0]} for _ in range(400)]
    for number in (3, 290, 291, 292):
        rows[number] = rows[number] | {"prompt": " "}
    rows[7] = rows[7] | {"scores": [math.nan, 0.0]}
    rows[350] = {"prompt": "q", "completions": ["only"], "scores": [1.0]}
    rows[351] = rows[351] | {"scores": [1.0, 1.0]}
    text = message_of(rows, tokenizer, name="my rows")
    assert text.startswith("my rows: rows that cannot be trained on (the first row is row 0): 4 problems")
    assert "4 rows: row 3: ' '; row 290: ' '; row 291: ' '; ..." in text
    assert "NaN or infinite" in text and "1 row: row 7: nan" in text
    assert "fewer than 2 completions" in text and "row 350: 1 completions" in text
    assert "all scores are equal" in text and "row 351" in text


def test_a_pair_method_refuses_longer_lists(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 0, 2]}
    text = message_of([row], tokenizer)
    assert "takes exactly 2 completions a row" in text and "a method for lists, such as lipo" in text
    assert converted([row], tokenizer, num_candidates=None)[1].num_rows == 1


def test_missing_column_and_missing_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "Did you mean 'choosen'?" in message_of([{"prompt": "q", "choosen": "a", "rejected": "b"}], tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    assert "Set chat_template to a jinja file" in message_of(list(forms()["conversational"]), bare)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert "no EOS token" in message_of([pair()], endless)
    assert "the dataset is empty" in message_of([], tokenizer)


def length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def test_truncation_cuts_the_end_and_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("1 2:", "3 4 5 6", "7"), pair("1 2:", "3", "7")]
    limit = length(tokenizer, "1 2:") + 3
    whole, _ = converted(rows, tokenizer)
    cut, report = converted(rows, tokenizer, max_length=limit)
    assert cut[0]["completion_ids"] == [whole[0]["completion_ids"][0][:3], whole[0]["completion_ids"][1]]
    assert cut[1] == whole[1]
    assert EOS not in cut[0]["completion_ids"][0]
    assert (report.num_truncated_rows, report.num_truncated_completions, report.num_dropped) == (1, 1, 0)
    assert (report.num_whole_completions, report.num_stopped_completions) == (3, 3)
    # Lengths are those before truncation.
    assert report.lengths["completion"]["max"] == len(whole[0]["completion_ids"][0])
    assert report.lengths["prompt"]["min"] == length(tokenizer, "1 2:")
    assert report.lengths["prompt + completion"]["max"] == length(tokenizer, "1 2:3 4 5 6") + 1


def test_rows_are_dropped_by_cause(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pair("1:", "2", "3"),
        pair("1:" + " 2" * 40, "2", "3"),
        pair("1:", "4" * 30 + "5", "4" * 30 + "6"),
        pair("1:", "same", "same"),
    ]
    found, report = converted(rows, tokenizer, max_length=20, max_dropped_fraction=0.75)
    assert len(found) == report.num_rows == 1
    assert report.dropped == {NO_ROOM: 1, EQUAL_AFTER_CUT: 1, IDENTICAL: 1}
    full = [pair("1 2:"), pair("1:")]
    _, report = converted(full, tokenizer, max_length=length(tokenizer, "1 2:"), max_dropped_fraction=0.5)
    assert report.dropped == {NO_ROOM: 1}, "a prompt of exactly max_length leaves no room"
    equal = [{"prompt": "q", "completions": ["a", "b"], "scores": [s, 0]} for s in (1, 0)]
    found, report = converted(equal, tokenizer, max_dropped_fraction=0.5)
    assert report.dropped == {EQUAL_SCORES: 1} and len(found) == 1


@pytest.mark.parametrize(("chosen", "rejected"), [("1 2 3 4", "1 2 3 5"), ("1 2", "1 2 3 4"), ("7", "8")])
def test_a_row_is_kept_as_long_as_its_candidates_differ(
    tokenizer: PreTrainedTokenizerFast, chosen: str, rejected: str
) -> None:
    (row,), _ = converted([pair("1 2:", chosen, rejected)], tokenizer)
    start, (first, second) = len(row["prompt_ids"]), row["completion_ids"]
    other = pair(":", "1", "2")
    for limit in range(start + 1, start + 12):
        found, _ = converted(
            [pair("1 2:", chosen, rejected), other], tokenizer, max_length=limit, max_dropped_fraction=0.5
        )
        room = limit - start
        assert len(found) - 1 == (first[:room] != second[:room]), limit


def test_a_completion_that_the_template_swallows(tokenizer: PreTrainedTokenizerFast) -> None:
    silent = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{% for m in messages %}{% if m['content'] != 'x' %}{{ m['content'] }}{% endif %}{% endfor %}",
    )
    rows = [pair([message("user", "q")], [message("assistant", text)], [message("assistant", "b")]) for text in "xa"]
    _, report = converted(rows, silent, max_dropped_fraction=0.5)
    assert report.dropped == {NO_TOKENS: 1}


def test_a_length_is_advised_for_rows_lost_to_the_length_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template writes nothing but the last message, so no row begins with its prompt."""
    forgetful = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{{ messages[-1]['content'] }}",
    )
    row = pair([message("user", "q")], [message("assistant", "a")], [message("assistant", "b")])
    text = message_of([row], forgetful, max_length=256)
    assert LOST_PROMPT in text and "would do" not in text
    swallowed = "{% for m in messages %}{{ m['content'] if m['content'] != 'x' }}{% endfor %}"
    silent = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", chat_template=swallowed
    )
    row = pair([message("user", "q")], [message("assistant", "x")], [message("assistant", "b")])
    text = message_of([row], silent, max_length=256)
    assert NO_TOKENS in text and "would do" not in text


def test_rows_lost_while_sampling_count_as_read_and_as_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("q", "a", "b"), pair("q", "same", "same")]
    found, report = converted(rows, tokenizer, lost={"no sample is left": 1}, max_dropped_fraction=0.67)
    assert (report.num_rows_in, report.num_rows, len(found)) == (3, 1, 1)
    assert report.dropped == {"no sample is left": 1, IDENTICAL: 1} and report.num_dropped == 2
    text = message_of(rows, tokenizer, lost={"no sample is left": 1}, max_dropped_fraction=0.66)
    assert "2 of 3 rows are dropped, max_dropped_fraction 0.66 allows 1" in text
    assert "rows dropped while samples were drawn: no sample is left: 1" in text and "would do" not in text


def test_no_row_left_names_lengths_and_a_length_that_works(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("1 2 3 4 5 6:", str(i), str(i + 1)) for i in range(10)]
    text = message_of(rows, tokenizer, max_length=4)
    assert "10 of 10 rows are dropped" in text and NO_ROOM in text
    assert "max_length is 4; 64 would do" in text
    for word in ("prompt: min", "completion: min", "50 %", "99 %", "max"):
        assert word in text
    assert converted(rows, tokenizer, max_length=64)[1].num_dropped == 0


def test_the_recommended_length_keeps_a_rare_long_row_when_none_may_be_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [pair("q", str(i), "x") for i in range(60)] + [pair("1 2 3 4 5 6 7 8 9 " * 10, "a", "b")]
    lengths = [
        converted(rows, tokenizer, max_dropped_fraction=allowed)[1].recommended_max_length for allowed in (0, 0.1)
    ]
    assert lengths == [192, 64]
    assert converted(rows, tokenizer, max_length=192, max_dropped_fraction=0)[1].num_dropped == 0


def test_too_many_drops_are_refused_with_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("q", f"a{i}", "b") for i in range(18)] + [pair("q", "same", "same")] * 2
    assert converted(rows, tokenizer, max_dropped_fraction=0.1)[1].dropped == {IDENTICAL: 2}
    text = message_of(rows, tokenizer, max_dropped_fraction=0.09)
    assert "2 of 20 rows are dropped, max_dropped_fraction 0.09 allows 1" in text
    assert "2 rows: row 18: prompt 1 tokens" in text
    assert "would do" not in text, "no max_length brings back a preference"


TOKENIZER = train_tokenizer(make_corpus(50, seed=0), vocab_size=270)
TEXTS = st.text("ab ", min_size=1, max_size=30).filter(lambda text: text.strip())


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=12), allowed=st.sampled_from([0.0, 0.1, 0.5]))
def test_the_recommended_length_works(rows: list[tuple[str, str, str]], allowed: float) -> None:
    # Preferences by construction, so that only max_length can drop a row; no rounding, so that the bound is sharp.
    data = [pair(prompt, chosen + "1", rejected + "2") for prompt, chosen, rejected in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "LENGTH_STEP", 1)
        limit = converted(data, TOKENIZER, max_dropped_fraction=allowed)[1].recommended_max_length
    _, report = converted(data, TOKENIZER, max_length=limit, max_dropped_fraction=allowed)
    assert report.num_truncated_rows + report.num_dropped <= 0.05 * len(data)


def test_streamed_rows_are_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(f"{i}:", "1 2 3 4 5 6 7 8 9", str(i)) for i in range(150)] + [pair("q" * 60, "a", "b")]
    table, full = to_candidate_rows(Dataset.from_list(rows), tokenizer, max_length=16, num_candidates=2)
    stream, sample = to_candidate_rows(
        Dataset.from_list(rows).to_iterable_dataset(), tokenizer, max_length=16, num_candidates=2
    )
    assert list(stream) == list(table) and len(table) == 150
    assert stream.column_names == ["prompt_ids", "completion_ids", "scores"]
    assert sample.is_sample and not full.is_sample
    assert (sample.num_rows_in, full.num_rows_in) == (64, 151)


def test_bad_rows_of_a_stream_are_found_up_front_or_when_read(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(f"{i}", "a", "b") for i in range(150)]
    options = {"max_length": None, "num_candidates": 2}
    early = Dataset.from_list([*rows[:5], pair("5", "", "b"), *rows]).to_iterable_dataset()
    with pytest.raises(DataError, match="row 5"):
        to_candidate_rows(early, tokenizer, **options)
    late = Dataset.from_list([*rows[:100], pair("100", "", "b"), *rows]).to_iterable_dataset()
    stream, _ = to_candidate_rows(late, tokenizer, **options)
    with pytest.raises(DataError, match="chosen is empty[^\n]*\n *1 row: row 100"):
        list(stream)
    with pytest.raises(DataError, match="10 of 10 rows are dropped"):
        to_candidate_rows(Dataset.from_list(rows[:10]).to_iterable_dataset(), tokenizer, max_length=1, num_candidates=2)


def test_a_second_conversion_comes_from_the_cache(tokenizer: PreTrainedTokenizerFast, write_jsonl: Any) -> None:
    path = write_jsonl("data.jsonl", [pair(f"{i}:", "a", "b") for i in range(20)])
    first, _ = to_candidate_rows(load_rows(path), tokenizer, max_length=32, num_candidates=2)
    assert first.cache_files
    again, _ = to_candidate_rows(
        load_rows(path), pickle.loads(pickle.dumps(tokenizer)), max_length=32, num_candidates=2
    )
    shorter, _ = to_candidate_rows(load_rows(path), tokenizer, max_length=31, num_candidates=2)
    assert again.cache_files == first.cache_files
    assert shorter.cache_files != first.cache_files


def test_worker_processes_give_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([pair(f"{i}:", "a" * i, "b") for i in range(2, 40)])
    one, report_one = to_candidate_rows(dataset, tokenizer, max_length=32, num_candidates=2)
    two, report_two = to_candidate_rows(dataset, tokenizer, max_length=32, num_candidates=2, num_proc=2)
    assert list(one) == list(two)
    assert report_one == report_two


def test_columns_not_used_are_in_the_report(tokenizer: PreTrainedTokenizerFast) -> None:
    found, report = converted([pair(margin=3)], tokenizer)
    assert report.ignored_columns == ("margin",)
    assert list(found[0]) == ["prompt_ids", "completion_ids", "scores"]
