"""Whatever a model writes, a reward returns a number, and soon."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignkit.parts.reward import load_reward, reward_names
from tests.rewards.calls import rewards

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gsm8k_annotations": [{}, {"rounded": True}],
    "gsm8k_answer": [{"answer": "#### 18"}],
    "json_correct": [{"answer": 18}, {"answer": {"a": ["b", 1]}, "metric": "f1", "inside": "x"}],
    "json_format": [{"fence": "forbid"}, {"fence": "require"}],
    "json_schema": [{"schema": {"type": "array", "uniqueItems": True, "items": {"multipleOf": 0.01}}}],
    "json_structure": [{"keys": {"a": "integer"}}],
    "json_valid": [{"partial": 0.5}],
    "length": [{}],
    "r3": [{"qtype": "OPENENDED", "reference": None}, {"qtype": "CONSTRAINED", "reference": "a b"}],
    "repetition": [{}],
    "soft_overlong": [{}],
    "table_content": [
        {"format": format, "answer": "a|b\n1|2<td>x\\begin{tabular}{ll}a&b\\end{tabular}", "raw": raw}
        for format in ("text", "rotowire", "html", "latex")
        for raw in (False, True)
    ],
    "table_structure": [{"format": format, "answer": "a|b\n1|2"} for format in ("text", "rotowire", "html", "latex")],
}
"""What every reward is tried with; a test asks that none is left out."""

MARKS = [
    *'{}[]":,|<>&=+*()-/.1a \\\n\x00\ud800\u0663\u2028\U0001f600',
    *("```", "```json", "---", "<td>", "</td>", "<!--", "-->", "####", "<<", ">>", "18", "1e999", "NaN", "null", "###"),
    *("\\begin{tabular}", "{ll}", "\\end{tabular}", "\\\\", "\\caption{", "Team:", "Player:"),
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=60),
    st.lists(st.sampled_from(MARKS), max_size=40).map("".join),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    ).map(json.dumps),
)
BOUNDED = set(reward_names()) - {"r3", "gsm8k_annotations", "soft_overlong"}


def test_every_reward_is_tried() -> None:
    assert set(OPTIONS) == set(reward_names()) - {"reward_model"}  # which is tried beside a model


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_no_text_makes_a_reward_raise(text: str) -> None:
    for name, cases in OPTIONS.items():
        for case in cases:
            (found,) = rewards(name, text, **case)
            assert isinstance(found, float) and math.isfinite(found), name
            if name in BOUNDED and not case.get("raw"):
                assert 0 <= found <= 1, name


SIZE = 990_000
"""Characters, just below the longest text that is read as JSON."""
GIANTS = {
    "nested lists": "[" * SIZE,
    "nested lists that close": "[" * (SIZE // 2) + "]" * (SIZE // 2),
    "nested objects": '{"a":' * (SIZE // 5),
    "too long for JSON": "[" + "1," * SIZE + "1]",
    "a long text": json.dumps("x" * (SIZE - 10)),
    "escaped quotes": '"' + '\\"' * (SIZE // 2),
    "escaped quotes after brackets": "[" * 65 + '"' + '\\"' * (SIZE // 2 - 100),
    "a key many times": "{" + '"a":1,' * (SIZE // 6) + '"a":1}',
    "keys, one twice": "{" + ",".join(f'"{n}":1' for n in range(60_000)) + ',"59999":1}',
    "numbers and texts": "[" + ",".join('1,"1"' for _ in range(SIZE // 6)) + "]",
    "digits": "1" * SIZE,
    "an exponent": "1e" + "9" * SIZE,
    "backticks": "`" * SIZE,
    "annotations": "<<1+1=2>>" * (SIZE // 20),
    "open annotations": "<<1" * (SIZE // 3),
    "brackets in an annotation": "<<" + "(" * SIZE + "=1>>",
    "marks of the answer": "#### " * (SIZE // 5),
    "thousands": "1," * (SIZE // 2),
    "cells": "a|" * (SIZE // 2),
    "rows": "a|b\n" * (SIZE // 4),
    "tags": "<td>a" * (SIZE // 5),
    "open tags": "<a" * (SIZE // 2),
    "one open tag": "<" + "a" * SIZE,
    "open comments": "<!--" * (SIZE // 4),
    "rows of LaTeX": "\\begin{tabular}{" + "l" * 1000 + "}" + "a&" * (SIZE // 2),
    "braces of LaTeX": "\\begin{tabular}" + "{" * SIZE,
    "captions": "\\caption[" * (SIZE // 9),
    "words": "a b " * (SIZE // 4),
    "lines of a role": "###\n" * (SIZE // 4),
    "spaces": " " * SIZE,
    "half characters": "\ud800" * SIZE,
    "letters that combine": "\u0300" * SIZE,
}


@pytest.mark.parametrize("case", GIANTS)
def test_a_text_of_a_megabyte_takes_seconds_at_most(case: str) -> None:
    """All rewards together; one that is quadratic in the text would take hours."""
    start = time.process_time()
    for name, cases in OPTIONS.items():
        # Formats of tables are read by different code; other options only judge otherwise what was read.
        for options in [one for one in cases if not one.get("raw")] if "table" in name else cases[:1]:
            (found,) = rewards(name, GIANTS[case], **options)
            assert math.isfinite(found), name
    assert time.process_time() - start < 30


def alternating(count: int, period: int) -> str:
    """Cells that repeat, which makes the second similarity slow."""
    return "h\n" + "\n".join(str(n % period) for n in range(count))


@pytest.mark.parametrize("period", [2, 90, 199])
@pytest.mark.parametrize("count", [199, 1_000, 100_000])
def test_tables_of_repeated_cells_are_compared_in_bounded_time(count: int, period: int) -> None:
    start = time.process_time()
    gold = "h\n" + "\n".join(str((n * 7) % period) for n in range(count))
    rewards("table_content", alternating(count, period), answer=gold)
    assert time.process_time() - start < 10


def test_a_hundred_thousand_completions_of_json_take_less_than_a_minute() -> None:
    """A tenth of them here, in a tenth of twice the time; scripts/benchmark_rewards.py measures it."""
    texts = [json.dumps({"reasoning": f"step {n} " * 20, "answer": n}) for n in range(10_000)]
    keys = {"reasoning": "string", "answer": "integer"}
    given = {"json_structure": {"keys": keys}, "json_schema": {"keys": keys}, "json_correct": {"answer": 3}}
    start = time.process_time()
    for name in ("json_valid", "json_structure", "json_schema", "json_format", "json_correct"):
        assert None not in rewards(name, *texts, **given.get(name, {}))
    assert time.process_time() - start < 12


def test_rewards_are_compared_by_what_they_are_made_of() -> None:
    assert load_reward("repetition")(n=2) == load_reward("repetition")(n=2) != load_reward("repetition")()
