"""The flips, the rows and the tables of the study on real rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from scripts.claims.noise_page import accuracy_table, comparisons, likelihood_table, paired, write_section
from scripts.claims.noise_rows import (
    LabelledRow,
    Question,
    draw_rows,
    flip,
    gsm8k_questions,
    list_row,
    negative_row,
    pair_row,
    truthfulqa_questions,
)
from scripts.claims.noise_runs import METHODS, reward_accuracy, swapped
from scripts.claims.noise_study import REWARDS, SHARES, START, Source, keys, read_records, run_all
from tests.conftest import GSM8K, TRUTHFULQA

QUESTIONS = [Question(f"q{i}", (f"r{i}", f"s{i}"), (f"v{i}", f"w{i}", f"x{i}")) for i in range(40)]


def text(messages: list[dict[str, str]]) -> str:
    (message,) = messages
    return message["content"]


def truth(answer: str) -> bool:
    return answer[0] in "rs"


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.2, 8), (0.4, 16), (1.0, 40), (0.37, 15)])
def test_exactly_the_stated_share_is_flipped(share: float, expected: int) -> None:
    rows = draw_rows(QUESTIONS, seed=0)
    flipped = flip(rows, share, seed=0)
    assert sum(row.is_flipped for row in flipped) == expected
    assert [row.answers for row in flipped] == [row.answers for row in rows], "nothing but labels changes"
    for before, after in zip(rows, flipped, strict=True):
        wrong = [label != truth(answer) for label, answer in zip(after.labels, after.answers, strict=True)]
        assert all(wrong) if after.is_flipped else not any(wrong)
        assert after.pair == (before.pair[::-1] if after.is_flipped else before.pair)


def test_flips_are_nested_and_depend_on_the_seed() -> None:
    rows = draw_rows(QUESTIONS, seed=0)
    chosen = {s: {row.prompt for row in flip(rows, s, seed=0) if row.is_flipped} for s in (0.2, 0.4)}
    assert chosen[0.2] < chosen[0.4]
    assert chosen[0.4] != {row.prompt for row in flip(rows, 0.4, seed=1) if row.is_flipped}


def test_every_method_is_told_the_same() -> None:
    """The pair, the list and the negative of a question are all right, or all the opposite."""
    rows = flip(draw_rows(QUESTIONS, seed=3), 0.4, seed=3)
    samples = {row.prompt: ["a", row.answers[row.pair[1]] + " ", "b"] for row in rows}
    for row in rows:
        pair, listed, negative = pair_row(row), list_row(row), negative_row(row, samples)
        assert text(pair["prompt"]) == row.prompt and row.prompt[1:] == row.answers[0][1:]
        assert truth(text(pair["chosen"])) is not row.is_flipped and truth(text(pair["rejected"])) is row.is_flipped
        scores = dict(zip(map(text, listed["completions"]), listed["scores"], strict=True))
        assert {bool(score) != truth(answer) for answer, score in scores.items()} == {row.is_flipped}
        assert list(map(text, negative["completions"])) == ["a", "b", text(pair["rejected"])], "not the negative itself"
        assert negative["scores"] == [1.0, 1.0, 0.0]


def test_lists_have_two_of_each_kind_and_the_pair_is_one_of_each() -> None:
    for row in draw_rows(QUESTIONS, seed=1):
        assert [truth(answer) for answer in row.answers] == [True, True, False, False] == list(row.labels)
        assert row.labels[row.pair[0]] and not row.labels[row.pair[1]]
    few = draw_rows([Question("q", ("r",), ("v", "w", "x"))], seed=0)[0]
    assert few.labels == (True, False, False, False) and few.answers == ("r", "v", "w", "x")
    assert draw_rows(QUESTIONS, seed=1) == draw_rows(QUESTIONS, seed=1) != draw_rows(QUESTIONS, seed=2)


def test_truthfulqa_is_read_by_column(tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Correct Answers", "Incorrect Answers"])
        writer.writerow(["one?", "a; b; a;", "c; d ;e"])
        writer.writerow(["two?", "a", "c; d"])
        writer.writerow(["three?", "a; b; both", "both; c; d"])
    assert truthfulqa_questions(path) == [
        Question("one?", ("a", "b"), ("c", "d", "e")),
        Question("three?", ("a", "b"), ("c", "d")),
    ]


def test_real_questions() -> None:
    assert len(gsm8k_questions(GSM8K)) == 36
    assert all(len(q.right) + len(q.wrong) == 4 for q in gsm8k_questions(GSM8K))
    questions = truthfulqa_questions(TRUTHFULQA)
    assert len(questions) == 22 and all(not set(q.right) & set(q.wrong) for q in questions)


def test_swapped_pairs_keep_their_rewards() -> None:
    rows = Dataset.from_list(
        [
            {"prompt_ids": [1], "completion_ids": [[2], [3, 4]], "scores": [1.0, 0.0], "token_rewards": r}
            for r in ([[0.1], [0.2, 0.3]], [[0.4], [0.5, 0.6]])
        ]
    )
    first, second = swapped(rows, [False, True])
    assert first == rows[0]
    assert second["completion_ids"] == [[3, 4], [2]] and second["token_rewards"] == [[0.5, 0.6], [0.4]]
    assert second["scores"] == [1.0, 0.0] and second["prompt_ids"] == [1]


def test_reward_accuracy_by_hand() -> None:
    """Log-ratios 1, 0, 0 with scores 1, 0, 1: 1 > 0 won, 0 = 0 half; and a row that is lost."""
    policy = [[[-1.0, -1.0], [-2.0], [-3.0]], [[-2.0], [-1.0]]]
    reference = [[[-1.5, -1.5], [-2.0], [-3.0]], [[-1.0], [-1.0]]]
    assert reward_accuracy([[1.0, 0.0, 1.0], [1.0, 0.0]], policy, reference) == pytest.approx(1.5 / 3)


# --- records and tables -----------------------------------------------------------------------------------------------


def record(method: str, seed: int, share: float, accuracy: float) -> dict[str, Any]:
    names = ("accuracy/reward", "accuracy/mean_logps", "mean_logps/chosen", "mean_logps/rejected")
    figures: dict[str, Any] = dict.fromkeys(names, accuracy)
    if method == START:
        figures |= {"train_rows": 160, "held_out_rows": 80, "steps": 20, "batch_size": 8, "max_length": 64}
    if method == REWARDS:
        figures = {"num_tokens": 10, "std": 0.1, "gap": 0.02, "gap_standard_error": 0.01}
    return {"data": "D", "seed": seed, "method": method, "share": share, "seconds": 60.0, "figures": figures}


def finished() -> list[dict[str, Any]]:
    """Accuracy .5 + seed / 100 - share / 10, treg .1 above it; seeds in the wrong order."""
    records = []
    for seed in (2, 0, 1):
        for _, _, method, share in keys("D", seed):
            value = 0.5 + seed / 100 - share / 10 + (0.1 if method == "treg" else 0.0)
            records.append(record(method, seed, share, value))
    return records


def test_every_method_is_run_at_every_share_once() -> None:
    trained = [key for key in keys("D", 0) if key[2] not in (START, REWARDS)]
    assert len(set(trained)) == len(trained) == len(METHODS) * len(SHARES) - 1
    assert ("D", 0, "TRL robust, told", 0.0) not in trained


def test_tables_aggregate_over_seeds() -> None:
    records = finished()
    assert paired(records, "D", ("treg", 0.4), ("treg", 0.0), "accuracy/reward") == pytest.approx([-0.04] * 3)
    lines = accuracy_table(records, "D").splitlines()
    sigmoid = next(line for line in lines if line.startswith("| TRL sigmoid"))
    # mean .51, deviation .01: half an interval is 4.303 * .01 / sqrt 3 = .0248
    assert sigmoid.split("|")[2].strip() == "0.510 [0.485, 0.535]" and "0.470 [" in sigmoid.split("|")[4]
    told = next(line for line in lines if line.startswith("| TRL robust, told"))
    assert told.split("|")[2] == sigmoid.split("|")[2], "told that nothing is flipped it is the same loss"
    treg = next(line for line in comparisons(records, "D").splitlines() if line.startswith("| treg"))
    assert treg.count("0.100 [0.100, 0.100] holds") == 3 and "0.040 [0.040, 0.040] holds" in treg
    changes = next(line for line in likelihood_table(records, "D").splitlines() if line.startswith("| d2o"))
    assert "-0.040 [-0.040, -0.040]" in changes


def test_the_page_of_an_unfinished_study_says_so(tmp_path: Path) -> None:
    records = [r for r in finished() if not (r["method"] == "d2o" and r["share"] == 0.2)]
    section = write_section(records, ["D", "not begun"], num_seeds=3, plot=tmp_path / "plot.png")
    assert "66 of 138 runs finished" in section and "### D" in section and "### not begun" not in section
    assert "not run" in section and (tmp_path / "plot.png").is_file()
    assert section.count("| D | ") == 3 and "| +0.0200 | 0.0100 | +2.0 |" in section
    assert "{" not in section.replace("{origin}", "")


def test_finished_runs_are_not_run_again_and_a_cut_line_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("scripts.claims.noise_study._run_seed", lambda missing, *_: asked.extend(missing))
    lines = [json.dumps({**record(m, s, share, 0.5), "data": "D"}) for _, s, m, share in keys("D", 0)]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines)[:-5], encoding="utf-8")
    assert len(read_records(tmp_path / "runs.jsonl")) == len(lines) - 1
    source = {"D": Source(tmp_path, lambda _: [], None)}  # type: ignore[arg-type]
    run_all(source, 2, tmp_path, tmp_path)
    assert set(asked) == {keys("D", 0)[-1], *keys("D", 1)} and len(asked) == 1 + len(keys("D", 1))
    assert [key[3] for key in asked].index(0.2) == len(asked) - len(METHODS) - 1, "the last stage comes last"


def test_shares_are_what_the_page_names() -> None:
    assert sorted(SHARES) == [0.0, 0.2, 0.4] and len(METHODS) == 8
    assert isinstance(draw_rows(QUESTIONS, 0)[0], LabelledRow) and np.isfinite(SHARES).all()
