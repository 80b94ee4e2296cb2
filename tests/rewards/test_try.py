"""``alignkit rewards``: what it computes, against loops, and what it says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from alignkit import cli
from alignkit.errors import ConfigError, DataError, RewardError
from alignkit.parts.reward import load_reward, reward_names
from alignkit.reports.reward_report import SUM, RewardReport, Scored, report_rewards

MINE = '''
def letters(prompts, completions, *, wanted, **columns):
    """Async or not, a reward sees the columns of its rows."""
    return [float(text.count(one)) for text, one in zip(completions, wanted)]

async def late(prompts, completions, **columns):
    columns["log_metric"]("seen", 1)
    return [float(len(text)) for text in completions]

def fails(prompts, completions, **columns):
    return [1.0 / len(text) for text in completions]
'''


def tau_b(a: list[float | None], b: list[float | None], groups: list[list[int]]) -> float | None:
    """Kendall's tau-b by counting pairs within groups."""
    concordant = discordant = only_a = only_b = 0
    for group in groups:
        for i, j in itertools.combinations(group, 2):
            x = 0 if None in (a[i], a[j]) else a[i] - a[j]
            y = 0 if None in (b[i], b[j]) else b[i] - b[j]
            concordant += x * y > 0
            discordant += x * y < 0
            only_a += x != 0 and y == 0
            only_b += x == 0 and y != 0
    decided = concordant + discordant
    size = math.sqrt((decided + only_a) * (decided + only_b))
    return (concordant - discordant) / size if size else None


def test_the_figures_are_those_of_loops() -> None:
    random.seed(3)
    groups = [[0, 1, 2, 3], [4, 5, 6], [7], [8, 9]]
    values = [[random.choice([None, 0.0, 0.5, 1.0, 2.0]) for _ in range(8)] + [1.0, 1.0] for _ in range(3)]
    lengths = [random.randrange(5) for _ in range(10)]
    rewards = [
        Scored(f"r{i}", weight, found) for i, (weight, found) in enumerate(zip([1.0, -2.0, 0.5], values, strict=True))
    ]
    report = report_rewards(rewards, groups, lengths, ["p"] * 4)
    sums = []
    for row in zip(*values, strict=True):
        judged = [weight * value for weight, value in zip([1.0, -2.0, 0.5], row, strict=True) if value is not None]
        sums.append(sum(judged) if judged else None)
    for name, found in zip(("r0", "r1", "r2", SUM), (*values, sums), strict=True):
        spread, judged = report.spreads[name], sorted(value for value in found if value is not None)
        mean = sum(judged) / len(judged)
        assert spread.judged == len(judged) and spread.mean == pytest.approx(mean)
        assert spread.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in judged) / (len(judged) - 1)))
        assert (spread.quantiles[0], spread.quantiles[4]) == (judged[0], judged[-1])
        several = [[found[i] for i in group if found[i] is not None] for group in groups]
        several = [group for group in several if len(group) > 1]
        assert spread.silent == sum(len(set(group)) == 1 for group in several) / len(several)
        assert spread.with_length == pytest.approx(tau_b(found, lengths, groups))
    for i, j in itertools.combinations(range(3), 2):
        assert report.agreement[f"r{i}", f"r{j}"] == pytest.approx(tau_b(values[i], values[j], groups))


def test_quantiles_are_between_neighbours() -> None:
    spread = report_rewards([Scored("r", 1.0, [4.0, 1.0, 2.0, 10.0])], [[0, 1, 2, 3]], [1] * 4, ["p"]).spreads["r"]
    assert spread.quantiles == (1.0, 1.75, 3.0, 5.5, 10.0)


def advice(
    *rewards: list[float | None], groups: list[list[int]] | None = None, lengths: list[int] | None = None
) -> str:
    count = len(rewards[0])
    scored = [Scored(f"r{i}", 1.0, values) for i, values in enumerate(rewards)]
    report = report_rewards(scored, groups or [list(range(count))], lengths or [1] * count, ["p"] * count)
    return "\n".join(report.advice)


def test_what_is_as_it_should_be_is_left_in_peace() -> None:
    assert advice([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], lengths=[3, 4, 4, 3]) == ""


