"""The card's metadata is what the Hub takes, and its snippet loads what was saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

from alignkit.parts.method import load_method, method_names
from alignkit.reports.card import CardContent, content_of_run, hub_id, loss_equation, render_card
from tests.runs.saved import tiny_adapter, tiny_model, tiny_tokenizer


def config(**changes: Any) -> dict[str, dict[str, Any]]:
    values = {
        "model": "Qwen/Qwen3-0.6B",
        "method": "flex_dpo",
        "data": "org/pairs",
        "parametrization": "lora",
        **changes,
    }
    entries = {key: {"value": value, "source": "run.yaml:3"} for key, value in values.items()}
    defaults = {"beta_pos": 0.1, "beta_neg": 0.08, "eta": 0.0, "seed": 42, "quantization": "none"}
    return {**{key: {"value": value, "source": "default"} for key, value in defaults.items()}, **entries}


SECTIONS: dict[str, Any] = {
    "config": config(),
    "environment": {"versions": {"torch": "2.13.0", "deepspeed": None}},
    "data": {
        "splits": [
            {
                "name": "train",
                "num_rows": 90,
                "num_rows_in": 100,
                "num_truncated_rows": 3,
                "lengths": {"prompt": {"50 %": 12, "max": 40}, "completion": {"50 %": 30, "max": 99}},
            }
        ]
    },
    "results": {"accuracy": 0.7512345, "margin": 1.5},
    "health": [{"name": "degradation", "step": 40, "title": "chosen falls", "evidence": "by 3 nats"}],
}


def content(location: str = "name/my-model", **changes: Any) -> CardContent:
    return content_of_run({**SECTIONS, "config": config(**changes)}, location)


def metadata(card: str, tmp_path: Path) -> dict[str, Any]:
    """The header as the Hub's own client reads it."""
    (tmp_path / "README.md").write_text(card)
    found = metadata_load(tmp_path / "README.md")
    assert ModelCard(card).data.to_dict() == found
    return found


def test_metadata_of_an_adapter_of_a_hub_model(tmp_path: Path) -> None:
    assert metadata(render_card(content()), tmp_path) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["org/pairs"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["alignkit", "trl", "flex_dpo", "lora"],
    }


def test_metadata_of_a_local_base_is_silent_and_the_text_names_it(tmp_path: Path) -> None:
    base = tmp_path / "my-base"
    base.mkdir()
    (tmp_path / "pairs.jsonl").write_text("")
    card = render_card(content(model=str(base), data=[str(tmp_path / "pairs.jsonl"), {"path": "org/b"}]))
    found = metadata(card, tmp_path)
    assert "base_model" not in found and found["datasets"] == ["org/b"]
    assert "A LoRA adapter for the local model `my-base`" in card and "`pairs.jsonl` (local)" in card
    assert "None" not in card and str(tmp_path) not in card


def test_what_the_run_warned_of_is_in_the_introduction() -> None:
    reports = {"train": {"gap": 0.0, "warning": "the reference does not tell"}, "eval": {"gap": 0.1, "warning": None}}
    card = render_card(content_of_run({**SECTIONS, "token_rewards": reports}, "name/my-model"))
    listed = ["- token rewards, train: the reference does not tell", "- chosen falls (degradation, step 40): by 3 nats"]
    assert "The run warned:\n\n" + "\n".join(listed) + "\n" in card


