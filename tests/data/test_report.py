"""The checks see what they should, and the report says it in text and as data."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from alignkit.data import templates
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.checks import TEMPLATE_CHECK
from alignkit.data.report import DataReport, data_report
from alignkit.data.split_report import Check
from alignkit.data.templates import has_doubled_token, tokens_after_stop
from alignkit.errors import DataError
from tests.data.rows import forms, message, pair

STOP = "the stop token is trained"
PADDING = "padding hides no completion token"
PREFIX = "the prompt is a prefix of prompt + completion"
DIFFER = "the candidates of a row differ"
DOUBLED = "no special token is doubled"
FIT = "rows fit max_length"

TALK = [pair([message("user", "2 + 2?")], [message("assistant", "4")], [message("assistant", "5")])]


def report_of(rows: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> DataReport:
    options = {"max_length": 64, "num_candidates": 2, **options}
    return data_report({"train": to_candidate_rows(Dataset.from_list(list(rows)), tokenizer, **options)}, tokenizer)


def check_of(report: DataReport, name: str) -> Check:
    (found,) = [check for check in report.checks["train"] if check.name == name]
    return found


def variant(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    options = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "chat_template": tokenizer.chat_template}
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(options | changes))


def test_good_rows_pass_every_check(tokenizer: PreTrainedTokenizerFast) -> None:
    for form in ("standard", "conversational"):
        report = report_of(list(forms()[form])[:2], tokenizer, max_length=None)
        assert {check.status for check in report.checks["train"] if check.name != TEMPLATE_CHECK} == {"ok"}
        report.raise_for_failures()


def test_template_without_a_stop_token_fails(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = variant(tokenizer, chat_template=tokenizer.chat_template.replace("+ eos_token", "+ '!'"))
    report = report_of(TALK, endless)
    check = check_of(report, STOP)
    assert check.status == "fail"
    assert "2 of 2 whole completions do not end in a stop token but in '4!'" in check.message
    with pytest.raises(DataError, match="the model would not learn to stop"):
        report.raise_for_failures()


def test_stop_tokens_of_the_generation_config_count(tokenizer: PreTrainedTokenizerFast) -> None:
    turn_end = tokenizer.convert_tokens_to_ids("<|user|>")
    template = tokenizer.chat_template.replace("+ eos_token", "+ '<|user|>'")
    other = variant(tokenizer, chat_template=template)
    assert check_of(report_of(TALK, other), STOP).status == "fail"
    assert check_of(report_of(TALK, other, stop_token_ids=[turn_end]), STOP).status == "ok"


def test_some_completions_without_a_stop_token_warn(tokenizer: PreTrainedTokenizerFast) -> None:
    template = tokenizer.chat_template.replace(
        "message['content'] + eos_token", "message['content'] + (eos_token if message['content'] == '4' else '')"
    )
    check = check_of(report_of(TALK, variant(tokenizer, chat_template=template)), STOP)
    assert check.status == "warn" and "1 of 2" in check.message


def test_template_text_after_the_stop_token_is_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    template = tokenizer.chat_template.replace("+ eos_token", "+ eos_token + '\\n'")
    check = check_of(report_of(TALK, variant(tokenizer, chat_template=template)), STOP)
    assert check.status == "ok" and "then template text '\\n', kept as TRL does" in check.message


def test_no_whole_completion_leaves_the_stop_token_open(tokenizer: PreTrainedTokenizerFast) -> None:
    report = report_of([pair("1:", "2 3 4 5 6", "6 5 4 3 2")], tokenizer, max_length=4)
    assert check_of(report, STOP).status == "warn"
    assert "raise max_length to 64" in check_of(report, STOP).message
    assert check_of(report, FIT).status == "fail"
    assert "1 of 1 rows (100.0%) are cut at 4 tokens" in check_of(report, FIT).message


def test_pad_equal_to_eos_hides_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    for pad in ("<|endoftext|>", None):
        check = check_of(
            report_of([pair(), pair("a longer one", "x", "y")], variant(tokenizer, pad_token=pad)), PADDING
        )
        assert check.status == "ok" and "pad and EOS are the same token here" in check.message
    assert "same token" not in check_of(report_of([pair()], tokenizer), PADDING).message


def test_a_collator_that_masks_by_token_id_would_fail(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MaskById(templates.CandidateCollator):
        def __call__(self, rows: Any) -> Any:
            batch = super().__call__(rows)
            if self.layout == "padded":
                shown = (
                    (batch["input_ids"] != self.pad_token_id).view(2, -1, batch["input_ids"].shape[1]).transpose(0, 1)
                )
                batch["completion_mask"] = batch["completion_mask"] & shown[:, :, 1:]
            return batch

    monkeypatch.setattr(templates, "CandidateCollator", MaskById)
    report = report_of([pair(), pair("longer", "x", "y")], variant(tokenizer, pad_token="<|endoftext|>"))
    assert check_of(report, PADDING).status == "fail"


def test_prompts_that_lose_their_end_warn(tokenizer: PreTrainedTokenizerFast) -> None:
    check = check_of(report_of([pair("Mia has ", "apples", "books"), pair("Mia has", " 1", " 2")], tokenizer), PREFIX)
    assert check.status == "warn"
    assert "not in 1 of 2 rows, whose prompt lost an end like ' '" in check.message


def test_rows_without_a_preference_warn(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(), pair("q", "same", "same")]
    check = check_of(report_of(rows, tokenizer, max_dropped_fraction=0.5), DIFFER)
    assert check.status == "warn" and "1 of 2 rows prefer nothing" in check.message


def test_doubled_special_tokens_warn(tokenizer: PreTrainedTokenizerFast) -> None:
    with_bos = variant(tokenizer, bos_token="<|system|>")
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 2)]
    )
    assert check_of(report_of([pair("<|system|>q")], with_bos), DOUBLED).status == "warn"
    assert check_of(report_of([pair("q")], with_bos), DOUBLED).status == "ok"
    assert has_doubled_token([5], [6, 1, 1], tokenizer) and not has_doubled_token([5], [6, 1], tokenizer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4<|endoftext|>", 0), ("4<|endoftext|>\n", 1), ("4<|endoftext|>x", None), ("4", None), ("\n", None)],
)
def test_tokens_after_stop(tokenizer: PreTrainedTokenizerFast, text: str, expected: int | None) -> None:
    assert tokens_after_stop(tokenizer(text)["input_ids"], frozenset([1]), tokenizer) == expected


@pytest.fixture
def two_splits(tokenizer: PreTrainedTokenizerFast) -> DataReport:
    """A training split with a cut and a dropped row, and an evaluation split."""
    train = [*TALK, *TALK, pair([message("user", "1 2 3")], TALK[0]["chosen"], [message("assistant", "9 " * 40)])]
    train.append(pair([message("user", "8 " * 80)], TALK[0]["chosen"], TALK[0]["rejected"]))
    options = {"max_length": 40, "num_candidates": 2, "max_dropped_fraction": 0.5}
    return data_report(
        {
            "train": to_candidate_rows(Dataset.from_list(train), tokenizer, name="train", **options),
            "eval": to_candidate_rows(Dataset.from_list(TALK), tokenizer, name="eval", **options),
        },
        tokenizer,
    )


def test_rendered_report(two_splits: DataReport) -> None:
    lines = two_splits.render().splitlines()
    cells = {line[:40].split("  ")[0]: line.split() for line in lines}
    assert lines[0] == "conversational pairs, explicit prompt"
    assert cells["rows"][1:] == ["train", "eval"]
    assert cells["read"][1:] == ["4", "1"]
    assert cells["dropped: prompt alone fills max_length"][-2:] == ["1", "0"]
    assert cells["trained on"][-2:] == ["3", "1"]
    assert cells["cut at max_length"][-2:] == ["1", "0"]
    assert cells["mean score gap"][-2:] == ["1", "1"]
    assert cells["tokens before truncation"][3:] == ["min", "50", "%", "90", "%", "99", "%", "max"]
    assert "checks of train" in lines and "checks of eval" in lines
    table = lines[1 : lines.index("")]
    assert len({len(line) for line in table}) == 1, "columns are aligned"


def test_trained_tokens_are_marked(two_splits: DataReport) -> None:
    text = two_splits.render()
    assert "  prompt    <|user|>\\n\n            2 + 2?\\n\n            <|assistant|>\\n\n" in text
    assert "  chosen    [[4<|endoftext|>]]\n" in text
    assert "  rejected  [[5<|endoftext|>]]\n" in text


def test_colour_only_on_a_terminal(two_splits: DataReport, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, coloured = io.StringIO(), Terminal()
    two_splits.print_to(plain)
    two_splits.print_to(coloured)
    assert "\033[" not in plain.getvalue() and "[[4<|endoftext|>]]" in plain.getvalue()
    assert "\033[" in coloured.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    quiet = Terminal()
    two_splits.print_to(quiet)
    assert quiet.getvalue() == plain.getvalue()


def test_report_as_data(two_splits: DataReport) -> None:
    data = json.loads(json.dumps(two_splits.to_dict()))
    train = data["splits"][0]
    assert train["num_rows_in"] == 4 and train["dropped"] == {"prompt alone fills max_length": 1}
    assert set(train["lengths"]) == {"prompt", "completion", "prompt + completion"}
    assert data["checks"]["eval"][1] == {"name": STOP, "status": "ok", "message": "all 2 whole completions end in one"}
    assert data["example"]["completions"][0] == ["chosen", "4<|endoftext|>"]


def test_lists_show_their_scores_and_long_texts_are_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "q " * 800 + ":", "completions": ["a", "b", "c"], "scores": [0.5, 2, -1]}
    text = report_of([row], tokenizer, max_length=None, num_candidates=None).render()
    assert "  score 2    [[b<|endoftext|>]]\n  score 0.5  [[a<|endoftext|>]]\n  score -1   [[c" in text
    assert "(801 characters)" in text and len(text) < 4000


def test_streamed_rows_are_marked_as_a_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = Dataset.from_list([pair()] * 70).to_iterable_dataset()
    converted = to_candidate_rows(stream, tokenizer, max_length=None, num_candidates=2)
    text = data_report({"train": converted}, tokenizer).render()
    assert "train (first rows)" in text
