"""Checks made on tokenised rows before training: what the chat template and the tokenizer did to them.

The expensive way to learn that a model never stops, or was trained on a context it will not see, is to train it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from alignkit.data.prefix import CandidateCollator, Layout
from alignkit.data.split_report import Check, SplitReport
from alignkit.errors import DataError


def require_template(tokenizer: PreTrainedTokenizerBase, *, conversational: bool, name: str) -> None:
    """Raise DataError when the tokenizer cannot render the rows.

    Args:
        conversational: Whether the rows are messages.
        name: What the rows are called in an error.
    """
    if conversational and tokenizer.chat_template is None:
        advice = (
            "the rows are messages but the tokenizer has no chat template. Set chat_template to a jinja file, take an "
            "instruct model, or write prompt and completions as plain text"
        )
        raise DataError(f"{name}: cannot be rendered", [advice])
    if not conversational and tokenizer.eos_token is None:
        advice = "the tokenizer has no EOS token to end a completion with. Set tokenizer.eos_token, or use messages"
        raise DataError(f"{name}: cannot be tokenised", [advice])


def tokens_after_stop(
    completion_ids: Sequence[int], stop_token_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Number of white-space tokens after the stop token that ends a completion, or None when none ends it.

    Args:
        completion_ids: An untruncated completion.
        stop_token_ids: Ids at which generation stops.
        tokenizer: Decodes the tokens after the stop token.
    """
    for count, token in enumerate(reversed(completion_ids)):
        if token in stop_token_ids:
            return count
        if tokenizer.decode([token]).strip():
            return None
    return None


def has_doubled_token(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether a sequence begins with two BOS or ends in two EOS tokens.

    Args:
        completion_ids: An untruncated completion.
        tokenizer: Names the two tokens.
    """
    # Hardly a row has the same token twice there, and to ask a tokenizer for its tokens takes long.
    doubled_bos = _is_twice(prompt_ids[:2]) and prompt_ids[0] == tokenizer.bos_token_id
    return doubled_bos or (_is_twice(completion_ids[-2:]) and completion_ids[-1] == tokenizer.eos_token_id)


def _is_twice(ids: Sequence[int]) -> bool:
    return len(ids) == 2 and ids[0] == ids[1]


def check_rows(report: SplitReport) -> list[Check]:
    """The checks of a split that hold for rows of any family.

    Args:
        report: What the conversion counted.
    """
    return [
        _check_stop_token(report),
        _check_prompt_prefix(report),
        _check_special_tokens(report),
    ]


def _check_stop_token(report: SplitReport) -> Check:
    name = "the stop token is trained"
    whole, stopped = report.num_whole_completions, report.num_stopped_completions
    if whole == 0:
        advice = f"raise max_length to {report.recommended_max_length}"
        return Check(name, "warn", f"no completion is whole, so none ends in a stop token: {advice}")
    if stopped == whole:
        after = f", then template text {report.text_after_stop!r}, kept as TRL does" if report.text_after_stop else ""
        return Check(name, "ok", f"all {whole} whole completions end in one{after}")
    found = f"{whole - stopped} of {whole} whole completions do not end in a stop token but in {report.unstopped_end!r}"
    advice = "the model would not learn to stop: end the template's assistant turn with eos_token, or add that token to"
    return Check(name, "warn" if stopped else "fail", f"{found}; {advice} eos_token_id of the generation config")


def _check_prompt_prefix(report: SplitReport) -> Check:
    name = "the prompt is a prefix of prompt + completion"
    if report.num_cut_prompts == 0:
        return Check(name, "ok", "in every row")
    found = f"not in {report.num_cut_prompts} of {report.num_rows_in} rows, whose prompt lost an end like "
    advice = "the model trains on a context it will not see: end prompts on a token boundary (a newline, no trailing"
    return Check(name, "warn", f"{found}{report.cut_prompt_end!r}; {advice} space), or mend the template")


def _check_special_tokens(report: SplitReport) -> Check:
    name = "no special token is doubled"
    if report.num_doubled_tokens == 0:
        return Check(name, "ok", "in every row")
    advice = "take BOS and EOS out of the texts (the tokenizer adds them), or out of the template"
    return Check(name, "warn", f"{report.num_doubled_tokens} rows begin with two BOS or end in two EOS; {advice}")


def check_padding(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> Check:
    """Whether padding hides no completion token.

    Args:
        tokenizer: The tokenizer of the rows.
        rows: A few candidate rows, which are collated to see it.
    """
    name = "padding hides no completion token"
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = eos if pad is None else pad
    expected = sum(len(completion) for row in rows for completion in row["completion_ids"])
    for layout in get_args(Layout):
        trained = int(CandidateCollator(pad_token_id=pad or 0, layout=layout)(rows)["completion_mask"].sum())
        if trained != expected:
            return Check(name, "fail", f"layout {layout} trains {trained} of {expected} completion tokens")
    same = " (pad and EOS are the same token here, which is harmless)" if pad == eos else ""
    return Check(name, "ok", f"masks come from lengths, not from token ids{same}")