def test_metadata_of_a_full_model(tmp_path: Path) -> None:
    card = render_card(content(parametrization="full"))
    found = metadata(card, tmp_path)
    assert found["library_name"] == "transformers" and "lora" not in found["tags"]
    assert "peft" not in card.lower()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "gpt2"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899", "Qwen/Qwen3-0.6B"),
        ("/models/base", None),
        ("./base", None),
        ("../base", None),
        ("~/base", None),
        ("a/b/c", None),
        ("data/pairs.jsonl", None),
    ],
)
def test_what_counts_as_a_hub_id(name: str, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_an_existing_relative_directory_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/base") == "runs/base"
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert hub_id("runs/base") is None


def test_the_text_tells_method_options_data_results_and_trouble() -> None:
    card = render_card(content())
    paper = load_method("flex_dpo").paper
    assert paper.title in card and paper.url in card and paper.citation in card
    assert f"Fidelity: {load_method('flex_dpo').fidelity}." in card
    shown, folded = card.split("<details>")
    assert "| beta_neg | `0.08` | default |" in shown, "a method's own options are in sight"
    assert '| model | `"Qwen/Qwen3-0.6B"` | run.yaml:3 |' in shown
    assert "| seed | `42` | default |" in folded and "| seed |" not in shown
    assert "| train: rows used, of those read | 90 of 100 |" in card
    assert "| metric | after |" in card and "| accuracy | 0.7512 |" in card
    assert "- chosen falls (degradation, step 40): by 3 nats" in card
    assert "| torch | 2.13.0 |" in card and "deepspeed" not in card
    assert "(plot.png)" in card


def test_nothing_is_said_where_nothing_is_known() -> None:
    card = render_card(content_of_run({"config": config()}, "name/my-model"))
    assert "health monitor" not in card and "## Versions" not in card and "| metric |" not in card


@pytest.mark.parametrize("method", method_names())
def test_the_equation_of_every_method_is_shown(method: str) -> None:
    equation = loss_equation(method)
    head, block = equation.split("\n\n```\n", 1)
    assert head.startswith("Equation (") and head.endswith("):")
    assert "=" in block
    assert "Symbols" not in equation and equation.endswith("\n```")
    assert equation in render_card(content(method=method))


def test_results_before_and_after_stand_side_by_side() -> None:
    results = {"before": {"accuracy": 0.52}, "after": {"accuracy": 0.75, "margin": 1.5}}
    card = render_card(replace(content(), results=results))
    assert "| metric | before | after |" in card
    assert "| accuracy | 0.52 | 0.75 |" in card and "| margin |  | 1.5 |" in card


def test_table_cells_cannot_break_the_table() -> None:
    card = render_card(replace(content(), data={"a|b": "two\nlines"}))
    assert "| a\\|b | two lines |" in card


# --- the snippet, executed ---


def run_snippet(card: str) -> dict[str, Any]:
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "card", "exec"), names)
    return names


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 11)[None]).logits


@pytest.mark.parametrize("parametrization", ["lora", "full"])
@pytest.mark.parametrize("place", [str, lambda path: path.name], ids=["absolute", "relative"])
def test_the_snippet_loads_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parametrization: str, place: Callable[[Path], str]
) -> None:
    base, run = tmp_path / "base", tmp_path / 'a "run"'
    tiny_model().save_pretrained(base)
    model = tiny_model() if parametrization == "lora" else tiny_model(seed=5)
    model = tiny_adapter(model) if parametrization == "lora" else model
    model.save_pretrained(run)
    tiny_tokenizer().save_pretrained(run)
    monkeypatch.chdir(tmp_path)
    card = render_card(content(place(run), model=place(base), parametrization=parametrization))
    loaded = run_snippet(card)
    assert torch.equal(logits(loaded["model"]), logits(model))
    assert not torch.equal(logits(loaded["model"]), logits(tiny_model()))
    assert loaded["tokenizer"]("w3 w4")["input_ids"] == [6, 7]


def test_the_snippet_of_a_published_adapter_names_hub_ids() -> None:
    card = render_card(content(quantization="nf4"))
    assert 'AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")' in card
    assert 'PeftModel.from_pretrained(base, "name/my-model")' in card
    assert "The base was held in nf4 while training" in card


def test_a_gradient_rule_is_named_with_its_provenance() -> None:
    card = render_card(content(gradient_rule="glad", rho=0.3))
    assert "## Gradient rule" in card and "2507.13089" in card
    assert "Fidelity: reconstruction: that the reference is the SAM gradient is published" in card
    assert "peng2025glad" in card and "| rho | `0.3` |" in card
    assert "Gradient rule" not in render_card(content())