@pytest.mark.parametrize(
    ("rewards", "more", "said"),
    [
        ([[0.0, 0.0], [0.0, 1.0]], {}, "r0 gives 0 to every completion and teaches nothing here"),
        ([[None, None], [0.0, 1.0]], {}, "r0 judged no completion"),
        ([[0.0, 1.0, None]], {}, "r0 judged 2 of 3 completions."),
        ([[0.0, 1.0, 2.0], [0.0, 5.0, 6.0]], {}, "r0 and r1 order the completions alike (agreement 1.00)"),
        ([[0.0, 1.0, 2.0], [3.0, 2.0, 2.5]], {}, "pull against each other (agreement -0.33)"),
        ([[0.0, 1.0, 2.0], [3.0, 2.0, 1.0]], {}, "r0 and r1 pull against each other (agreement -1.00)"),
        ([[0.0, 1.0]], {"lengths": [9, 30]}, "r0 mostly says which completion is longer: its agreement"),
        ([[0.0, 1.0]], {"lengths": [30, 9]}, "r0 mostly says which completion is shorter"),
        ([[0.0, 0.0, 1.0, 2.0]], {"groups": [[0, 1], [2, 3]]}, "on 50% of the prompts all completions have"),
        ([[0.0, 1.0]], {"groups": [[0], [1]]}, "every prompt has one completion"),
    ],
)  # fmt: skip
def test_advice(rewards: list[list[float | None]], more: dict[str, Any], said: str) -> None:
    if "-0.33" in said:
        assert "pull" not in advice(*rewards, **more)
    else:
        assert said in advice(*rewards, **more)


