"""scripts/evaluate.py against figures computed row by row, for a base and an adapter, on one and two processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignkit
from alignkit import evals
from alignkit.models.files import sha256
from alignkit.parts.evaluation import OPTIONAL, evaluation_names, load_evaluation
from alignkit.programs.evaluation_steps import DEFAULTS
from tests.programs.launching import Ended
from tests.scripts.conftest import Script
from tests.scripts.tiny import TEMPLATE, candidate_lists, chat_pairs, save_adapter, write_rows

QUICK = ("--max_new_tokens", "8", "--batch_size", "4", "--use_cpu")


def read(path: Path) -> dict[str, Any]:
    """A written result."""
    return json.loads(path.read_text())


def means(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The estimates alone."""
    return {name: values["mean"] for name, values in metrics.items()}


def token_logps(model: nn.Module, prompt: list[int], whole: list[int]) -> list[float]:
    """Log-probs of what follows the prompt, one row, no batch."""
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return [float(logps[i - 1, whole[i]]) for i in range(len(prompt), len(whole))]


def expected_pairs(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Preference metrics of chat pairs with Python loops."""
    sides: dict[str, list[list[float]]] = {"chosen": [], "rejected": []}
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for side, found in sides.items():
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
            found.append(token_logps(model, prompt, whole))
    sums = {side: [math.fsum(logps) for logps in found] for side, found in sides.items()}
    averages = {side: [math.fsum(logps) / len(logps) for logps in found] for side, found in sides.items()}
    expected = {}
    for name, values in (("logps", sums), ("mean_logps", averages)):
        pairs = list(zip(values["chosen"], values["rejected"], strict=True))
        expected[f"accuracy/{name}"] = sum(a > b for a, b in pairs) / len(rows)
        expected[f"margin/{name}"] = sum(a - b for a, b in pairs) / len(rows)
    for side, found in sides.items():
        expected[f"logps/{side}"] = sum(sums[side]) / len(rows)
        expected[f"mean_logps/{side}"] = sum(sums[side]) / sum(map(len, found))
    return expected


def check(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """Equal to what float32 allows."""
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-4, rel=1e-5), name


def test_an_adapter_and_its_base(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = write_rows(tmp_path / "probe.jsonl", chat_pairs(16)[11:])
    words = ("--adapter", assets / "adapter", "--data", assets / "pairs.jsonl", "--probe_data", probe)
    output = tmp_path / "eval.json"
    assert run_script("evaluate", *words, "--compare_base", "--num_samples", "2", "--output", output, *QUICK) == 0
    result = read(output)
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")
    base = AutoModelForCausalLM.from_pretrained(assets / "base", dtype=torch.float32).eval()
    check(means(result["base_metrics"]), expected_pairs(base, tokenizer, chat_pairs(11)))
    tuned_model = PeftModel.from_pretrained(deepcopy(base), assets / "adapter")
    tuned = expected_pairs(tuned_model, tokenizer, chat_pairs(11))
    found = means(result["metrics"])
    check(found, tuned)
    assert abs(tuned["logps/chosen"] - means(result["base_metrics"])["logps/chosen"]) > 0.1
    check(means(result["differences"]), {k: found[k] - means(result["base_metrics"])[k] for k in found})
    probed = expected_pairs(base, tokenizer, chat_pairs(16)[11:])
    responses = [probed["logps/chosen"], probed["logps/rejected"]]
    check(means(result["base_metrics"]), {"logps/probe": sum(responses) / 2})
    assert result["metrics"]["logps/probe"]["count"] == 10 and result["data"]["probe"]["rows"] == 5
    out = capsys.readouterr().out
    assert ["metric", "base", "model", "difference", "over"] in [line.split() for line in out.splitlines()]
    assert "top1" not in out and f"{found['logps/chosen']:.4f}" in out and "base (" in out and "model (" in out


def test_what_the_figures_depend_on_is_recorded(assets: Path, tmp_path: Path, run_script: Script) -> None:
    output = tmp_path / "eval.json"
    words = ("--model", assets / "adapter", "--data", assets / "pairs.jsonl", "--num_samples", "3", "--max_rows", "5")
    assert run_script("evaluate", *words, "--seed", "9", "--output", output, *QUICK) == 0
    result = read(output)
    assert result["environment"]["alignkit"] == alignkit.__version__
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["processes"] == {"world_size": 1, "device": "cpu"}
    assert result["model"]["model"] == str(assets / "base") and result["model"]["loaded_dtype"] == "float32"
    assert result["model"]["adapter"]["sha256"] == sha256(assets / "adapter" / "adapter_model.safetensors")
    assert len(result["tokenizer"]["chat_template_sha256"]) == 64
    assert result["tokenizer"]["first_prompt"] == "<|user|>What is 0 + 0?<|assistant|>"
    assert result["tokenizer"]["begins_with_bos"] is False
    assert result["data"]["held-out"]["rows"] == 5 and "probe" not in result["data"]
    assert result["options"]["seed"] == 9 and result["layout"] in ("padded", "packed")
    assert len(result["samples"]) == 3 and result["samples"][0]["prompt"] == result["tokenizer"]["first_prompt"]
    assert "base_metrics" not in result


def test_the_template_changes_hash_and_figures(assets: Path, tmp_path: Path, run_script: Script) -> None:
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("<|user|>", "User: "))
    words = ("--model", assets / "base", "--data", assets / "pairs.jsonl", "--num_samples", "0", *QUICK)
    for name, extra in (("one", []), ("two", ["--chat_template", tmp_path / "other.jinja"])):
        assert run_script("evaluate", *words, *extra, "--output", tmp_path / name) == 0
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["tokenizer"]["chat_template_sha256"] != two["tokenizer"]["chat_template_sha256"]
    assert one["data"]["held-out"]["token_ids_blake2b"] != two["data"]["held-out"]["token_ids_blake2b"]
    assert means(one["metrics"])["logps/chosen"] != means(two["metrics"])["logps/chosen"]
    assert one["samples"] == [] and "generation/finished" not in one["metrics"]


def test_lists_and_layouts(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", assets / "base", "--data", assets / "lists.jsonl", "--num_samples", "0", *QUICK)
    for layout in ("padded", "packed"):
        assert run_script("evaluate", *words, "--layout", layout, "--output", tmp_path / layout) == 0
    padded, packed = (means(read(tmp_path / layout)["metrics"]) for layout in ("padded", "packed"))
    check(packed, padded)
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")
    model = AutoModelForCausalLM.from_pretrained(assets / "base", dtype=torch.float32).eval()
    wins = pairs = 0
    for row in candidate_lists(7):
        prompt = tokenizer(row["prompt"])["input_ids"]
        wholes = [tokenizer(row["prompt"] + c + "<|end|>")["input_ids"] for c in row["completions"]]
        logps = [sum(token_logps(model, prompt, whole)) for whole in wholes]
        for i, better in enumerate(row["scores"]):
            for j, worse in enumerate(row["scores"]):
                pairs += better > worse
                wins += better > worse and logps[i] > logps[j]
    assert padded["accuracy/logps"] == pytest.approx(wins / pairs, abs=1e-12)
    assert "top1/logps" in capsys.readouterr().out


def test_a_base_given_by_name(assets: Path, tmp_path: Path, run_script: Script) -> None:
    words = ("--model", assets / "deep", "--data", assets / "pairs.jsonl", "--num_samples", "1", *QUICK)
    assert run_script("evaluate", *words, "--compare_base", assets / "base", "--output", tmp_path / "both") == 0
    alone = ("--model", assets / "base", *words[2:], "--output", tmp_path / "alone")
    assert run_script("evaluate", *alone) == 0
    assert read(tmp_path / "both")["base_metrics"] == read(tmp_path / "alone")["metrics"]


def test_two_processes_give_the_same_figures(
    assets: Path, tmp_path: Path, run_script: Script, on_two_processes: Callable[..., Ended]
) -> None:
    """Eleven rows in batches of 4 on two ranks: unequal shares, and a rank without a share of the samples."""
    words = ("--adapter", assets / "adapter", "--data", assets / "pairs.jsonl", "--compare_base", "--num_samples", "3")
    words = (*words, "--probe_data", assets / "lists.jsonl", "--temperature", "0.7", *QUICK)
    words = (*words, "--metrics", "preference,likelihood,generation,calibration", "--beta", "0.1", "--output")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_script("evaluate", *words, tmp_path / "one") == 0
    torch.set_num_threads(threads)
    done = on_two_processes("evaluate", *words, tmp_path / "two")
    assert done.exit_code == 0, done.errors[-3000:]
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["processes"]["world_size"], two["processes"]["world_size"]) == (1, 2)
    for key in ("metrics", "base_metrics", "differences", "samples", "data", "model"):
        assert one[key] == two[key], key
    assert done.output.count("accuracy/logps") == 1 and done.output.count("written to") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "{assets}/none", "--output", "/no/dir/e.json"], ["2 problems", "does not exist", "--output"]),
        (["--adapter", "{assets}/base"], ["has no adapter_config.json", "give it as --model"]),
        (["--model", "{assets}/other", "--adapter", "{assets}/adapter"], ["size mismatch", "does not fit the model"]),
        (["--model", "{assets}/base", "--compare_base"], ["write --compare_base MODEL"]),
        (["--adapter", "{assets}/adapter", "--compare_base", "x"], ["the model it sits on"]),
        (["--model", "{assets}/base", "--chat_template", "{assets}/none"], ["there is no file"]),
        (["--model", "{assets}/base", "--column_map", "prompt"], ["expected OURS=THEIRS"]),
        (["--model", "{assets}/base", "--data", "{assets}/none.jsonl"], ["none.jsonl: not found"]),
        (["--model", "{assets}/base", "--data", "{tmp}/empty.jsonl"], ["no rows", "is empty"]),
        (["--model", "{assets}/base", "--max_length", "2"], ["held-out"]),
        (["--model", "{assets}/base", "--revision", "main"], ["--revision", "is a folder"]),
        (
            ["--model", "{assets}/base", "--metrics", "preference,liklihood"],
            ["did you mean 'likelihood'?"],
        ),
        (["--model", "{assets}/base", "--metrics", "generation", "--probe_data", "x"], ["add likelihood"]),
        (["--model", "{assets}/base", "--max_new_tokens", "100000"], ["100000 behind a prompt", "Write at most"]),
    ],
)
def test_what_cannot_be_evaluated(
    words: list[str],
    expected: list[str],
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    words = [word.format(assets=assets, tmp=tmp_path) for word in words]
    data = [] if "--data" in words else ["--data", assets / "pairs.jsonl"]
    assert run_script("evaluate", *data, *QUICK, *words) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in expected), err
    assert err.count("error:") == 1 and "Traceback" not in err


def test_columns_by_other_names(assets: Path, tmp_path: Path, run_script: Script) -> None:
    rows = [{"question": r["prompt"], "good": r["chosen"], "rejected": r["rejected"]} for r in chat_pairs(4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ("--model", assets / "base", "--data", data, "--num_samples", "0", *QUICK, "--output", tmp_path / "e.json")
    assert run_script("evaluate", *words, "--column_map", "prompt=question", "chosen=good") == 0
    assert read(tmp_path / "e.json")["data"]["held-out"]["rows"] == 4


def test_a_quantised_base(assets: Path, tmp_path: Path, run_script: Script) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = save_adapter(assets / "wide", tmp_path / "adapter")
    words = ("--adapter", adapter, "--data", assets / "pairs.jsonl", "--num_samples", "0", *QUICK)
    for kind in ("none", "nf4"):
        assert run_script("evaluate", *words, "--quantization", kind, "--output", tmp_path / kind) == 0
    exact, quantised = (means(read(tmp_path / kind)["metrics"])["mean_logps/chosen"] for kind in ("none", "nf4"))
    assert exact != quantised and quantised == pytest.approx(exact, abs=0.5)


SPARE = """
from alignkit.parts.evaluation import Evaluation, Found
from alignkit.reports.estimates import row_sums

def compute(trial):
    lengths = [[len(ids) for ids in row] for row in trial.data.rows["completion_ids"]]
    return Found({"spare/tokens": row_sums([(sum(row), len(row)) for row in lengths])}, examples=["spare"])

EVALUATION = Evaluation(
    name="spare_tokens", summary="Mean length.", reads=frozenset({"held-out"}), compute=compute,
    render=lambda prompts, found, base: f"seen: {found.examples[0]}",
    record=lambda prompts, found, base: {"spare": list(found.examples)},
)
"""


def test_an_evaluation_is_one_file(
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that lies among the evaluations is found, made alone or beside others, and shown and kept."""
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "spare_tokens.py").write_text(SPARE)
    monkeypatch.setattr(evals, "__path__", [*evals.__path__, str(tmp_path / "evals")])
    assert "spare_tokens" in evaluation_names() and "preference" in evaluation_names()
    words = ("--model", assets / "base", "--data", assets / "pairs.jsonl", *QUICK, "--output")
    assert run_script("evaluate", *words, tmp_path / "spare", "--metrics", "spare_tokens") == 0
    out, alone = capsys.readouterr().out, read(tmp_path / "spare")
    assert list(alone["metrics"]) == ["spare/tokens"] and alone["spare"] == ["spare"] and "samples" not in alone
    assert "seen: spare" in out and "held-out rows" not in out
    assert run_script("evaluate", *words, tmp_path / "both", "--metrics", "likelihood,spare_tokens") == 0
    both = read(tmp_path / "both")["metrics"]
    assert both["spare/tokens"] == alone["metrics"]["spare/tokens"]
    assert list(both) == ["logps/chosen", "mean_logps/chosen", "logps/rejected", "mean_logps/rejected", "spare/tokens"]
    # A likelihood a token weighs the tokens that were counted.
    tokens = both["mean_logps/chosen"]["count"] + both["mean_logps/rejected"]["count"]
    assert both["spare/tokens"]["mean"] * both["spare/tokens"]["count"] == pytest.approx(tokens)


@pytest.mark.parametrize("name", evaluation_names())
def test_an_evaluation_says_what_it_is(name: str) -> None:
    evaluation = load_evaluation(name)
    assert evaluation.name == name and evaluation.summary.endswith(".")
    known = {"held-out", "probe", "reference", "prompts", "supervised", "answers", "rewards"}
    assert evaluation.reads - OPTIONAL and evaluation.reads <= known


def test_what_is_made_by_default_is_there() -> None:
    assert DEFAULTS["preference"] == ("preference", "likelihood", "generation")
    assert {name for names in DEFAULTS.values() for name in names} <= set(evaluation_names())
