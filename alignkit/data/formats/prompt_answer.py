"""A prompt and an answer, or two answers, under any of the usual names, where only one column can be either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from alignkit.data.formats import alpaca
from alignkit.data.formats._reading import (
    ANSWER_NAMES,
    PROMPT_NAMES,
    Plan,
    Rows,
    all_are,
    answer_of,
    as_text,
    is_text,
    is_turns,
    named,
    parsed,
    turns_of,
    with_system,
)
from alignkit.data.formats.kto import LABELS, label_of
from alignkit.parts.data_format import DataFormat

SYSTEMS = ("system", "system_prompt", "system_message")
BESIDE = ("context", "passage", "background", "document", "hint", "history")
"""Columns that a question may not be clear without."""


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """The columns of prompt and answer, or None: of rows under our names whose answers are all numbers, too.

    Raises:
        ValueError: Several columns may be either, or a column would be left out that the question may need.
    """
    labelled = any(all_are(rows, c, lambda v: label_of(v) is not None) for c in named(columns, LABELS))
    if labelled or alpaca.recognise(columns, rows):
        return None
    if {"prompt", "completion"} <= set(columns):
        return {"prompt": "prompt", "completion": "completion"} if all_are(rows, "completion", _is_number) else None
    if {"prompt", "chosen", "rejected"} <= set(columns):
        return None
    prompts = [c for c in named(columns, PROMPT_NAMES) if all_are(rows, c, lambda v: is_text(v) or is_turns(parsed(v)))]
    pair = [column for column in named(columns, ("chosen", "rejected")) if all_are(rows, column, is_text)]
    answers = [column for column in named(columns, ANSWER_NAMES) if all_are(rows, column, is_text)]
    beside = [column for column in named(columns, BESIDE) if any(row.get(column) for row in rows)]
    if not prompts or not (answers or len(pair) == 2):
        return None
    ways = [
        {"prompt": p, **({"chosen": pair[0], "rejected": pair[1]} if len(pair) == 2 else {"completion": answer})}
        for p, answer in product(prompts, [""] if len(pair) == 2 else answers)
    ]
    if len(ways) > 1 or beside:
        left_out = f" ({', '.join(map(repr, beside))} would be left out)" if beside else ""
        written = " or ".join("{" + ", ".join(f"{o}: {t}" for o, t in way.items() if o != t) + "}" for way in ways)
        raise ValueError(f"it is not clear which columns are prompt and answer{left_out}. Write column_map: {written}")
    if len(pair) == 2 and any(_begins(row, ways[0]) for row in rows):
        return None
    systems = [column for column in named(columns, SYSTEMS) if any(row.get(column) for row in rows)]
    return ways[0] | ({"system": systems[0]} if systems else {})


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row under our names; as messages where the prompt is one, or has a system prompt."""
    prompt = as_text(row.get(plan["prompt"]))
    answers = {ours: as_text(row.get(theirs)) for ours, theirs in plan.items() if ours not in ("prompt", "system")}
    if is_turns(parsed(prompt)):
        prompt = turns_of(prompt)
    elif "system" in plan and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        return {"prompt": prompt, **answers}
    prompt = with_system(row.get(plan["system"]) if "system" in plan else None, prompt)
    return {"prompt": prompt, **{ours: answer_of(text) if is_text(text) else text for ours, text in answers.items()}}


def _is_number(value: Any) -> bool:
    return is_text(value) and not isinstance(value, str)


def _begins(row: Mapping[str, Any], plan: Plan) -> bool:
    """Whether the answers hold the prompt as well, which is then not needed."""
    prompt, chosen = row.get(plan["prompt"]), row.get(plan["chosen"])
    return isinstance(prompt, str) and isinstance(chosen, str) and chosen.startswith(prompt)


FORMAT = DataFormat(
    name="prompt_answer",
    summary="A prompt (question, query, problem, input, ...) and an answer (response, answer, output, solution, ...) "
    "of which there is one each, with a system prompt where there is a column of it; or with chosen and rejected.",
    columns=(*PROMPT_NAMES, *ANSWER_NAMES, "chosen", "rejected", *SYSTEMS, *BESIDE, *LABELS),
    gives=(("prompt", "completion"), ("prompt", "chosen", "rejected")),
    recognise=recognise,
    convert=convert,
    mends=True,
)
