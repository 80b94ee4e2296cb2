"""Which tokens of conversations are trained where nothing is said of it: what the assistant wrote, in any template."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

from alignkit.data.report import data_report
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.errors import DataError, ModelError
from alignkit.shapes._tokens import trained_tokens
from tests.data.rows import message

EOS = "<|endoftext|>"
SYSTEM, ASK, ANSWER, ASK2, ANSWER2 = (
    message("system", "Be brief."), message("user", "What is two and two?"), message("assistant", "Four, I say."),
    message("user", "Are you sure?"), message("assistant", "Yes, quite."),
)  # fmt: skip
TALKS = {
    "one": [ASK, ANSWER],
    "system": [SYSTEM, ASK, ANSWER],
    "two": [ASK, ANSWER, ASK2, ANSWER2],
    "open": [ASK, ANSWER, ASK2, ANSWER2, ASK],
    "answers in a row": [ASK, ANSWER, ANSWER2],
}


def with_template(tokenizer: Any, template: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS, bos_token=EOS)
    made.chat_template = template
    return made


def without_marks(tokenizer: Any) -> PreTrainedTokenizerFast:
    template = tokenizer.chat_template
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        assert mark in template
        template = template.replace(mark, "")
    return with_template(tokenizer, template)


def convert(talk: list[Any], tokenizer: Any, trained: TrainedTokens | None = None) -> tuple[Any, Any]:
    """The row of a conversation and the report."""
    chosen = trained_tokens(None, None, tokenizer) if trained is None else trained
    rows, report = to_supervised_rows(
        Dataset.from_list([{"messages": talk}]), tokenizer, max_length=None, trained=chosen
    )
    return rows[0], report


def runs(row: Any, tokenizer: Any) -> tuple[str, list[str]]:
    """What stands outside of the trained tokens, and each run of them, as text."""
    pieces = [
        (trained, tokenizer.decode([token for token, _ in run]))
        for trained, run in groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != -100)
    ]
    return " ".join(t for trained, t in pieces if not trained), [text for trained, text in pieces if trained]


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_turns_are_found_where_a_marked_template_marks_them(tokenizer: Any, talk: list[Any]) -> None:
    bare = without_marks(tokenizer)
    assert trained_tokens(None, None, bare).chat_template is None, "TRL does not know this template"
    end = max(place for place, said in enumerate(talk) if said["role"] == "assistant") + 1
    expected, _ = convert(talk[:end], tokenizer, TrainedTokens(assistant_only=True))
    found, report = convert(talk, bare)
    assert found == expected and any(label != -100 for label in found["labels"])
    assert (report.num_turns, report.num_turns_left) == (sum(m["role"] == "assistant" for m in talk), 0)


def test_a_template_with_marks_is_taken_at_its_word(tokenizer: Any) -> None:
    for talk in TALKS.values():
        assert convert(talk, tokenizer)[0] == convert(talk, tokenizer, TrainedTokens(assistant_only=True))[0]


def trl_templates() -> list[tuple[str, str]]:
    """The templates that TRL has a training variant of, with that."""
    ending = "_training_chat_template"
    names = [name.removesuffix(ending) for name in vars(chat_template_utils) if name.endswith(ending)]
    # Those of images write content in parts alone.
    names = [name for name in names if name not in ("get", "idefics3", "llava_next", "smolvlm")]
    return [(vars(chat_template_utils)[n + "_chat_template"], vars(chat_template_utils)[n + ending]) for n in names]


def test_in_every_template_of_trl_rows_are_its_own_and_answers_alone_are_trained(tokenizer: Any) -> None:
    """Beside the answers nothing is trained but what the template puts around them."""
    templates, num_marked, num_left = trl_templates(), 0, 0
    assert len(templates) > 25
    for template, _ in templates:
        known = with_template(tokenizer, template)
        chosen = trained_tokens(None, None, known)
        for talk in (TALKS["one"], TALKS["two"]):
            text = known.apply_chat_template(talk, tokenize=False)
            row, report = convert(talk, known, chosen)
            assert row["input_ids"] == known(text, add_special_tokens=False)["input_ids"]
            outside, trained = runs(row, known)
            assert "two and two" in outside and talk[-1]["content"] in trained[-1]
            assert not any("sure" in run or "two and" in run for run in trained)
            assert sum(answer in "".join(trained) for answer in ("Four, I say.", "Yes, quite.")) == (
                report.num_turns - report.num_turns_left
            )
            num_left += report.num_turns_left
            num_marked += report.num_turns - report.num_turns_left
    assert num_marked > 3 * num_left > 0, "most templates write all turns alike, those that think do not"


def test_an_earlier_turn_that_is_written_otherwise_is_left_and_said(tokenizer: Any) -> None:
    """Qwen3 writes thoughts, be they empty, into the last turn alone; the variant of TRL into all."""
    qwen3 = with_template(tokenizer, chat_template_utils.qwen3_chat_template)
    assert trained_tokens(None, None, qwen3).chat_template == chat_template_utils.qwen3_training_chat_template
    row, report = convert(TALKS["two"], qwen3)
    outside, trained = runs(row, qwen3)
    assert trained == ["<think>\n\n</think>\n\nYes, quite.<|im_end|>\n"] and "Four, I say." in outside
    assert (report.num_turns, report.num_turns_left) == (2, 1)
    shown = data_report({"train": to_supervised_rows(
        Dataset.from_list([{"messages": TALKS["two"]}]), qwen3, max_length=None,
        trained=trained_tokens(None, None, qwen3))}, qwen3).render()  # fmt: skip
    assert "1 of 2 turns of the assistant are trained: the chat template writes the others otherwise" in shown
    asked, _ = convert(TALKS["two"], qwen3, trained_tokens(None, True, qwen3))
    assert "<think>\n\n</think>\n\nFour, I say.<|im_end|>" in "".join(runs(asked, qwen3)[1]), "asked for: as TRL"


def test_a_variant_that_says_something_else_marks_nothing(tokenizer: Any) -> None:
    bare = without_marks(tokenizer)
    other = tokenizer.chat_template.replace("eos_token", "eos_token + '!'")
    expected, _ = convert(TALKS["two"], bare)
    assert convert(TALKS["two"], bare, TrainedTokens(chat_template=other))[0] == expected
    refusing = "{{ raise_exception('no') }}" + tokenizer.chat_template
    assert convert(TALKS["two"], bare, TrainedTokens(chat_template=refusing))[0] == expected


def test_the_stop_token_behind_a_mark_is_trained(tokenizer: Any) -> None:
    template = tokenizer.chat_template.replace("message['content'] + eos_token", "message['content']").replace(
        "{%- endgeneration -%}", "{%- endgeneration -%}{{- eos_token -}}"
    )
    late = with_template(tokenizer, template)
    assert runs(convert(TALKS["two"], late)[0], late)[1] == ["Four, I say." + EOS, "Yes, quite." + EOS]
    assert runs(convert(TALKS["two"], late, TrainedTokens(assistant_only=True))[0], late)[1] == [
        "Four, I say.", "Yes, quite.",
    ]  # fmt: skip


def test_an_opening_that_says_more_than_the_answer(tokenizer: Any) -> None:
    """A template that opens the turn with a thought, and shows none, as those of reasoning models do."""
    bare = without_marks(tokenizer)
    thinking = with_template(tokenizer, bare.chat_template + "{% if add_generation_prompt %}<think>{% endif %}")
    expected, _ = convert(TALKS["two"], bare)
    assert convert(TALKS["two"], thinking)[0] == expected


def test_an_opening_that_rewrites_what_was_said_tells_nothing(tokenizer: Any) -> None:
    bare = without_marks(tokenizer)
    rewriting = with_template(tokenizer, "{% if add_generation_prompt %}again: {% endif %}" + bare.chat_template)
    with pytest.raises(DataError, match="no token is trained"):
        convert(TALKS["two"], rewriting)


@pytest.mark.parametrize(
    ("talk", "num_left"), [([ANSWER2, ASK, ANSWER], 1), ([SYSTEM, ANSWER2, ASK, ANSWER], 0)], ids=["first", "second"]
)
def test_a_turn_that_nothing_stands_before_is_left(tokenizer: Any, talk: list[Any], num_left: int) -> None:
    row, report = convert(talk, without_marks(tokenizer))
    assert report.num_turns_left == num_left and len(runs(row, tokenizer)[1]) == 2 - num_left


def test_conversations_without_an_answer_are_refused(tokenizer: Any) -> None:
    for talk in ([ASK], [ANSWER]):
        with pytest.raises(DataError, match=r"no token is trained(.|\n)*or write assistant_only_loss: false"):
            convert(talk, without_marks(tokenizer))
    assert convert([ASK], without_marks(tokenizer), TrainedTokens(assistant_only=False))[1].num_trained_tokens > 0


def test_prompts_that_are_to_be_trained_are(tokenizer: Any) -> None:
    whole, _ = convert(TALKS["two"], tokenizer, TrainedTokens(assistant_only=False))
    assert convert(TALKS["two"], tokenizer, TrainedTokens(completion_only=False))[0] == whole
    assert all(label != -100 for label in whole["labels"])


def test_asking_for_marks_that_nobody_makes_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="Leave the key out, so that they are told apart turn by turn"):
        trained_tokens(None, True, without_marks(tokenizer))
