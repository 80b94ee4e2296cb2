"""alignkit evaluate on supervised rows, prompts alone and judged answers, and several models side by side."""

from __future__ import annotations

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignkit import cli
from alignkit.data.novelty import parts_of, similarities
from alignkit.errors import DataError
from alignkit.evals._data import kind_of_rows
from alignkit.evals.calibration import margin_figures, pair_margins, worth
from tests.scripts.conftest import Script
from tests.scripts.test_evaluate import QUICK, check, means, read, token_logps
from tests.scripts.tiny import chat_pairs, save_adapter, write_rows

SIDES = ("chosen", "rejected")
COMPLETIONS = [
    {"prompt": f"{i} + {i}?" + " Say it." * (i % 3), "completion": f" It is {2 * i}." + " Yes." * (i % 4)}
    for i in range(9)
]
TALKS = [
    {"messages": row["prompt"] + row["chosen"] + row["prompt"] + row["rejected"]}
    for row in chat_pairs(5)
]  # fmt: skip


@pytest.fixture(scope="module")
def model(assets: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(assets / "base", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(assets: Path) -> Any:
    return AutoTokenizer.from_pretrained(assets / "base")


def expected_supervised(model: Any, rows: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Loss and accuracy of the tokens behind each prompt, row by row from the logits."""
    nll, hits, tokens = 0.0, 0, 0
    for prompt, whole in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0].double()
        nll -= sum(token_logps(model, prompt, whole))
        hits += sum(int(logits[i - 1].argmax()) == whole[i] for i in range(len(prompt), len(whole)))
        tokens += len(whole) - len(prompt)
    return {"loss": nll / tokens, "perplexity": math.exp(nll / tokens), "token_accuracy": hits / tokens}


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_supervised_rows(
    layout: str, assets: Path, model: Any, tokenizer: Any, tmp_path: Path, run_script: Script
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", COMPLETIONS)
    words = ("--model", assets / "base", "--data", data, "--num_samples", "2", "--layout", layout)
    assert run_script("evaluate", *words, "--output", tmp_path / "e.json", *QUICK) == 0
    result = read(tmp_path / "e.json")
    pairs = [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"] + "<|end|>")["input_ids"])
        for row in COMPLETIONS
    ]
    check(means(result["metrics"]), expected_supervised(model, pairs))
    assert result["kind"] == "supervised" and result["layout"] == layout and len(result["samples"]) == 2
    assert result["samples"][0]["prompt"] == COMPLETIONS[0]["prompt"]
    assert result["metrics"]["loss"]["rows"] == 9 and result["data"]["held-out"]["rows"] == 9


def test_the_loss_is_the_eval_loss_of_training(
    assets: Path, tmp_path: Path, run_script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs with methods sft, dpo and bradley_terry, on the same held-out rows, as their own logs have them."""
    write_rows(tmp_path / "rows.jsonl", COMPLETIONS)
    common = {"model": str(assets / "base"), "max_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 0.01}
    common |= {"eval_strategy": "steps", "eval_steps": 1, "use_cpu": True, "bf16": False}
    common |= {"allow_overlap": True, "report_to": "none"}
    for method, rows in (
        ("sft", tmp_path / "rows.jsonl"),
        ("dpo", assets / "pairs.jsonl"),
        ("bradley_terry", assets / "pairs.jsonl"),
    ):
        run = tmp_path / method
        own = {} if method == "bradley_terry" else {"layout": "padded"}
        config = common | own | {"method": method, "data": str(rows), "eval_data": str(rows), "output_dir": str(run)}
        (tmp_path / f"{method}.yaml").write_text(json.dumps(config))
        monkeypatch.setattr(sys, "argv", ["alignkit", "train", str(tmp_path / f"{method}.yaml")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        loss = [entry["eval_loss"] for entry in logged if "eval_loss" in entry][-1]
        words = ("--adapter", run, "--data", rows, "--layout", "padded", "--output", tmp_path / f"{method}.json")
        metrics = {"sft": ("--metrics", "supervised", "--train_data"), "dpo": ("--metrics", "calibration", "--beta")}
        metrics["bradley_terry"] = ()
        assert run_script("evaluate", *words, *metrics[method], *QUICK) == 0
        result = read(tmp_path / f"{method}.json")
        found = result["metrics"]
        key = {"sft": "loss", "dpo": "calibration/nll", "bradley_terry": "reward/nll"}[method]
        assert found[key]["mean"] == pytest.approx(loss, rel=1e-6)
        if method == "sft":  # The rows it was trained on: nothing is far from them.
            assert result["novelty"]["similarity"] == pytest.approx([1.0] * 9)
        if method == "dpo":
            assert result["options"]["beta"] == 0.1
        assert loss not in (pytest.approx(math.log(2), abs=1e-4), pytest.approx(0, abs=1e-4))


def test_which_tokens_count(assets: Path, model: Any, tokenizer: Any, tmp_path: Path, run_script: Script) -> None:
    """Of a conversation the assistant's turns, as in training, or all of it but its first token."""
    data = write_rows(tmp_path / "talks.jsonl", TALKS)
    words = ("--model", assets / "base", "--data", data, "--metrics", "supervised", *QUICK, "--output")
    assert run_script("evaluate", *words, tmp_path / "turns.json") == 0
    assert run_script("evaluate", *words, tmp_path / "all.json", "--assistant_only_loss", "false") == 0
    turns, whole = (read(tmp_path / f"{name}.json")["metrics"]["loss"] for name in ("turns", "all"))
    nll, tokens, all_tokens = 0.0, 0, 0
    for talk in TALKS:
        render = partial(tokenizer.apply_chat_template, return_dict=False)
        ids = render(talk["messages"])
        logps = [0.0, *token_logps(model, ids[:1], ids)]
        all_tokens += len(ids) - 1
        for turn in (1, 3):
            start = len(render(talk["messages"][:turn], add_generation_prompt=True))
            end = len(render(talk["messages"][: turn + 1]))
            nll, tokens = nll - sum(logps[start:end]), tokens + end - start
    assert (turns["count"], whole["count"]) == (tokens, all_tokens)
    assert turns["mean"] == pytest.approx(nll / tokens, rel=1e-5)


def test_answers_are_judged(assets: Path, model: Any, tokenizer: Any, tmp_path: Path, run_script: Script) -> None:
    """Half of the references are what the model says itself, so that half of its answers are right."""
    prompts = [{"prompt": row["prompt"]} for row in COMPLETIONS[:6]]
    words = ("--model", assets / "base", *QUICK, "--max_new_tokens", "5", "--output")
    asked = ("--data", write_rows(tmp_path / "prompts.jsonl", prompts))
    assert run_script("evaluate", *words, tmp_path / "alone.json", *asked) == 0
    alone = read(tmp_path / "alone.json")
    said = [sample["model"]["text"] for sample in alone["samples"]]
    assert len(said) == 6 and alone["kind"] == "prompts" and alone["layout"] is None
    assert alone["metrics"]["generation/tokens"]["count"] == 6
    rows = [
        {**row, "completion": text + (" " if i % 2 else "!")}
        for i, (row, text) in enumerate(zip(prompts, said, strict=True))
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    asked = ("--data", data, "--metrics", "exact_match", "--reliability", tmp_path / "r.png")
    assert run_script("evaluate", *words, tmp_path / "judged.json", *asked) == 0
    found = read(tmp_path / "judged.json")
    assert [match["right"] for match in found["exact_matches"]] == [bool(i % 2) for i in range(6)]
    metrics = means(found["metrics"])
    assert (
        metrics["exact_match"] == 0.5
        and metrics["exact_match/finished"] == alone["metrics"]["generation/finished"]["mean"]
    )
    for row, match in zip(rows, found["exact_matches"], strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            whole = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0].tolist()
        logps = token_logps(model, ids, whole)
        assert match["confidence"] == pytest.approx(math.exp(sum(logps) / len(logps)), abs=1e-5)
    squares = [(m["confidence"] - m["right"]) ** 2 for m in found["exact_matches"]]
    assert metrics["exact_match/brier"] == pytest.approx(sum(squares) / 6, abs=1e-9)
    assert imread(tmp_path / "r.png", format="png").ndim == 3


def test_final_numbers_of_an_answer_column(
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from alignkit.evals import _trial
    from alignkit.sampling.generation import Answer

    rows = [{"prompt": f"{i}?", "gold": f"so #### {i}"} for i in range(4)]
    texts = ["I say 0", "#### 1.0 or so", "3, no: 2 <<2+2=4>>", "#### 3"]
    ids = [list(AutoTokenizer.from_pretrained(assets / "base")(text)["input_ids"]) for text in texts]
    monkeypatch.setattr(_trial, "generate_answers", lambda *_, **__: [Answer([*each, 1], True) for each in ids])
    words = ("--model", assets / "base", "--data", write_rows(tmp_path / "rows.jsonl", rows), *QUICK)
    words = (*words, "--rows", "prompts", "--answer_column", "gold", "--metrics", "final_answer")
    for number in range(3):
        assert run_script("evaluate", *words, "--num_samples", number) == 0
        out = capsys.readouterr().out
        assert out.count("question ") == number and not out.endswith("\n\n") and "\n\n\n" not in out
    assert run_script("evaluate", *words, "--output", tmp_path / "e.json") == 0
    found = read(tmp_path / "e.json")
    assert [answer["right"] for answer in found["final_answers"]] == [True, True, False, True]
    assert found["metrics"]["final_answer"]["mean"] == 0.75 and found["metrics"]["final_answer/finished"]["mean"] == 1


def test_models_side_by_side(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter, its base, another adapter and the first one merged, in one call and each by itself."""
    other = save_adapter(assets / "base", tmp_path / "prompt", seed=2)
    assert run_script("merge_adapter", "--adapter", assets / "adapter", "--output", tmp_path / "merged") == 0
    rows = ("--data", assets / "pairs.jsonl", "--num_samples", "1", "--metrics", "preference,generation,calibration")
    rows = (*rows, "--beta", "0.1")
    words = (*rows, *QUICK, "--output", tmp_path / "all.json", "--reliability", tmp_path / "all.png")
    compared = ("--compare", other, tmp_path / "merged", "--compare_base")
    assert run_script("evaluate", "--model", assets / "adapter", *words, *compared) == 0
    out, found = capsys.readouterr().out, read(tmp_path / "all.json")
    name = str(other)  # The end of its path is the key of the prompts.
    header = ["metric", "base", name, "merged", "model"]
    assert any(line.split()[:5] == header for line in out.splitlines()) and "model - merged" in out
    assert list(found["samples"][0]) == ["prompt", "model", "base", name, "merged"]
    assert run_script("evaluate", "--model", other, *rows, *QUICK, "--output", tmp_path / "other.json") == 0
    assert found["compared"][name]["metrics"] == read(tmp_path / "other.json")["metrics"]
    for differences, before in (
        (found["compared"][name]["differences"], found["compared"][name]["metrics"]),
        (found["differences"], found["base_metrics"]),
    ):
        for key in ("margin/logps", "calibration/nll", "calibration/brier"):
            expected = found["metrics"][key]["mean"] - before[key]["mean"]
            assert differences[key]["mean"] == pytest.approx(expected, abs=1e-12) and abs(expected) > 1e-4
    assert found["compared_models"]["merged"]["model"] == str(tmp_path / "merged")
    assert found["compared_models"][name]["adapter"]["directory"] == str(other)
    merged = found["compared"]["merged"]["differences"]
    assert found["base_metrics"]["calibration/nll"]["mean"] == pytest.approx(math.log(2), abs=1e-12)
    assert (
        abs(merged["calibration/nll"]["mean"]) < 1e-4 < abs(found["metrics"]["calibration/nll"]["mean"] - math.log(2))
    )
    assert abs(merged["margin/logps"]["mean"]) < 1e-4 and merged["margin/logps"]["standard_error"] < 1e-4
    assert found["differences"]["margin/logps"]["standard_error"] > 1e-2


def test_the_margins_of_an_implicit_reward() -> None:
    """Against the sigmoid and the softplus written out, on a list with a tie and on a pair."""
    rows = [{"scores": [2.0, 1.0, 1.0]}, {"scores": [0.0, 1.0]}]
    logps = [[[-1.0, -2.0], [-4.0], [-0.5]], [[-1.0], [-3.0]]]
    reference = [[[-2.0, -2.0], [-1.0], [-0.5]], [[-3.0], [-3.0]]]
    assert pair_margins(rows, worth(logps, None, None)) == [[1.0, -2.5], [-2.0]]
    margins = pair_margins(rows, worth(logps, reference, 0.5))
    assert margins == [[2.0, 0.5], [-1.0]]
    figures = margin_figures(margins, "m").sums
    flat = [2.0, 0.5, -1.0]
    expected = {
        "accuracy": 2 / 3,
        "margin": 0.5,
        "nll": sum(math.log(1 + math.exp(-m)) for m in flat) / 3,
        "confidence": sum(1 / (1 + math.exp(-abs(m))) for m in flat) / 3,
        "auroc": 0.5,
        "accuracy_at_50": 0.5,
        "brier": sum((1 / (1 + math.exp(-abs(m))) - (m > 0)) ** 2 for m in flat) / 3,
    }
    for key, value in expected.items():
        estimate = figures[f"calibration/{key}"].estimate()
        assert estimate is not None and estimate.mean == pytest.approx(value, abs=1e-12), key
    assert figures["calibration/nll"].estimate().rows == 2  # type: ignore[union-attr]


def save_reward_model(base: Path, directory: Path, seed: int) -> Any:
    """The base with a head of one number, drawn large enough to tell answers apart."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return model


def test_reward_models(assets: Path, tokenizer: Any, tmp_path: Path, run_script: Script) -> None:
    """Against the score of the last token, row by row, and of two models side by side."""
    models = {name: save_reward_model(assets / "base", tmp_path / name, seed) for seed, name in enumerate("ab")}
    words = ("--model", tmp_path / "a", "--data", assets / "pairs.jsonl", "--batch_size", "4", "--use_cpu")
    outputs = ("--output", tmp_path / "e.json", "--reliability", tmp_path / "r.png")
    assert run_script("evaluate", *words, "--compare", tmp_path / "b", *outputs) == 0
    found = read(tmp_path / "e.json")
    expected: dict[str, list[float]] = {"a": [], "b": []}
    for name, model in models.items():
        for row in chat_pairs(11):
            ids = [tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False) for side in SIDES]
            with torch.no_grad():
                better, worse = (float(model(torch.tensor([each])).logits) for each in ids)
            expected[name].append(better - worse)
    for name, metrics in (("a", found["metrics"]), ("b", found["compared"]["b"]["metrics"])):
        margins = expected[name]
        assert metrics["reward/accuracy"]["mean"] == pytest.approx(sum(m > 0 for m in margins) / 11)
        assert metrics["reward/margin"]["mean"] == pytest.approx(sum(margins) / 11, abs=1e-4)
        nll = sum(math.log1p(math.exp(-m)) for m in margins) / 11
        assert metrics["reward/nll"]["mean"] == pytest.approx(nll, abs=1e-4)
    assert set(found["metrics"]) >= {"reward/ece", "reward/aurc"} and (tmp_path / "r.png").stat().st_size > 1000
    assert max(map(abs, expected["a"])) > 0.1 and "samples" not in found


def test_far_and_near_rows(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", COMPLETIONS)
    training = write_rows(tmp_path / "train.jsonl", [{"text": "7 + 7? Say it."}, {"text": "0 + 0?"}])
    words = ("--model", assets / "base", "--data", data, "--metrics", "supervised", *QUICK, "--output")
    assert run_script("evaluate", *words, tmp_path / "e.json", "--train_data", training) == 0
    assert "far from and near to training prompts" in capsys.readouterr().out
    found = read(tmp_path / "e.json")["novelty"]
    nearness = similarities([row["prompt"] for row in COMPLETIONS], ["7 + 7? Say it.", "0 + 0?"])
    assert found["similarity"] == pytest.approx(nearness.tolist()) and found["training_prompts"] == 2
    near = [COMPLETIONS[i] for i in parts_of(nearness)[2]]
    only = ("--model", assets / "base", "--data", write_rows(tmp_path / "near.jsonl", near), *words[4:])
    assert run_script("evaluate", *only, tmp_path / "near.json") == 0
    expected = means(read(tmp_path / "near.json")["metrics"])
    assert means(found["metrics"]["near"])["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_page(assets: Path, tmp_path: Path, run_script: Script) -> None:
    """It holds every figure, the diagram, and what was written as text that is no tag."""
    rows = [{**row, "completion": "<script>alert(1)</script>"} for row in COMPLETIONS[:4]]
    words = ("--model", assets / "base", "--data", write_rows(tmp_path / "rows.jsonl", rows), *QUICK)
    words = (*words, "--metrics", "supervised,exact_match", "--output")
    assert run_script("evaluate", *words, tmp_path / "e.html", "--compare_base", assets / "base") == 0
    page = (tmp_path / "e.html").read_text()
    assert page.count("<table>") == 1 and "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("data:image/png;base64,") == 1 and "http" not in page.replace("http-equiv", "")
    for cell in ("token_accuracy", "exact_match/aurc", "difference", "0.0000 ± 0.000"):
        assert f">{cell}<" in page


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": "a b", "rejected": "a c"}, "preference"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]}, "preference"),
        ({"prompt": "a", "completion": "b"}, "supervised"),
        (TALKS[0], "supervised"),
        ({"text": "a"}, "supervised"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "text": "d"}, "preference"),
        ({"prompt": "a"}, "prompts"),
        ({"prompt": "a", "difficulty": 3}, "prompts"),
    ],
)
def test_the_kind_of_rows(rows: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert kind_of_rows([str(write_rows(tmp_path / "rows.jsonl", [rows, rows]))], {}) == kind


def test_rows_of_no_kind(tmp_path: Path) -> None:
    unclear = str(write_rows(tmp_path / "unclear.jsonl", [{"prompt": "a", "chosen": "b", "rejcted": "c"}]))
    with pytest.raises(DataError, match=r"Did you mean 'rejcted'[\s\S]*--rows prompts"):
        kind_of_rows([unclear], {})
    with pytest.raises(DataError, match="not found"):
        kind_of_rows([str(tmp_path / "none.jsonl")], {})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--metrics", "preference"],
            ["needs held-out, which supervised rows have not", "there are exact_match, final"],
        ),
        (["--model", "{reward}"], ["a reward model is evaluated on preference rows, and these are supervised"]),
        (["--model", "{reward}", "--data", "{pairs}", "--metrics", "generation"], ["needs prompts, which a reward"]),
        (["--compare", "{reward}"], ["/reward is a reward model, and the model is none: compare models of one kind"]),
        (["--model", "{reward}", "--compare_base", "{base}"], ["the base of a reward model gives no rewards"]),
        (["--metrics", "calibration", "--beta", "1", "--data", "{pairs}"], ["write --compare_base MODEL"]),
        (["--beta", "1", "--compare_base", "{base}"], ["--beta: read by none of --metrics; add calibration"]),
        (["--reliability", "{tmp}/r.png"], ["--reliability", "add one of calibration, exact_match, final_answer"]),
        (["--metrics", "final_answer"], ["3 of 3 references have no number", "--answer_column"]),
        (["--metrics", "final_answer", "--answer_column", "gold"], ["no column 'gold'", "Columns present"]),
        (["--answer_column", "gold"], ["--answer_column: read by none of --metrics; add exact_match or final_answer"]),
        (["--rows", "prompts", "--metrics", "final_answer"], ["needs answers", "without --answer_column"]),
        (["--compare", "{tmp}/none", "{base}"], ["--compare", "does not exist"]),
        (["--compare", "{base}", "--compare", "{base}"], ["/base is given twice"]),
        (["--compare", "{tmp}/strange"], ["strange has another tokenizer"]),
        (["--data", "{texts}", "--metrics", "exact_match"], ["rows of text have no prompt"]),
        (["--train_data", "{tmp}/none.jsonl"], ["none.jsonl: not found"]),
        (["--train_data"], ["--train_data: without a value it is that of the run", "does not hold a run"]),
        (["--rows", "prompts", "--train_data", "{tmp}/rows.jsonl"], ["no figure is one of rows"]),
        (["--assistant_only_loss", "true"], ["needs a chat template that marks"]),
        (["--output", "{tmp}/r.png", "--reliability", "{tmp}/r.png"], ["is the file of --output too"]),
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
    rows = [{"prompt": f"{name}?", "completion": "no number"} for name in "abc"]
    places = {"tmp": tmp_path, "base": assets / "base", "pairs": assets / "pairs.jsonl"}
    places["texts"] = write_rows(tmp_path / "texts.jsonl", [{"text": "a"}] * 3)
    if "{reward}" in words:
        save_reward_model(assets / "base", tmp_path / "reward", 0)
        places["reward"] = tmp_path / "reward"
    if "{tmp}/strange" in words:
        shutil.copytree(assets / "base", tmp_path / "strange")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "strange")
        tokenizer.add_tokens(["strange"])
        tokenizer.save_pretrained(tmp_path / "strange")
    words = [word.format(**places) for word in words]
    data = ["--data", write_rows(tmp_path / "rows.jsonl", rows)] if "--data" not in words else []
    model = [] if "--model" in words else ["--model", assets / "base"]
    assert run_script("evaluate", *model, *data, *words, *QUICK) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in expected), err
    assert err.count("error:") == 1 and "Traceback" not in err


def test_the_commands_of_the_page_run(
    assets: Path, repository: Path, tmp_path: Path, run_script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of docs/howto/evaluate.md that one process can run, on files of the names it has there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(assets / "adapter", "runs/first")
    config = {key: {"value": value} for key, value in (("beta", 0.1), ("data", "train.jsonl"), ("method", "dpo"))}
    Path("runs/first/run.json").write_text(json.dumps({"alignkit_run": 1, "config": config}))
    save_adapter(assets / "base", Path("runs/second"), seed=3)
    shutil.copytree(assets / "base", "runs/merged")
    save_reward_model(assets / "base", tmp_path / "runs/reward", 0)
    for name, rows in {
        "heldout.jsonl": chat_pairs(4),
        "train.jsonl": chat_pairs(6),
        "gsm8k.jsonl": [{"question": row["prompt"], "answer": "#### 4"} for row in COMPLETIONS[:3]],
        "questions.jsonl": [{"prompt": row["prompt"], "gold": 4} for row in COMPLETIONS[:3]],
        "prompts.jsonl": [{"prompt": row["prompt"]} for row in COMPLETIONS[:3]],
    }.items():
        write_rows(tmp_path / name, rows)
    page = (repository / "docs" / "howto" / "evaluate.md").read_text()
    commands = [line.split()[2:] for line in page.splitlines() if line.startswith("alignkit evaluate ")]
    assert len(commands) == 10
    for words in commands:
        words += ["--use_cpu", *([] if "--max_new_tokens" in words else ["--max_new_tokens", "2"])]
        words = ["3" if word == "300" else word for word in words]
        assert run_script("evaluate", *words) == 0, words
    assert {"eval.json", "reliability.png", "answers.png"} <= {path.name for path in tmp_path.iterdir()}
