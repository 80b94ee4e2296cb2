"""Names of columns: ours, and what others call the same thing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
LIST_COLUMNS = ("prompt", "completions", "scores")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
PAIR_REWARD_COLUMNS = ("chosen_token_rewards", "rejected_token_rewards")
LIST_REWARD_COLUMNS = ("token_rewards",)
KNOWN_COLUMNS = tuple(
    dict.fromkeys(PAIR_COLUMNS + LIST_COLUMNS + TEMPLATE_COLUMNS + PAIR_REWARD_COLUMNS + LIST_REWARD_COLUMNS)
)

_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("preferred", "winner", "accepted", "response_chosen", "chosen_response", "best"),
    "rejected": ("dispreferred", "loser", "response_rejected", "rejected_response", "worst"),
    "completions": ("responses", "candidates", "solutions", "answers", "generations"),
    "scores": ("rewards", "ratings", "labels", "ranks"),
}


def nearest_name(wanted: str, available: Sequence[str]) -> str | None:
    """The name among ``available`` that is probably meant by ``wanted``, or None.

    Args:
        wanted: A name of ours, or one the user wrote.
        available: Names in the data.
    """
    synonyms = [name for name in available if name.lower() in _OTHER_NAMES.get(wanted, ())]
    return next(iter(difflib.get_close_matches(wanted, available, n=1, cutoff=0.6) + synonyms), None)


def missing_columns(columns: Sequence[str]) -> list[str]:
    """One problem for each column missing from the form that the columns, or names like them, come closest to.

    Args:
        columns: Names in the data, which complete no form.
    """
    spare = [name for name in columns if name not in KNOWN_COLUMNS]
    near = {name: nearest_name(name, spare) for name in KNOWN_COLUMNS}
    wanted = max(PAIR_COLUMNS, LIST_COLUMNS, key=lambda form: sum(name in columns or bool(near[name]) for name in form))
    problems = []
    for column in wanted:
        # A pair may do without a prompt column, unless one looks like it.
        if column in columns or (wanted is PAIR_COLUMNS and column == "prompt" and not near[column]):
            continue
        advice = (
            f" Did you mean {near[column]!r}? Write column_map: {{{column}: {near[column]}}}." if near[column] else ""
        )
        problems.append(f"column {column!r} is missing.{advice} Columns present: {', '.join(map(repr, columns))}")
    return problems


def misnamed_prompt(columns: Sequence[str]) -> str | None:
    """The problem of pairs without a prompt column of which another column looks like the prompt, or None.

    A dataset whose prompt is called "question" would otherwise train on answers without their questions.

    Args:
        columns: Names in the data.
    """
    near = nearest_name("prompt", [column for column in columns if column not in KNOWN_COLUMNS])
    if near is None:
        return None
    return (
        f"there is no column 'prompt' but one called {near!r}. Write column_map: {{prompt: {near}}}; if chosen and "
        "rejected already begin with the prompt, remove that column"
    )
