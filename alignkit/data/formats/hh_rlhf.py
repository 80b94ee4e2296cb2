r"""HH-RLHF: two whole transcripts, "\n\nHuman: ...\n\nAssistant: ...", that differ in the last answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import Plan, Rows, most_are, named
from alignkit.parts.data_format import DataFormat, LeftOut

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """The columns of the two transcripts, or None."""
    pair = named(columns, ("chosen", "rejected"))
    if (
        len(pair) < 2
        or named(columns, ("prompt",))
        or not all(most_are(rows, column, _is_transcript) for column in pair)
    ):
        return None
    return {"chosen": pair[0], "rejected": pair[1]}


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as a pair; the prompt ends in the last ``Assistant:``.

    Raises:
        LeftOut: The two transcripts differ before the last answer.
        ValueError: One of them is no transcript.
    """
    sides = [_split(row.get(plan[name]), name) for name in ("chosen", "rejected")]
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        same = "the transcripts differ before their last answer, so these answers are not to the same prompt"
        raise LeftOut(f"{same}: remove the row")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def transcript_messages(text: str) -> list[dict[str, str]] | None:
    """The messages of a transcript that is a prompt, or None of any other text.

    Args:
        text: Such as "\n\nHuman: Hi\n\nAssistant:".
    """
    if not text.startswith(HUMAN) or not text.rstrip().endswith(ASSISTANT):
        return None
    messages = []
    for part in text.split(HUMAN)[1:]:
        asked, *answers = part.split(ASSISTANT)
        messages.append({"role": "user", "content": asked.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return messages[:-1]


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(HUMAN) and ASSISTANT in value


def _split(text: Any, name: str) -> tuple[str, str]:
    if not _is_transcript(text):
        raise ValueError(f'{name} is no transcript that begins with "Human:" and holds "Assistant:": remove the row')
    start, _, answer = text.rpartition(ASSISTANT)
    return start + ASSISTANT, answer


FORMAT = DataFormat(
    name="hh_rlhf",
    summary='Two transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ...", as HH-RLHF writes them; the prompt is all up to '
    "the last Assistant:.",
    columns=("chosen", "rejected"),
    gives=(("prompt", "chosen", "rejected"),),
    recognise=recognise,
    convert=convert,
)
