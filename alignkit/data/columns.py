"""Names of columns: ours, and what others call the same thing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
LIST_COLUMNS = ("prompt", "completions", "scores")
COMPLETION_COLUMNS = ("prompt", "completion")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
PAIR_REWARD_COLUMNS = ("chosen_token_rewards", "rejected_token_rewards")
LIST_REWARD_COLUMNS = ("token_rewards",)
MARGIN_COLUMN = "margin"
DIMENSIONS_COLUMN = "preferences"
_LISTED = 50


class Form(NamedTuple):
    """Columns of one form of rows.

    Attributes:
        columns: Those that make the form.
        optional: Those of them that are missed only where another column looks like them.
        beside: Known columns that rows of this form may have as well; they are never missed.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


LIST_FORM = Form(LIST_COLUMNS, beside=LIST_REWARD_COLUMNS)
PREFERENCE_FORMS = (Form(PAIR_COLUMNS, optional=("prompt",), beside=PAIR_REWARD_COLUMNS), LIST_FORM)
REWARD_FORMS = (
    Form(PAIR_COLUMNS, optional=("prompt",), beside=(MARGIN_COLUMN, DIMENSIONS_COLUMN)),
    Form(LIST_COLUMNS, beside=(MARGIN_COLUMN,)),
)
UNPAIRED_COLUMNS = (*COMPLETION_COLUMNS, "label")
UNPAIRED_FORMS = (Form(UNPAIRED_COLUMNS), Form(PAIR_COLUMNS, optional=("prompt",)))
STEP_FORMS = (Form(("prompt", "completions", "labels")),)
PROMPT_FORM = Form(("prompt",))
NEGATIVE_FORMS = (Form(("prompt", "rejected"), beside=("chosen",)), LIST_FORM)
ROUTED_COLUMNS = ("choices", "task", "success")
ROUTED_FORMS = (Form(COMPLETION_COLUMNS, beside=ROUTED_COLUMNS),)
SUPERVISED_FORMS = (Form(COMPLETION_COLUMNS), Form(("messages",)), Form(("text",)))


def columns_of(forms: Sequence[Form]) -> tuple[str, ...]:
    """Every column that rows of these forms may have, those of the chat template included."""
    required = [name for form in forms for name in form.columns]
    beside = [name for form in forms for name in form.beside]
    return tuple(dict.fromkeys([*required, *TEMPLATE_COLUMNS, *beside]))


