"""Twenty files as they are found in the wild, made by us in that shape, with their flaws.

Each is written into a folder by :func:`write`. What a file is for, and the kind of edit that the error message asks for
where there is one, stands beside it: the test parses the message and does what it says.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet

Edit = Literal["column_map", "ending", "encoding", "quotes", "rows"]


@dataclass(frozen=True)
class Wild:
    """A file as it is found.

    Attributes:
        name: The name of the file, which may be wrong.
        content: Its bytes.
        rows: What its rows are for: ``supervised``, ``pairs``, ``lists``, ``labels`` or ``steps``.
        format: The format that it is read as; empty for rows under our names.
        count: Rows that are left to train on.
        contains: A text that must be among what is trained or asked.
        edit: The edit that the error message asks for, or None.
    """

    name: str
    content: bytes
    rows: Literal["supervised", "pairs", "lists", "labels", "steps"]
    format: str
    count: int
    contains: str
    edit: Edit | None = None


def write(wild: Wild, folder: Path) -> Path:
    """Write the file and return its path."""
    path = folder / wild.name
    path.write_bytes(wild.content)
    return path


def lines(rows: Sequence[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content))


def turn(speaker: str, text: str | None) -> dict[str, Any]:
    return {"from": speaker, "value": text}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def hh(*turns: str) -> str:
    return "".join(("\n\nHuman: ", "\n\nAssistant: ")[i % 2] + text for i, text in enumerate(turns))


def table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}

ALPACA = [
    {"instruction": "Escape 1 < 2", "input": "", "output": "1 &lt; 2"},
    {"instruction": "Add", "input": "12345678901234567890\n1", "output": "12345678901234567891"},
    {"instruction": "Name a colour", "input": None, "output": "Blue 🟦"},
]
EARLIER = [
    {"instruction": "And now?", "input": "", "output": "Nine.", "system": None, "history": [["Add", "Seven."]]},
    {"instruction": "Hello", "input": "", "output": "Hi.", "system": "Be brief.", "history": []},
    {"instruction": "Bye", "input": "", "output": "Bye.", "system": "", "history": None},
]
SHAREGPT = [
    {
        "id": "a_0",
        "conversations": [turn("human", "Hi"), turn("gpt", "Hello."), turn("human", "And?"), turn("gpt", "Yes.")],
    },
    {"id": "a_1", "conversations": [turn("Human", "One"), turn("GPT", "Two."), turn("human", "cut off")]},
    {"id": "a_2", "conversations": []},
    {"id": "a_3", "conversations": [turn("human", "Q"), turn("chatgpt", "A")], "tools": ""},
]
DOUBLED = [
    {"system": "Be kind.", "conversations": [turn("system", "Be kind."), turn("human", "Hi"), turn("gpt", "Hello.")]},
    {"system": "", "conversations": [turn("system", "Be brief."), turn("human", "Hi"), turn("gpt", "Hello.")]},
    {"conversations": [turn("human", "Hi"), turn("gpt", "Hello.")]},
]
LLAMA_FACTORY = [
    {"conversations": [turn("human", "2 + 2?")], "chosen": turn("gpt", "4"), "rejected": turn("gpt", "5")},
    {
        "conversations": [turn("human", "Hi"), turn("gpt", "Yes?"), turn("human", "3 + 3?")],
        "chosen": turn("gpt", "6"),
        "rejected": turn("gpt", "7"),
        "system": "",
    },
]
TOOLS = [
    {
        "messages": [
            said("user", "Weather?"),
            said("assistant", None, tool_calls=[CALL]),
            said("tool", "7 °C", tool_call_id="call_1"),
            said("assistant", "7 °C."),
        ],
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    },
    {
        "messages": [
            said("user", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]),
            said("assistant", "Hi."),
        ]
    },
]
VISION = [
    {"messages": [said("user", "Hi"), said("assistant", "Hello.")]},
    {
        "messages": [
            said("user", [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            said("assistant", "A cat."),
        ]
    },
    {"messages": [said("user", "Bye"), said("assistant", "Goodbye.")]},
]
ROLES = [
    {"chat": [said("User", "Hi"), said("Bot", "Hello.")]},
    {"chat": [said("SYSTEM", "Be brief."), said("human", "Hi"), said("ai", "Yo.")]},
]
HH = [
    {"chosen": hh("Hi", "Yes?", "2 + 2?", "4"), "rejected": hh("Hi", "Yes?", "2 + 2?", "45")},
    {"chosen": hh("Hi", "Yes?"), "rejected": hh("Ho", "What?")},
    {"chosen": hh("3 + 3?", "6"), "rejected": hh("3 + 3?", "I do not know")},
]
UF = [
    {
        "source": "s",
        "instruction": "Add",
        "models": ["m", "n"],
        "correct_answers": ["None"],
        "completions": [
            {
                "model": "m",
                "response": "4",
                "overall_score": "N/A",
                "fine-grained_score": 4.5,
                "annotations": {"x": None},
            },
            {"model": "n", "response": "5", "overall_score": 3, "fine-grained_score": 2},
        ],
    },
    {
        "source": "s",
        "instruction": "Sub",
        "models": ["m", "n"],
        "completions": [
            {"model": "m", "response": "1", "overall_score": 8, "fine-grained_score": 1.0},
            {"model": "n", "response": "2", "overall_score": 3, "fine-grained_score": 3.25},
        ],
    },
]
BINARISED = [
    {
        "prompt": q,
        "prompt_id": str(i),
        "chosen": [said("user", q), said("assistant", a)],
        "rejected": [said("user", q), said("assistant", b)],
        "messages": [said("user", q), said("assistant", a)],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }
    for i, (q, a, b) in enumerate([("2 + 2?", "4", "5"), ("3 + 3?", "6", "7")])
]
NECTAR = [
    {
        "prompt": hh("Hi", "Yes?", "2 + 2?") + "\n\nAssistant: ",
        "turns": 2,
        "num_responses": 3,
        "good_natured": True,
        "answers": [
            {"answer": text, "model": "m", "rank": rank} for text, rank in (("5", 3.0), ("4", 1.0), ("four?", 2.0))
        ],
    },
    {
        "prompt": hh("3 + 3?") + "\n\nAssistant: ",
        "turns": 1,
        "num_responses": 2,
        "good_natured": False,
        "answers": [{"answer": "6", "model": "m", "rank": "1"}, {"answer": "7", "model": "m", "rank": "2"}],
    },
]
MATHS = [
    {"problem": "10^19 + 1?", "solution": "Count the noughts.", "answer": 10000000000000000001, "uuid": "a"},
    {"problem": "1 + 1?", "solution": "Two.", "answer": 2, "uuid": None},
]
STACK = [
    {
        "qid": 4,
        "question": "<p>Why &amp; how?</p>",
        "date": "2011/10/28",
        "metadata": ["https://x"],
        "answers": [
            {"answer_id": 1, "pm_score": 3, "selected": True, "text": "<p>So.</p>", "author": None},
            {"answer_id": 2, "pm_score": 0, "selected": False, "text": "<p>No &lt;idea&gt;.</p>", "author": "x"},
        ],
    },
    {
        "qid": 5,
        "question": "<p>Alone?</p>",
        "answers": [{"answer_id": 3, "pm_score": 1, "selected": False, "text": "Yes."}],
    },
    {
        "qid": 6,
        "question": "<p>Many?</p>",
        "answers": [{"answer_id": i, "pm_score": i, "selected": False, "text": f"It is {i}."} for i in range(3)],
    },
]
PRM = [
    {
        "labeler": "x",
        "timestamp": "2022-07-17T16:56:51",
        "question": {"problem": "2 + 2?", "ground_truth_answer": "4"},
        "label": {
            "total_time": 9,
            "finish_reason": "solution",
            "steps": [
                {
                    "completions": [{"text": "Two and two", "rating": 1, "flagged": None}],
                    "human_completion": None,
                    "chosen_completion": 0,
                },
                {"completions": [{"text": "make 4.", "rating": 1}], "human_completion": None, "chosen_completion": 0},
            ],
        },
    },
    {
        "labeler": "x",
        "question": {"problem": "3 + 3?"},
        "label": {
            "finish_reason": "found_error",
            "steps": [{"completions": [{"text": "make 7.", "rating": -1}], "chosen_completion": None}],
        },
    },
]
NULLS = [
    {"prompt": "2 + 2?", "response": "4", "meta": None},
    {"prompt": None, "response": "5", "meta": {"a": 1}},
    {"prompt": "3 + 3?", "response": "6", "meta": "x"},
]
SYSTEMS = [
    {"system": "", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"system": "Be brief.", "question": "3 + 3?", "chosen": "6", "rejected": "7"},
]
MESSAGES_CSV = "id;messages\r\n" + "".join(
    f'{i};"{json.dumps([said("user", "Hi"), said("assistant", answer)]).replace(chr(34), chr(34) * 2)}"\r\n'
    for i, answer in enumerate(("Hello.", "Yes; what?"))
)

FILES = [
    Wild(
        "alpaca_data.json",
        b"\xef\xbb\xbf" + json.dumps(ALPACA, indent=2).replace("\n", "\r\n").encode(),
        "supervised",
        "alpaca",
        3,
        "1 &lt; 2",
    ),
    Wild("alpaca_history.jsonl.gz", gzip.compress(lines(EARLIER)), "supervised", "alpaca", 3, "Seven."),
    Wild("sharegpt.json", lines(SHAREGPT, "\n\n"), "supervised", "sharegpt", 3, "Two.", "rows"),
    Wild("system.ndjson", lines(DOUBLED), "supervised", "sharegpt", 3, "Be kind."),
    Wild("dpo_zh.json", json.dumps(LLAMA_FACTORY).encode(), "pairs", "sharegpt", 2, "Yes?"),
    Wild("functions.jsonl", lines(TOOLS), "supervised", "", 2, '{"city": "Łódź"}'),
    Wild("vision.jsonl", lines(VISION), "supervised", "", 2, "Goodbye.", "rows"),
    Wild("roles.jsonl", lines(ROLES, "\r\n"), "supervised", "openai", 2, "Yo."),
    Wild("excel.csv", b"\xef\xbb\xbf" + MESSAGES_CSV.encode(), "supervised", "", 2, "Yes; what?"),
    Wild("hh-harmless.jsonl.gz", gzip.compress(lines(HH)), "pairs", "hh_rlhf", 2, "I do not know", "rows"),
    Wild("evol_instruct.jsonl.zst", zstd(lines(UF)), "lists", "ultrafeedback", 2, "Sub"),
    Wild("train_prefs.parquet", table(BINARISED), "pairs", "ultrafeedback_binarized", 2, "3 + 3?"),
    Wild("feedback.csv", b",query,response,label\n0,2 + 2?,4,1\n1,3 + 3?,7,0\n", "labels", "kto", 2, "7"),
    Wild(
        "thumbs.tsv",
        "prompt\tcompletion\tthumbs\t\n2 + 2?\t4\t👍\t\n\n3 + 3?\t7\tDown\t\n".encode(),
        "labels",
        "kto",
        2,
        "7",
    ),
    Wild("rlaif.jsonl", lines(NECTAR), "lists", "nectar", 2, "four?"),
    Wild(
        "questions.txt",
        lines([{"question": "2 + 2?", "answer": "4"}, {"answer": "6", "question": "3 + 3?"}]),
        "supervised",
        "prompt_answer",
        2,
        "6",
        "ending",
    ),
    Wild("numina.jsonl", lines(MATHS), "supervised", "prompt_answer", 2, "10000000000000000001", "column_map"),
    Wild(
        "faq.csv",
        b'question,answer\nHow, then?,So.\n"Why?",Because.\n',
        "supervised",
        "prompt_answer",
        2,
        "How, then?",
        "quotes",
    ),
    Wild("stack.jsonl", lines(STACK), "lists", "stack_exchange", 2, "No &lt;idea&gt;.", "rows"),
    Wild("phase2_train.jsonl", lines(PRM), "steps", "prm800k", 2, "make 7."),
    Wild(
        "latin.csv",
        "prompt,completion\nCaf\xe9?,Oui.\nTh\xe9?,Non.\n".encode("cp1252"),
        "supervised",
        "",
        2,
        "Café?",
        "encoding",
    ),
    Wild("mixed_nulls.jsonl", lines(NULLS), "supervised", "prompt_answer", 2, "6", "rows"),
    Wild("orca_pairs.jsonl", lines(SYSTEMS), "pairs", "prompt_answer", 2, "Be brief."),
]
"""More than twenty files, in twelve formats, our own names being one."""