ROWS = [
    {"prompt": "2*9?", "answer": "18", "wanted": "1", "completions": ["<<2*9=18>>#### 18", "<<2*9=11>>#### 11", "18"]},
    {"prompt": "1+1?", "answer": "2", "wanted": "2", "completions": ["<<1+1=2>>#### 2", "3"]},
    {"prompt": "2*9?", "answer": "18", "wanted": "8", "completion": "A: 17"},
]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def tried(folder: Path, *words: str, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The report of one call, as JSON."""
    output = folder / "report.json"
    data = write(folder, ROWS if rows is None else rows)
    cli.run(["rewards", "try", "--data", data, "--output", str(output), "--overwrite", *words])
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_rewards_are_tried_on_rows_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    mine = f"{tmp_path / 'mine.py'}:letters"
    found = tried(
        tmp_path,
        "--rewards",
        "gsm8k_annotations",
        "{name: gsm8k_answer, weight: 2}",
        mine,
        mine.replace("letters", "late"),
    )
    assert (found["completions"], found["prompts"]) == (6, 2)
    assert found["rewards"]["gsm8k_annotations"]["mean"] == pytest.approx(2 / 6)
    assert found["rewards"]["gsm8k_answer"]["mean"] == pytest.approx(3 / 6)
    assert found["rewards"]["gsm8k_answer"]["weight"] == 2.0
    assert found["rewards"]["letters"]["max"] == 4.0, "the eleven has a 1 on each side"
    assert found["rewards"]["late"]["min"] == 1.0
    assert found["rewards"]["gsm8k_answer"]["share_of_silent_prompts"] == 0.0
    assert {(pair["first"], pair["second"]) for pair in found["agreement"]} >= {("gsm8k_annotations", "gsm8k_answer")}
    assert len(found["slowest"]) == 3 and found["slowest"][0]["prompt"] in ("2*9?", "1+1?")
    printed = capsys.readouterr().out
    assert "6 completions of 2 prompts" in printed and "weighted sum" in printed
    for sentence in found["advice"]:
        assert f"- {sentence}" in printed


def test_rewards_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rewards: [gsm8k_answer, {name: repetition, n: 2, weight: 0.1}]\nmodel: m\n")
    found = tried(tmp_path, "--config", str(tmp_path / "run.yaml"))
    assert {name: entry["weight"] for name, entry in found["rewards"].items()} == {
        "gsm8k_answer": 1.0,
        "repetition": 0.1,
    }
    (tmp_path / "run.yaml").write_text("model: m\n")
    with pytest.raises(ConfigError, match="it has no list `rewards"):
        tried(tmp_path, "--config", str(tmp_path / "run.yaml"))


def test_pairs_and_renamed_columns_and_messages(tmp_path: Path) -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    pair = {
        "question": [{"role": "user", "content": "2*9?"}],
        "answer": 18,
        "chosen": said("18"),
        "rejected": said("17"),
    }
    found = tried(tmp_path, "--rewards", "gsm8k_answer", "--column_map", "prompt=question", rows=[pair])
    assert found["completions"] == 2 and found["rewards"]["gsm8k_answer"]["mean"] == 0.5
    assert tried(tmp_path, "--rewards", "gsm8k_answer", "--max_rows", "1")["completions"] == 3
    with pytest.raises(DataError, match="names the column 'query', which it does not have"):
        tried(tmp_path, "--rewards", "gsm8k_answer", "--column_map", "prompt=query", rows=[pair])


def test_tokens_are_those_of_the_rows_of_a_tokenizer_or_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = ("--rewards", "{name: length, soft_limit: 0, hard_limit: 10}")
    row = {"prompt": "q", "completions": ["one two three"]}
    of_rows = tried(tmp_path, *rewards, rows=[{**row, "completion_ids": [[5, 6]]}])
    assert of_rows["rewards"]["length"]["mean"] == pytest.approx(0.8)
    assert "words are counted" not in capsys.readouterr().out
    assert tried(tmp_path, *rewards, rows=[row])["rewards"]["length"]["mean"] == pytest.approx(0.7)
    assert "words are counted in place of tokens" in capsys.readouterr().out
    from tokenizers import Tokenizer, models

    (tmp_path / "model").mkdir()
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "model" / "tokenizer.json"))
    of_tokenizer = tried(tmp_path, *rewards, "--tokenizer", str(tmp_path / "model"), rows=[row])
    assert of_tokenizer["rewards"]["length"]["mean"] == pytest.approx(0.9), "without splitting, a text is one token"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x"}], "row 0: it has no prompt"),
        ([ROWS[0], {"prompt": "p", "answer": "1"}], "row 1: it has no completion"),
        ([{"prompt": "p", "completions": "x"}], "prompt and completions must be texts"),
        ([{"prompt": "p", "completions": [1]}], "prompt and completions must be texts"),
        ([{"prompt": "p", "completions": ["a"], "completion_ids": []}], None),
        (
            [{"prompt": "p", "completions": ["a"], "completion_ids": [[1], [2]]}],
            "1 completions and completion_ids of 2",
        ),
        ([{"prompt": "p", "completions": ["a"]}], "reads the column 'answer'"),
    ],
)
def test_rows_that_cannot_be_tried(rows: list[dict[str, Any]], said: str | None, tmp_path: Path) -> None:
    if said is None:
        assert tried(tmp_path, "--rewards", "repetition", rows=rows)["completions"] == 1
        return
    with pytest.raises(DataError, match=said):
        tried(tmp_path, "--rewards", "gsm8k_answer", rows=rows)


def test_a_command_line_that_cannot_work_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.run(["rewards", "try", "--tokenizer", str(tmp_path), "--output", str(tmp_path)])
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="Did you mean gsm8k_answer"):
        cli.run(["rewards", "try", "--data", "nowhere.jsonl", "--rewards", "gsm8k_anser"])
    with pytest.raises(ConfigError, match="is not YAML"):
        cli.run(["rewards", "try", "--data", "nowhere.jsonl", "--rewards", "{name: "])
    with pytest.raises(ConfigError, match="--data: name the rows"):
        cli.run(["rewards", "try", "--rewards", "gsm8k_answer"])


def test_a_reward_that_raises_is_told_with_the_completion(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(RewardError, match="(?s)'fails' raised ZeroDivisionError.*row 1 of 2.*prompt: p"):
        tried(tmp_path, "--rewards", f"{tmp_path / 'mine.py'}:fails", rows=[{"prompt": "p", "completions": ["a", ""]}])


def test_every_reward_is_listed_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["rewards", "list"])
    printed = capsys.readouterr().out
    for name in reward_names():
        assert f"{name}\n  {load_reward(name).summary}" in printed
        for option in dataclasses.fields(load_reward(name)):
            assert f"    {option.name} (" in printed


def test_a_report_without_a_judgement_is_shown() -> None:
    report = report_rewards([Scored("r", 1.0, [None], [0.5])], [[0]], [3], ["p"])
    assert isinstance(report, RewardReport) and "r judged no completion" in str(report)
    assert json.loads(json.dumps(report.as_json()))["rewards"]["r"] == {"weight": 1.0, "seconds": 0.5, "judged": 0}
