"""The command ``alignkit``: what it prints, what it hands to a program, and how it answers mistakes."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from alignkit import cli
from alignkit.config.keys import base_keys, method_keys
from alignkit.environment import RECORDED, environment, git_state
from alignkit.errors import AlignkitError, ConfigError
from alignkit.parts.data_format import format_names, load_format
from alignkit.parts.method import load_method, method_names
from alignkit.parts.parametrization import load_parametrization, parametrization_names
from alignkit.parts.rule import load_rule, rule_names
from alignkit.programs import doctor

YAML = "model: owner/model\ndata: rows.jsonl\noutput_dir: out\nmethod: flex_dpo\neta: 0.1\n"


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config with its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path / "run.yaml"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launch program that only writes down the words it was started with."""
    path = tmp_path / "program.py"
    path.write_text("import json, pathlib, sys\npathlib.Path('words.json').write_text(json.dumps(sys.argv[1:]))\n")
    monkeypatch.setattr(cli, "program_path", lambda name: path)
    monkeypatch.setattr(sys, "argv", ["alignkit"])
    return path


@pytest.mark.parametrize(
    ("words", "handed_on"),
    [
        (["run.yaml"], ["--config", "run.yaml"]),
        (["run.yaml", "--eta", "0.2", "--streaming"], ["--config", "run.yaml", "--eta", "0.2", "--streaming"]),
        (["run.yaml", "--help"], ["--config", "run.yaml", "--help"]),
        (["--method", "dpo", "--model", "m"], ["--method", "dpo", "--model", "m"]),
    ],
)
def test_train_hands_its_words_to_the_program(
    words: list[str], handed_on: list[str], run_yaml: Path, program: Path
) -> None:
    cli.run(["train", *words])
    assert json.loads(Path("words.json").read_text()) == handed_on


def test_config_prints_values_and_sources(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["config", "run.yaml", "--beta_neg", "0.05"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert rows["eta"] == ["0.1", "run.yaml:5"]
    assert rows["beta_neg"] == ["0.05", "command", "line"]
    assert rows["lora_r"] == ["16", "default"]


def test_config_without_a_file(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["config", "--model", "owner/model", "--data", "rows.jsonl", "--output_dir", "out", "--method", "dpo"])
    assert "command line" in capsys.readouterr().out


def test_config_reports_problems(run_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*beta_neg") as caught:
        cli.run(["config", "run.yaml", "--beta_nge", "0.05", "--lora_r", "0"])
    assert len(caught.value.problems) == 2


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["config", "--schema"])
    schema = json.loads(capsys.readouterr().out)
    assert "beta_neg" in json.dumps(schema)
    assert {"model", "data", "output_dir", "method"} <= set(schema["properties"])


def test_a_missing_recipe_is_answered_with_the_list(run_yaml: Path) -> None:
    with pytest.raises(AlignkitError, match="no/such"):
        cli.run(["train", "no/such"])


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints, as one line."""
    cli.run(list(words))
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", method_names())
def test_everything_of_a_method_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    method, printed = load_method(name), told(capsys, "methods", name)
    assert method.when, "when to take it"
    said = [method.summary, method.paper.url, method.fidelity, method.when]
    said += [f"--{key}" for key in method_keys(name)] + [f"{key}: {meaning}" for key, meaning in method.metrics.items()]
    for text in said:
        assert " ".join(text.split()) in printed


def test_lists_have_everything_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for word, names, load in (
        ("methods", method_names, load_method),
        ("rules", rule_names, load_rule),
        ("parametrizations", parametrization_names, load_parametrization),
        ("formats", format_names, load_format),
    ):
        printed = told(capsys, word)
        for name in names():
            assert f"{name} {' '.join(load(name).summary.split())}" in printed
            assert told(capsys, word, name).startswith(f"{name}: ")
    assert set(base_keys("preference")) <= set(told(capsys, "keys").replace(",", " ").split())


def test_a_mixture_is_told_like_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    printed = told(capsys, "methods", "{dpo: 1, flex_dpo: 0.5}")
    assert "1.0*dpo+0.5*flex_dpo: Adds up 1 x dpo and 0.5 x flex_dpo." in printed
    assert "--beta " in printed and "--beta_pos" in printed


def test_a_key_is_told_wherever_it_is_and_one_of_another_toolkit_translated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Of method dpo:" in told(capsys, "keys", "beta")
    printed = told(capsys, "keys", "learning-rate")
    assert printed.count("--learning_rate") >= 1 and "program preference" in printed
    assert told(capsys, "keys", "loss_type").endswith("Other toolkits have a key of that name, for which write method.")
    assert "Write lora_r" in told(capsys, "keys", "lora_rank")
    assert "Did you mean learning_rate?" in told(capsys, "keys", "laerning_rate")


def test_what_there_is_not_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for words, near in (
        (("methods", "dop"), "dpo"),
        (("rules", "gald"), "glad"),
        (("parametrizations", "lroa"), "lora"),
    ):
        with pytest.raises(AlignkitError, match=f"Did you mean {near}"):
            cli.run(list(words))
    with pytest.raises(AlignkitError, match="no 'sigmoid' among the methods. Write method: dpo"):
        cli.run(["methods", "sigmoid"])
    with pytest.raises(AlignkitError, match="names 'foo', which is no method"):
        cli.run(["methods", "2*sft+foo"])


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(["trian"])
    assert caught.value.code == 2
    assert "train" in capsys.readouterr().err


def dependency(name: str, accepted: str, installed: str | None, *, optional: bool = False) -> doctor.Dependency:
    return doctor.Dependency(name, accepted, installed, "alignkit", optional)


def test_env_says_what_is_outside_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        dependency("trl", "<1.17,>=1.16", "1.15.0"),
        dependency("peft", "<0.22,>=0.21", None),
        dependency("torch", ">=2.11", "2.13.0+cpu"),
        dependency("deepspeed", ">=0.19", None, optional=True),
    ]
    monkeypatch.setattr(doctor, "declared_dependencies", lambda: declared)
    monkeypatch.setattr(doctor, "clashes", lambda roots: [])
    text, fits = doctor.report()
    assert not fits
    assert "trl 1.15.0 is installed; alignkit needs trl<1.17,>=1.16" in text
    assert "peft is not installed; alignkit needs peft<0.22,>=0.21" in text
    assert "pip install 'peft<0.22,>=0.21' 'trl<1.17,>=1.16'" in text
    assert "torch 2.13.0" not in text.partition("problems:")[2]
    assert "deepspeed" not in text.partition("problems:")[2]


def test_env_finds_clashes_between_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers wants a range of tokenizers; a tokenizers outside it is named with who wants what."""
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.1.0" if name == "tokenizers" else "1.0")
    found = doctor.clashes([dependency("transformers", "", metadata.version("transformers"))])
    broken = {d.name: d for d in found}
    assert "tokenizers" in broken
    assert broken["tokenizers"].wanted_by == f"transformers {metadata.version('transformers')}"


def test_the_environment_of_a_run_is_recorded() -> None:
    found = environment()
    assert set(found["versions"]) == set(RECORDED)
    assert found["versions"]["torch"] == metadata.version("torch")
    json.dumps(found)


def test_no_checkout_has_no_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
