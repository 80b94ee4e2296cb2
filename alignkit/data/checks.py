"""Checks of whole splits before training: plain text for chat models, rows cut, repeated, or held out and trained."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alignkit.data.repeats import RepeatCounts
from alignkit.data.split_report import Check, SplitReport

TRUNCATION_WARNING = 0.05
"""Share of rows cut by max_length above which a warning is given."""
DUPLICATE_WARNING = 0.05
"""Share of rows that repeat an earlier one, or whose prompt is trained on, above which a warning is given."""
CONTRADICTION_WARNING = 0.01
"""Share of rows that another row contradicts above which a warning is given."""


TEMPLATE_CHECK = "the chat template is applied"


@dataclass(frozen=True)
class Limits:
    """How much of what is found is refused.

    Attributes:
        max_truncated_fraction: Highest share of rows that may be cut at max_length.
        allow_overlap: Whether held-out rows may be trained on.
    """

    max_truncated_fraction: float = 0.5
    allow_overlap: bool = False


def check_template(tokenizer: PreTrainedTokenizerBase, *, conversational: bool) -> Check:
    """Whether rows reach a chat model as the chats it knows.

    Args:
        tokenizer: The tokenizer of the rows.
        conversational: Whether they are messages.
    """
    if conversational:
        return Check(TEMPLATE_CHECK, "ok", "the rows are messages")
    if tokenizer.chat_template is None:
        return Check(TEMPLATE_CHECK, "ok", "there is none, and the rows are plain text")
    found = "not applied: the rows are plain text, trained as they stand, and in a chat the model sees something else"
    advice = "write apply_chat_template: true to make the prompt the user's message and the answer the assistant's"
    return Check(TEMPLATE_CHECK, "warn", f"{found}; {advice}, or give the rows as messages")


def check_truncation(report: SplitReport, limits: Limits) -> Check:
    """How many rows are cut at ``max_length`` or dropped for it.

    Args:
        report: What the conversion counted.
        limits: What is refused.
    """
    name = "rows fit max_length"
    if report.max_length is None or report.num_truncated_rows + report.num_dropped == 0:
        return Check(name, "ok", "all of them")
    share = report.num_truncated_rows / report.num_rows
    found = f"{report.num_truncated_rows} of {report.num_rows} rows ({share:.1%}) are cut at {report.max_length} tokens"
    if share <= TRUNCATION_WARNING:
        return Check(name, "ok", found)
    advice = f"max_length {report.recommended_max_length} holds 95 % of the rows whole"
    if share <= limits.max_truncated_fraction:
        return Check(name, "warn", f"{found}; {advice}")
    allowed = f"max_truncated_fraction {limits.max_truncated_fraction:g} allows "
    allowed += f"{int(limits.max_truncated_fraction * report.num_rows)}: a row that is cut does not show where to stop"
    return Check(name, "fail", f"{found}, {allowed}; {advice}, max_truncated_fraction: 1 trains them as they are")


def check_duplicates(report: SplitReport, counts: RepeatCounts) -> Check:
    """Whether rows differ from one another.

    Args:
        report: What the conversion counted.
        counts: The repeats.
    """
    name, searched = "no row is there twice", _searched(report)
    if not counts.num_duplicates:
        return Check(name, "ok", f"every row is different{searched}")
    share = counts.num_duplicates / report.num_rows
    repeating = _rows_that(counts.num_duplicates, share, "repeats", "repeat")
    found = f"{repeating} an earlier one, token for token{searched}"
    if share <= DUPLICATE_WARNING:
        return Check(name, "ok", found)
    return Check(name, "warn", f"{found}: what is repeated weighs more; remove it, unless that is wanted")


def check_contradictions(report: SplitReport, counts: RepeatCounts) -> Check:
    """Whether rows agree on what is better.

    Args:
        report: What the conversion counted.
        counts: The repeats.
    """
    name, searched = "no two rows contradict each other", _searched(report)
    if not counts.num_contradictions:
        return Check(name, "ok", f"no preference is there the other way round as well{searched}")
    share = counts.num_contradictions / report.num_rows
    preferring = _rows_that(counts.num_contradictions, share, "prefers", "prefer")
    found = f"{preferring} what another row rejects in the same place{searched}"
    if share <= CONTRADICTION_WARNING:
        return Check(name, "ok", found)
    return Check(name, "warn", f"{found}: they cancel each other; remove them, or see whether labels were swapped")


def check_overlap(
    report: SplitReport, training: SplitReport, counts: RepeatCounts, limits: Limits, shown: str
) -> Check:
    """Whether held-out rows are held out.

    Args:
        report: What the conversion counted of the held-out rows.
        training: What it counted of the training rows.
        counts: The repeats.
        limits: What is refused.
        shown: The beginning of the first held-out row that is trained on.
    """
    name, searched = "held-out rows are not trained on", _searched(training)
    what = "an answer that is trained on to the same prompt" if report.trains_tokens else "a prompt that is trained on"
    has = "row has" if counts.num_prompts_trained_on == 1 else "rows have"
    prompts = f"{counts.num_prompts_trained_on} {has} a prompt that is trained on with other answers"
    prompts = f"; {prompts}" if counts.num_prompts_trained_on else ""
    if not counts.num_trained_on:
        many = counts.num_prompts_trained_on > DUPLICATE_WARNING * report.num_rows
        advice = ": what is measured on them is partly memory" if many else ""
        part = "answer" if report.trains_tokens else "prompt"
        return Check(name, "warn" if many else "ok", f"no {part} of theirs is{prompts}{advice}{searched}")
    share = counts.num_trained_on / report.num_rows
    found = f"{counts.num_trained_on} of {report.num_rows} ({share:.1%}) have {what}, token for token, "
    found += f"such as {shown}{prompts}{searched}"
    if limits.allow_overlap:
        return Check(name, "warn", f"{found}: what is measured on them is memory")
    advice = "remove them from one of the two, or write allow_overlap: true to measure memory"
    return Check(name, "fail", f"{found}; {advice}")


def _rows_that(count: int, share: float, one: str, many: str) -> str:
    return f"{count} {'row' if count == 1 else 'rows'} ({share:.1%}) {one if count == 1 else many}"


def _searched(report: SplitReport) -> str:
    """What to add where not all rows were looked at."""
    return " (looked for in the first rows alone, as the rows are streamed)" if report.is_sample else ""
