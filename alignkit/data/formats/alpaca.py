"""Alpaca: an instruction, perhaps with an input, and the output; with a system prompt and earlier turns where given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import Plan, Rows, all_are, as_text, is_text, named, with_system
from alignkit.data.formats.kto import LABELS, label_of
from alignkit.parts.data_format import DataFormat

OUTPUTS = ("output", "response", "completion", "answer")
INPUTS = ("input", "context")


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """Where instruction, input and output stand, or None; rows with a label are not for imitation."""
    asked, inputs, outputs = named(columns, ("instruction",)), named(columns, INPUTS), named(columns, OUTPUTS)
    pair = named(columns, ("chosen", "rejected"))
    if not asked or any(all_are(rows, label, lambda v: label_of(v) is not None) for label in named(columns, LABELS)):
        return None
    plan = {"instruction": asked[0]} | ({"input": inputs[0]} if inputs else {})
    for extra in named(columns, ("system", "history")):
        if any(row.get(extra) for row in rows):
            plan[extra.lower()] = extra
    if len(pair) == 2 and all(all_are(rows, column, is_text) for column in pair):
        return plan | {"chosen": pair[0], "rejected": pair[1]}
    if outputs and all_are(rows, outputs[0], lambda value: isinstance(value, list)):
        return plan | {"better, worse": outputs[0]}
    return plan | {"output": outputs[0]} if outputs and all_are(rows, outputs[0], is_text) else None


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as prompt and answers: text, or messages where there are system prompts or earlier turns.

    Raises:
        ValueError: An output that is a list does not hold two answers, or earlier turns are no pairs.
    """
    prompt = _prompt(row, plan)
    if "output" in plan:
        answer = as_text(row.get(plan["output"]))
        is_message = isinstance(prompt, list) and isinstance(answer, str)
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}] if is_message else answer}
    if "chosen" in plan:
        return {"prompt": prompt, "chosen": row.get(plan["chosen"]), "rejected": row.get(plan["rejected"])}
    answers = row.get(plan["better, worse"])
    if not isinstance(answers, list) or len(answers) != 2:
        given = f"holds {len(answers)}" if isinstance(answers, list) else f"is {type(answers).__name__}"
        raise ValueError(f"{plan['better, worse']} {given}: a list of outputs is two, the better one first")
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def _prompt(row: Mapping[str, Any], plan: Plan) -> Any:
    parts = [as_text(row.get(plan[name])) for name in ("instruction", "input") if name in plan]
    asked = "\n".join(part for part in parts if isinstance(part, str) and part.strip())
    if "system" not in plan and "history" not in plan:
        return asked
    earlier = row.get(plan["history"]) or [] if "history" in plan else []
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in earlier):
        raise ValueError('history is not a list of pairs: write [["question", "answer"]]')
    messages = [
        {"role": role, "content": text}
        for turn in [*earlier, [asked]]
        for role, text in zip(("user", "assistant"), turn, strict=False)
    ]
    return with_system(row.get(plan["system"]) if "system" in plan else None, messages)


FORMAT = DataFormat(
    name="alpaca",
    summary="An instruction, an input that may be empty, and the output, as Alpaca writes them, with system and "
    "history as LLaMA-Factory does; with chosen and rejected (or an output of the better and the worse) a pair.",
    columns=("instruction", *INPUTS, *OUTPUTS, "chosen", "rejected", "system", "history", *LABELS),
    gives=(("prompt", "completion"), ("prompt", "chosen", "rejected")),
    recognise=recognise,
    convert=convert,
)
