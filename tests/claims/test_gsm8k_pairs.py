"""The GSM8K pairs of the 3D-Properties study: the right answer is chosen, and no question is on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.claims.gsm8k_pairs import load_split, make_pairs, read_questions
from tests.conftest import GSM8K


def line(question: str, *marks: bool) -> dict[str, Any]:
    """A question whose i-th model wrote ``<question> <i>``."""
    models = {f"model{i}": {"is_correct": mark, "solution": f"{question} {i}"} for i, mark in enumerate(marks)}
    return {"question": question, "ground_truth": "never used", **models}


def text(messages: list[dict[str, str]]) -> str:
    (message,) = messages
    return message["content"]


def final_answer(solution: str) -> float | None:
    """The number after the last ``A:``."""
    answer = solution.rpartition("A:")[2].strip().replace(",", "").lstrip("$")
    try:
        return float(answer)
    except ValueError:
        return None


def test_only_questions_with_both_kinds_of_solution_make_a_pair() -> None:
    questions = [line("a", True, True), line("b", False, True, False), line("c", False), line("d", True, False)]
    pairs = make_pairs(questions, seed=0)
    assert [text(pair["prompt"]) for pair in pairs] == ["b", "d"]
    assert [pair["prompt"][0]["role"] for pair in pairs] == ["user", "user"]
    assert text(pairs[0]["chosen"]) == "b 1" and text(pairs[0]["rejected"]) in {"b 0", "b 2"}
    assert (text(pairs[1]["chosen"]), text(pairs[1]["rejected"])) == ("d 0", "d 1")


def test_the_seed_draws_among_several_solutions() -> None:
    questions = [line("q", True, True, True, False, False)] * 20
    drawn = {(text(p["chosen"]), text(p["rejected"])) for p in make_pairs(questions, seed=0)}
    assert len(drawn) > 1 and make_pairs(questions, seed=1) == make_pairs(questions, seed=1)
    assert make_pairs(questions, seed=1) != make_pairs(questions, seed=2)


def test_split_by_question(tmp_path: Path) -> None:
    path = tmp_path / "solutions.jsonl"
    path.write_text("\n".join(json.dumps(line(f"q{i}", True, False)) for i in range(50)), encoding="utf-8")
    split, other = load_split(path, seed=0), load_split(path, seed=1)
    train, held_out = ({text(p) for p in part["prompt"]} for part in (split.train, split.held_out))
    assert len(held_out) == 10 and not train & held_out and len(train | held_out) == 50
    assert held_out != {text(p) for p in other.held_out["prompt"]}


def test_on_the_real_solutions() -> None:
    questions = {row["question"]: row for row in read_questions(GSM8K)}
    split = load_split(GSM8K, seed=0)
    assert (len(split.train), len(split.held_out)) == (29, 7)
    prompts = [[text(pair["prompt"]) for pair in part] for part in (split.train, split.held_out)]
    assert not set(prompts[0]) & set(prompts[1])
    assert len(set(prompts[0])) == len(prompts[0]) and len(set(prompts[1])) == len(prompts[1])
    for pair in [*split.train, *split.held_out]:
        row = questions[text(pair["prompt"])]
        marks = {m["solution"]: m["is_correct"] for m in row.values() if isinstance(m, dict)}
        chosen, rejected = text(pair["chosen"]), text(pair["rejected"])
        assert chosen.strip() != rejected.strip()
        assert marks[chosen] is True and marks[rejected] is False


def test_the_answers_bear_out_the_marks() -> None:
    """Independently of ``is_correct``: the chosen solution ends in the true answer, the rejected one does not."""
    truth = {row["question"]: final_answer(row["ground_truth"]) for row in read_questions(GSM8K)}
    split = load_split(GSM8K, seed=0)
    pairs = [*split.train, *split.held_out]
    right = [final_answer(text(p["chosen"])) == truth[text(p["prompt"])] for p in pairs]
    wrong = [final_answer(text(p["rejected"])) != truth[text(p["prompt"])] for p in pairs]
    assert sum(right) / len(pairs) > 0.98 and sum(wrong) / len(pairs) > 0.98