@dataclass(frozen=True)
class RowFamily:
    """What the rows of a program may look like.

    Attributes:
        forms: Their forms.
        expected: The forms in words, for an error.
        detect: ``(columns, head, name=...)`` to the kind of the rows; raises DataError for any other.
        prompt_of: What two rows share that must not be told apart between training and held-out rows.
        keeps_others: Whether rows keep the columns that are not ours, each as it is; ``column_map`` may then give a
            column any name.
    """

    forms: tuple[Form, ...]
    expected: str
    detect: Callable[..., Any]
    prompt_of: Callable[[Mapping[str, Any]], Any]
    keeps_others: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Our names of columns, each with a meaning of its own."""
        return columns_of(self.forms)


_OTHER_NAMES = {
    "choices": ("options", "endings", "candidates", "alternatives"),
    "task": ("dataset", "subject", "category", "domain"),
    "success": ("correct", "is_correct", "solved"),
    "prompt": ("question", "instruction", "query", "input", "context", "conversations", "conversation"),
    "chosen": ("preferred", "winner", "accepted", "response_chosen", "chosen_response", "best"),
    "rejected": ("dispreferred", "loser", "response_rejected", "rejected_response", "worst"),
    "completion": ("response", "answer", "output", "target", "solution"),
    "messages": ("conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "text": ("content", "document", "body"),
    "completions": ("responses", "candidates", "solutions", "answers", "generations"),
    "scores": ("rewards", "ratings", "labels", "ranks"),
    "answer": ("solution", "ground_truth", "target", "final_answer", "gold", "label"),
    "solution": ("answer", "ground_truth", "target", "final_answer", "gold"),
}


_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def refused_columns(columns: Sequence[str]) -> list[str]:
    """One problem for each column without which rows would mean something else, but which cannot be trained on.

    Args:
        columns: Names in the data.
    """
    return [
        f"column {name!r}: alignkit trains on text alone, and would train these rows without what the column holds. "
        f"Remove the rows that need it, and the column"
        for name in columns
        if name in _MEDIA
    ]


def _of_another_method(columns: Sequence[str], forms: Sequence[Form]) -> str | None:
    """What to do with rows that are whole, but not what the method takes, or None for any other rows."""
    wanted = {name for form in forms for name in form.columns}
    if set(COMPLETION_COLUMNS) <= set(columns) and "rejected" in wanted and "completion" not in wanted:
        return (
            "rows of prompt and completion have one answer, and this method compares two or more: write method: sft, "
            "which imitates them, or give every row a better and a worse answer, chosen and rejected"
        )
    if set(PAIR_COLUMNS) <= set(columns) and "completion" in wanted and "rejected" not in wanted:
        return (
            "rows of prompt, chosen and rejected are pairs: write method: dpo, which compares the two, or "
            "column_map: {completion: chosen} to imitate the better answers alone"
        )
    return None


def _foreign_form(columns: Sequence[str]) -> str | None:
    """What to do with rows of a form that alignkit has not, or None for any other rows."""
    if {*COMPLETION_COLUMNS, "label"} <= set(columns):
        return (
            "rows of prompt, completion and label are unpaired: write method: kto, which takes them. To compare the "
            "answers to a prompt, put them into one row of prompt, completions and scores, with the score 1 for label "
            "true and 0 for false"
        )
    if "input_ids" in columns:
        return (
            "rows of input_ids are tokenised already; alignkit tokenises text itself, so that it can check what is "
            f"trained. Give the rows as text or messages. Columns present: {', '.join(map(repr, columns))}"
        )
    return None


def unpaired_labels(columns: Sequence[str]) -> list[str]:
    """The problem of supervised rows of which a label says which are good, as if all of them were.

    Args:
        columns: Names in the data.
    """
    if not {*COMPLETION_COLUMNS, "label"} <= set(columns):
        return []
    return [
        "column 'label' beside prompt and completion: rows that it calls bad would be trained like the good ones. Keep "
        "the rows to be imitated, and remove the column"
    ]


def plain_prompt_problem(columns: Sequence[str], row: Mapping[str, Any]) -> str | None:
    """Why rows cannot become messages, or None.

    Args:
        row: The first row.
    """
    if any(isinstance(row.get(column), list) for column in ("messages", "prompt", "chosen")):
        return "the rows are messages, to which the chat template is applied in any case. Remove the key"
    if "prompt" not in columns:
        found = ", ".join(map(repr, columns))
        return f"the rows have no column 'prompt' to become the user's message. Columns present: {found}"
    return None


def nearest_name(wanted: str, available: Sequence[str]) -> str | None:
    """The name among ``available`` that is probably meant by ``wanted``, or None.

    Args:
        wanted: A name of ours, or one the user wrote.
        available: Names in the data.
    """
    synonyms = [name for name in available if name.lower() in _OTHER_NAMES.get(wanted, ())]
    return next(iter(difflib.get_close_matches(wanted, available, n=1, cutoff=0.6) + synonyms), None)


def missing_columns(
    columns: Sequence[str], forms: Sequence[Form] = PREFERENCE_FORMS, notes: Mapping[str, str] | None = None
) -> list[str]:
    """One problem for each column missing from the form that the columns, or names like them, come closest to.

    Args:
        columns: Names in the data, which complete no form.
        notes: What to say of a missing column that no other column looks like.
    """
    if foreign := _foreign_form(columns) or _of_another_method(columns, forms):
        return [foreign]
    known = columns_of(forms)
    spare = [name for name in columns if name not in known]
    near = {name: nearest_name(name, spare) for name in known}

    def share_found(form: Form) -> float:
        # One column can be meant by one name.
        found = {name if name in columns else near[name] for name in form.columns} - {None}
        return len(found) / len(form.columns)

    wanted = max(forms, key=share_found)
    problems = []
    for column in wanted.columns:
        if column in columns or (column in wanted.optional and not near[column]):
            continue
        advice = f" {notes[column]}" if notes and column in notes else ""
        if near[column]:
            advice = f" Did you mean {near[column]!r}? Write column_map: {{{column}: {near[column]}}}."
        problems.append(f"column {column!r} is missing.{advice} Columns present: {', '.join(map(repr, columns))}")
    return problems


def misnamed_prompt(columns: Sequence[str]) -> str | None:
    """The problem of pairs without a prompt column of which another column looks like the prompt, or None.

    A dataset whose prompt is called "question" would otherwise train on answers without their questions.

    Args:
        columns: Names in the data.
    """
    near = nearest_name("prompt", [column for column in columns if column not in columns_of(PREFERENCE_FORMS)])
    if near is None:
        return None
    return (
        f"there is no column 'prompt' but one called {near!r}. Write column_map: {{prompt: {near}}}; if chosen and "
        "rejected already begin with the prompt, remove that column"
    )


def listed_columns(names: Collection[str]) -> str:
    """Names of columns for a line of text, of which a file may have thousands."""
    shown = [name if len(name) <= 60 else f"{name[:60]} ..." for name in islice(names, _LISTED)]
    return ", ".join(shown) + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "")
