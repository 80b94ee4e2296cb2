"""scripts/sample_candidates.py through its command line: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit import load_reward_model
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows
from alignkit.sampling.engines import HuggingFaceEngine
from tests.programs.launching import Ended
from tests.scripts.conftest import Script
from tests.scripts.tiny import byte_tokenizer, chat_pairs, write_rows

QUICK = ("--num_samples", "3", "--max_new_tokens", "8", "--batch_size", "2", "--chunk_size", "3", "--use_cpu")
INSTRUCTION = "Speak of zebras."


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven conversational negatives with a chosen answer and a column of the user's."""
    return write_rows(tmp_path / "negatives.jsonl", [{**row, "id": i} for i, row in enumerate(chat_pairs(7))])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_a_base_and_an_adapter(
    assets: Path, data: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("base", "adapter"):
        words = ("--model", assets / name, "--data", data, "--output", tmp_path / f"{name}.jsonl", *QUICK)
        assert run_script("sample_candidates", *words) == 0
    base, adapter = read(tmp_path / "base.jsonl"), read(tmp_path / "adapter.jsonl")
    assert base != adapter
    for row, given in zip(base, chat_pairs(7), strict=True):
        assert row["prompt"] == given["prompt"] and row["scores"] == [1, 1, 1, 0]
        assert row["completions"][3] == given["rejected"] and given["chosen"] not in row["completions"]
        assert all(message["role"] == "assistant" for (message,) in row["completions"])
    assert [row["id"] for row in base] == list(range(7)) and set(base[0]) == {"prompt", "completions", "scores", "id"}
    rows = load_rows(str(tmp_path / "base.jsonl"))
    _, report = to_candidate_rows(rows, byte_tokenizer(), max_length=None, num_candidates=None)
    assert report.candidates_per_row == {4: 7} and report.num_dropped == 0
    out = capsys.readouterr().out
    assert "note: columns not used and left out: chosen" in out and "rows written" in out
    assert out.count("written to") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.jsonl", "base.jsonl", "negatives.jsonl"]


def test_the_same_call_writes_the_same_file_and_parquet_holds_the_same(
    assets: Path, data: Path, tmp_path: Path, run_script: Script
) -> None:
    words = ("--model", assets / "base", "--data", data, *QUICK)
    for name, extra in (("a.jsonl", ()), ("b.jsonl", ()), ("c.parquet", ()), ("d.jsonl", ("--seed", "1"))):
        assert run_script("sample_candidates", *words, "--output", tmp_path / name, *extra) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    parquet = Dataset.from_parquet(str(tmp_path / "c.parquet"), cache_dir=str(tmp_path / "cache"))
    assert list(parquet) == read(tmp_path / "a.jsonl")
    pairs = zip(read(tmp_path / "a.jsonl"), read(tmp_path / "d.jsonl"), strict=True)
    assert all(a["completions"][:3] != d["completions"][:3] for a, d in pairs)


def test_an_instruction_changes_the_samples_and_is_not_written(
    assets: Path, data: Path, tmp_path: Path, run_script: Script
) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"prompt": f"Count to {i}: ", "rejected": "no"} for i in range(3)])
    for source in (data, text):
        words = ("--model", assets / "base", "--data", source, *QUICK)
        plain, told = tmp_path / f"plain_{source.name}", tmp_path / f"told_{source.name}"
        assert run_script("sample_candidates", *words, "--output", plain) == 0
        assert run_script("sample_candidates", *words, "--output", told, "--instruction", INSTRUCTION) == 0
        assert "zebras" not in told.read_text()
        assert [row["prompt"] for row in read(plain)] == [row["prompt"] for row in read(told)]
        assert all(a["completions"][:-1] != b["completions"][:-1] for a, b in zip(read(plain), read(told), strict=True))
    assert read(plain)[0]["completions"][-1] == "no" and all(isinstance(c, str) for c in read(plain)[0]["completions"])


def test_an_interrupted_call_continues(
    assets: Path,
    data: Path,
    tmp_path: Path,
    run_script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--model", assets / "base", "--data", data, *QUICK, "--output")
    assert run_script("sample_candidates", *words, tmp_path / "whole.jsonl") == 0
    generate, calls = HuggingFaceEngine._generate, []

    def counted(self: HuggingFaceEngine, requests: list[Any]) -> list[Any]:
        calls.append({request.row for request in requests})
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, requests)

    monkeypatch.setattr(HuggingFaceEngine, "_generate", counted)
    assert run_script("sample_candidates", *words, tmp_path / "parts.jsonl") == 130
    assert not (tmp_path / "parts.jsonl").exists() and (tmp_path / "parts.jsonl.partial").is_dir()
    begun = set.union(*calls[:2])
    assert run_script("sample_candidates", *words, tmp_path / "parts.jsonl", "--seed", "5") == 2
    err = capsys.readouterr().err
    assert "seed: 0 then, 5 now" in err and "1. seed" in err and "Traceback" not in err
    calls[:] = [set()] * 4
    assert run_script("sample_candidates", *words, tmp_path / "parts.jsonl") == 0
    assert len(begun) == 3 and set.union(*calls) == set(range(7)) - begun
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "parts.jsonl.partial").exists()


def test_other_weights_in_the_same_folder_are_noticed(
    assets: Path, data: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", assets / "base", "--data", data, *QUICK, "--output", tmp_path / "rows.jsonl")
    scorer = tmp_path / "rewards.py"
    scorer.write_text("def score(prompt, completions):\n    raise KeyboardInterrupt\n")
    assert run_script("sample_candidates", *words, "--scorer", f"{scorer}:score") == 130
    settings = tmp_path / "rows.jsonl.partial" / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "weights": "others"}))
    assert run_script("sample_candidates", *words) == 2
    err = capsys.readouterr().err
    assert "weights: 'others' then" in err and "scorer: [" in err and "3. give the settings of then" in err


