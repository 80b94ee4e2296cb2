"""scripts/token_rewards.py: the rows it writes can be trained on, whatever their form, order, length and launcher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.contrast import DEFAULT_FILE, load_contrast_prompts
from alignkit.data.load import load_rows
from tests.programs.launching import Ended
from tests.scripts.conftest import Script
from tests.scripts.tiny import candidate_lists, chat_pairs, write_rows

QUICK = ("--batch_size", "4", "--use_cpu", "--dtype", "float32")


def read(path: Path) -> list[dict[str, Any]]:
    """The written rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(assets: Path, rows: list[dict[str, Any]], **options: Any) -> list[list[list[float]]]:
    """r_hat of every completion, the prompts as the data layer makes them, one plain forward pass a sequence."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")
    model = AutoModelForCausalLM.from_pretrained(assets / "base", dtype=torch.float32).eval()
    contrast = load_contrast_prompts(**options)
    converted, _ = to_candidate_rows(
        Dataset.from_list(rows), tokenizer, max_length=None, num_candidates=None, contrast=contrast
    )

    def logps(prompt: list[int], completion: list[int]) -> torch.Tensor:
        with torch.no_grad():
            values = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        return values[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]

    return [
        [
            (torch.sigmoid(logps(better, completion) - logps(worse, completion)) - 0.5).tolist()
            for better, worse, completion in zip(
                row["better_prompt_ids"], row["worse_prompt_ids"], row["completion_ids"], strict=True
            )
        ]
        for row in converted
    ]


def close(found: list[float], wanted: list[float]) -> bool:
    return len(found) == len(wanted) and found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("include_response", [True, False])
def test_pairs(
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
    include_response: bool,
) -> None:
    output = tmp_path / "rewarded.jsonl"
    words = ("--model", assets / "base", "--data", assets / "pairs.jsonl", "--output", output, *QUICK)
    assert run_script("token_rewards", *words, "--include_response", str(include_response).lower()) == 0
    rows, given = read(output), chat_pairs(11)
    for row, before, (chosen, rejected) in zip(
        rows, given, expected(assets, given, include_response=include_response), strict=True
    ):
        assert {name: row[name] for name in before} == before
        assert close(row["chosen_token_rewards"], chosen) and close(row["rejected_token_rewards"], rejected)
    out = capsys.readouterr().out
    assert "layout: " in out and "token rewards of" in out and "chosen minus rejected" in out
    assert f"11 rows written to {output}" in out
    # What is written is what training reads.
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")
    trained, report = to_candidate_rows(load_rows(str(output)), tokenizer, max_length=None, num_candidates=2)
    assert "token rewards" in report.kind and len(trained) == 11


def test_lists_keep_their_order_and_dropped_rows_are_counted(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    given = candidate_lists(40)
    given[3] = given[3] | {"scores": [1.0, 1.0]}
    data = write_rows(tmp_path / "lists.jsonl", given)
    output = tmp_path / "rewarded.parquet"
    assert run_script("token_rewards", "--model", assets / "base", "--data", data, "--output", output, *QUICK) == 0
    rows = list(load_dataset("parquet", data_files=str(output), split="train"))
    kept = given[:3] + given[4:]
    assert "1 of 40 rows cannot be trained on and were left out" in capsys.readouterr().out
    # Ascending scores: reversed, the lists are in the order training has them in.
    turned = [{name: v[::-1] if isinstance(v, list) else v for name, v in row.items()} for row in kept[:8]]
    for row, before, rewards in zip(rows[:8], kept, expected(assets, turned), strict=False):
        assert row["completions"] == before["completions"] and row["scores"] == before["scores"]
        if row["scores"] == sorted(set(row["scores"])):
            assert all(close(a, b) for a, b in zip(row["token_rewards"], rewards[::-1], strict=True))
    assert [len(row["completions"]) for row in rows] == [len(row["token_rewards"]) for row in rows]


def test_what_is_cut_gets_zero_and_trains_as_the_uncut(assets: Path, tmp_path: Path, run_script: Script) -> None:
    words = ("--model", assets / "base", "--data", assets / "pairs.jsonl", *QUICK, "--include_response", "false")
    for name, extra in (("whole", ()), ("cut", ("--max_length", "24"))):
        assert run_script("token_rewards", *words, *extra, "--output", tmp_path / f"{name}.jsonl") == 0
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")
    trained = []
    for name in ("whole", "cut"):
        rows = load_rows(str(tmp_path / f"{name}.jsonl"))
        trained.append(to_candidate_rows(rows, tokenizer, max_length=24, num_candidates=2)[0]["token_rewards"])
    for whole, cut in zip(*trained, strict=True):
        assert all(close(a, b) for a, b in zip(whole, cut, strict=True)) and any(any(rewards) for rewards in cut)
    row, full = read(tmp_path / "cut.jsonl")[4], read(tmp_path / "whole.jsonl")[4]
    assert len(row["rejected_token_rewards"]) == len(full["rejected_token_rewards"])
    assert set(row["rejected_token_rewards"][-5:]) == {0.0} and 0.0 not in full["rejected_token_rewards"]


def test_cache_adapter_templates_and_heat_map(assets: Path, tmp_path: Path, run_script: Script) -> None:
    (tmp_path / "mine.yaml").write_text(DEFAULT_FILE.read_text().replace("verbose", "long"))
    cache, common = (
        tmp_path / "cache",
        ("--data", assets / "pairs.jsonl", "--output", tmp_path / "r.jsonl", "--overwrite", *QUICK),
    )
    files = lambda: {path: path.stat().st_mtime_ns for path in cache.iterdir()}  # noqa: E731
    words = ("--model", assets / "base", *common, "--cache", cache)
    assert run_script("token_rewards", *words) == 0
    first, rows = files(), read(tmp_path / "r.jsonl")
    assert run_script("token_rewards", *words, "--heatmap", tmp_path / "heat.html", "--layout", "padded") == 0
    assert files() == first and read(tmp_path / "r.jsonl") == rows
    page = (tmp_path / "heat.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "&lt;|end|&gt;</span>" in page
    for extra in (("--contrast_prompts", tmp_path / "mine.yaml"), ("--adapter", assets / "adapter")):
        count = len(files())
        assert run_script("token_rewards", *words, *extra) == 0
        assert len(files()) == count + 1 and read(tmp_path / "r.jsonl") != rows


def test_two_processes_give_the_same_rows(
    assets: Path, tmp_path: Path, run_script: Script, on_two_processes: Callable[..., Ended]
) -> None:
    words = ("--model", assets / "base", "--data", assets / "pairs.jsonl", *QUICK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = (*words, "--cache", tmp_path / "c1", "--output", tmp_path / "one.jsonl")
    assert run_script("token_rewards", *one) == 0
    torch.set_num_threads(threads)
    two = (*words, "--cache", tmp_path / "c2", "--output", tmp_path / "two.jsonl")
    done = on_two_processes("token_rewards", *two)
    assert done.exit_code == 0, done.errors[-3000:]
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert done.output.count("token rewards of") == 1 and len(list((tmp_path / "c2").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--model", "{assets}/none", "--output", "{tmp}/r.csv"],
            ["2 problems", "does not exist", ".jsonl or .parquet"],
        ),
        (["--contrast_prompts", "{tmp}/none.yaml"], ["--contrast_prompts", "there is no such file"]),
        (["--contrast_prompts", "{tmp}/bad.yaml"], ["version is 7"]),
        (["--output", "/no/dir/r.jsonl", "--heatmap", "/no/dir/h.html"], ["2 problems", "--output", "--heatmap"]),
        (["--include_response", "maybe"], ["--include_response"]),
        (["--heat_map", "h.html"], ["unknown option --heat_map; did you mean --heatmap?"]),
        (["--data", "{tmp}/done.jsonl"], ["the rows carry chosen_token_rewards", "remove them to compute anew"]),
        (["--data", "{tmp}/long.jsonl"], ["the model has 512 positions", "row 1: ", "include_response: false"]),
    ],
)
def test_what_cannot_be_scored(
    words: list[str],
    expected: list[str],
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.yaml").write_text("version: 7\n")
    done = [row | {"chosen_token_rewards": [0.1], "rejected_token_rewards": [0.1]} for row in chat_pairs(2)]
    write_rows(tmp_path / "done.jsonl", done)
    long = chat_pairs(3)
    long[1]["chosen"][0]["content"] = "x" * 400
    write_rows(tmp_path / "long.jsonl", long)
    given = [word.format(assets=assets, tmp=tmp_path) for word in words]
    defaults = {"--model": assets / "base", "--data": assets / "pairs.jsonl", "--output": tmp_path / "r.jsonl"}
    given += [str(word) for option, value in defaults.items() if option not in given for word in (option, value)]
    assert run_script("token_rewards", *given, *QUICK) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in expected), err
    assert err.count("error:") == 1 and "Traceback" not in err and not (tmp_path / "r.jsonl").exists()
