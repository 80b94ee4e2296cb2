"""A problem and the steps of one solution with a label each: PRM800K, ProcessBench, and lists of steps and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import (
    PROMPT_NAMES,
    Plan,
    Rows,
    all_are,
    is_list_of,
    most_are,
    named,
    parsed,
    values_of,
)
from alignkit.data.formats.kto import label_of
from alignkit.parts.data_format import DataFormat, LeftOut

STEPS = ("completions", "steps")
LABELS = ("labels", "label", "ratings", "step_labels")


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """Where problem, steps and labels stand, or None: of rows under our names with labels true and false, too."""
    if {"question", "label"} <= set(columns) and most_are(rows, "label", _is_tree):
        return {"question": "question", "label": "label"}
    prompts, steps, labels = named(columns, PROMPT_NAMES), named(columns, STEPS), named(columns, LABELS)
    if not prompts or not steps or not labels or not all_are(rows, steps[0], _is_texts):
        return None
    if all_are(rows, labels[0], lambda value: isinstance(value, int) and not isinstance(value, bool)):
        return {"prompt": prompts[0], "completions": steps[0], "first error": labels[0]}
    if not all_are(rows, labels[0], lambda value: isinstance(value, list) and None not in map(label_of, value)):
        return None
    plan = {"prompt": prompts[0], "completions": steps[0], "labels": labels[0]}
    is_ours = all(ours == theirs for ours, theirs in plan.items())
    return None if is_ours and all(isinstance(v, bool) for value in values_of(rows, "labels") for v in value) else plan


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as a problem, the steps of its solution, and whether each is right.

    Raises:
        LeftOut: There is no step.
        ValueError: A step has no label.
    """
    if "question" in plan:
        return _of_tree(row)
    steps = row.get(plan["completions"])
    if "first error" in plan:
        wrong = row.get(plan["first error"])
        kept = steps if wrong == -1 else steps[: wrong + 1]
        return {"prompt": row[plan["prompt"]], "completions": kept, "labels": [i != wrong for i in range(len(kept))]}
    labels = [label_of(value) for value in row.get(plan["labels"]) or []]
    if not isinstance(steps, list) or len(steps) != len(labels) or None in labels:
        raise ValueError(f"{plan['completions']} and {plan['labels']} do not give each step one label: remove the row")
    return {"prompt": row.get(plan["prompt"]), "completions": steps, "labels": labels}


def _of_tree(row: Mapping[str, Any]) -> dict[str, Any]:
    """The path that was gone on with, up to the end or the first wrong step, as PRM800K writes it."""
    steps, labels = [], []
    for step in row["label"]["steps"]:
        chosen, written = step.get("chosen_completion"), step.get("human_completion")
        rated = step.get("completions") or []
        if chosen is not None:
            one = rated[chosen]
        elif written is not None:
            one = {"rating": 1, **({"text": written} if isinstance(written, str) else written)}
        elif rated:
            one = rated[0]
        else:
            break
        steps.append(one["text"])
        labels.append(one["rating"] == 1)
        if chosen is None and written is None:
            break
    if not steps:
        raise LeftOut("label has no step with a completion: remove the row")
    return {"prompt": row["question"]["problem"], "completions": steps, "labels": labels}


def _is_tree(value: Any) -> bool:
    steps = value.get("steps") if isinstance(value, Mapping) else None
    # A typed table leaves out what is null, as the completions of a step that a person wrote.
    return is_list_of(steps) and any(step.get("completions") for step in parsed(steps))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(step, str) for step in value)


FORMAT = DataFormat(
    name="prm800k",
    summary="A problem and rated steps: PRM800K's own rows (a rating of 1 is right), steps with one label each, or "
    "with the number of the first wrong step (-1 for none) as ProcessBench writes it.",
    columns=(*PROMPT_NAMES, *STEPS, *LABELS),
    gives=(("prompt", "completions", "labels"),),
    recognise=recognise,
    convert=convert,
    mends=True,
)