def test_prompts_with_a_scorer(assets: Path, data: Path, tmp_path: Path, run_script: Script) -> None:
    scorer = tmp_path / "rewards.py"
    scorer.write_text(
        "def score(prompt, completions):\n"
        "    assert prompt[0]['role'] == 'user'\n"
        "    return [float(i) for i, _ in enumerate(completions)]\n"
    )
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"question": row["prompt"]} for row in chat_pairs(3)])
    words = ("--model", assets / "base", "--data", prompts, "--column_map", "prompt=question", "--no_negative", *QUICK)
    output = tmp_path / "rows.parquet"
    assert run_script("sample_candidates", *words, "--scorer", f"{scorer}:score", "--output", output) == 0
    _, report = to_candidate_rows(load_rows(str(output)), byte_tokenizer(), max_length=None, num_candidates=None)
    assert report.candidates_per_row == {3: 3} and report.mean_score_gap == 2


def test_prompts_with_a_reward_model(
    assets: Path, data: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(assets / "base", num_labels=1)
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(assets / "base").save_pretrained(tmp_path / "judge")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in chat_pairs(2)])
    words = (
        "--model",
        assets / "base",
        "--data",
        prompts,
        "--no_negative",
        *QUICK,
        "--output",
        tmp_path / "rows.jsonl",
    )
    assert run_script("sample_candidates", *words, "--reward_model", assets / "base") == 2
    assert "is a language model, without rewards" in capsys.readouterr().err
    assert run_script("sample_candidates", *words, "--reward_model", tmp_path / "judge") == 0
    rewards = load_reward_model(str(tmp_path / "judge"))
    for row in read(tmp_path / "rows.jsonl"):
        assert row["scores"] == pytest.approx(rewards(row["prompt"], row["completions"]), abs=1e-4)


def test_a_scorer_that_raises_is_named_and_loses_no_sample(
    assets: Path, data: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = tmp_path / "rewards.py"
    scorer.write_text("def score(prompt, completions):\n    return [1.0 / len('') for _ in completions]\n")
    words = ("--model", assets / "base", "--data", data, "--output", tmp_path / "rows.jsonl", *QUICK)
    assert run_script("sample_candidates", *words, "--scorer", f"{scorer}:score") == 2
    said = capsys.readouterr().err
    assert (
        re.search(r"row \d: it raised ZeroDivisionError", said) and "(rewards.py:2)" in said and "completions [" in said
    )
    assert "Traceback" not in said and any((tmp_path / "rows.jsonl.partial").iterdir())


def test_two_processes_write_the_same_file(
    assets: Path, data: Path, tmp_path: Path, run_script: Script, on_two_processes: Callable[..., Ended]
) -> None:
    """Chunks of three prompts in batches of two: unequal shares."""
    words = ("--adapter", assets / "adapter", "--data", data, *QUICK, "--unique", "--output")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_script("sample_candidates", *words, tmp_path / "one.jsonl") == 0
    torch.set_num_threads(threads)
    done = on_two_processes("sample_candidates", *words, tmp_path / "two.jsonl")
    assert done.exit_code == 0, done.errors[-3000:]
    assert done.output.count("written to") == 1
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", "{tmp}/none/x.jsonl", "--model", "{assets}/none"], ["2 problems", "one that does not exist"]),
        (["--top_p", "0"], ["expected a share, above 0 and up to 1, got '0'"]),
        (["--output", "{tmp}/x.json"], ["must end in .jsonl or .parquet"]),
        (["--output", "{tmp}/negatives.jsonl"], ["no input is ever overwritten"]),
        (["--temperature", "0"], ["gives the same answer 3 times: write --num_samples 1"]),
        (["--no_negative"], ["--no_negative without --scorer would score every sample 1"]),
        (["--scorer", "rewards.py"], ["expected FILE.py:FUNCTION"]),
        (["--scorer", "{tmp}/none.py:score"], ["there is no file"]),
        (["--engine", "vllm"], ["vLLM is not installed", "goes with neither"]),
        (["--model", "{assets}/none"], ["does not exist"]),
        (["--chat_template", "{tmp}/none"], ["there is no file"]),
        (["--data", "{tmp}/none.jsonl"], ["none.jsonl: not found"]),
        (["--data", "{tmp}/broken.jsonl"], ["2 problems", "rejected is null", "prompt is empty"]),
        (["--data", "{tmp}/prompts.jsonl"], ["column 'rejected' is missing"]),
        (["--max_new_tokens", "505"], ["--max_new_tokens takes 505 of the model's 512 positions, prompts have"]),
        (["--max_prompt_length", "3"], ["7 of 7 prompts are too long", "--max_prompt_length is 3, prompts have"]),
    ],
)
def test_what_cannot_be_sampled(
    words: list[str],
    expected: list[str],
    assets: Path,
    data: Path,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = chat_pairs(1)[0]["prompt"]
    write_rows(tmp_path / "broken.jsonl", [chat_pairs(1)[0], {"prompt": []}, {"prompt": prompt}])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt}])
    words = [word.format(assets=assets, tmp=tmp_path) for word in words]
    given = {"--model": assets / "base", "--data": data, "--output": tmp_path / "rows.jsonl"}
    missing = [word for pair in given.items() if pair[0] not in words for word in pair]
    assert run_script("sample_candidates", *missing, *QUICK, *words) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in expected), err
    assert err.count("error:") == 1 and "Traceback" not in err and not (tmp_path / "rows.jsonl").exists()
    if "prompts are too long" in err:
        assert not (tmp_path / "rows.jsonl.partial").exists(), "other settings would be refused"
