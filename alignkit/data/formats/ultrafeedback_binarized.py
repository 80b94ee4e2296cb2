"""Binarised UltraFeedback: whole conversations, chosen and rejected, with a score each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import Plan, Rows, is_turns, most_are, named, parsed, turns_of
from alignkit.parts.data_format import DataFormat

SCORES = ("score_chosen", "score_rejected")
OTHER_SCORES = ("chosen-rating", "rejected-rating")


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """The columns of the two conversations, or None."""
    pair, scores = named(columns, ("chosen", "rejected")), named(columns, SCORES) or named(columns, OTHER_SCORES)
    if len(pair) < 2 or len(scores) < 2 or not all(most_are(rows, column, _is_whole) for column in pair):
        return None
    return {"chosen": pair[0], "rejected": pair[1]}


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as a pair of answers to the messages that both begin with."""
    chosen, rejected = (turns_of(row.get(plan[name])) for name in ("chosen", "rejected"))
    pairs = enumerate(zip(chosen[:-1], rejected[:-1], strict=False))
    shared = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)) - 1)
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _is_whole(value: Any) -> bool:
    found = parsed(value)
    return is_turns(found) and len(found) > 1


FORMAT = DataFormat(
    name="ultrafeedback_binarized",
    summary="Two whole conversations, chosen and rejected, that differ in the last message, with score_chosen and "
    "score_rejected, as binarised UltraFeedback is written.",
    columns=("chosen", "rejected", *SCORES, *OTHER_SCORES),
    gives=(("prompt", "chosen", "rejected"),),
    recognise=recognise,
    convert=convert,
    mends=True,
)
