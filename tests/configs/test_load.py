from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest
import yaml
from trl import DPOConfig as DPOArguments
from trl import SFTConfig as SFTArguments

from alignkit.config import load_config
from alignkit.config.check import flatten
from alignkit.config.keys import base_keys, method_keys
from alignkit.errors import ConfigError
from alignkit.objectives.dpo import DPOOptions
from alignkit.objectives.flex_dpo import FlexDPOOptions
from alignkit.parts.parametrization import parametrizations
from alignkit.runs.arguments import common_arguments
from alignkit.shapes.candidates import PreferenceConfig
from tests.configs.cases import GOOD, SUPERVISED, load, load_text

GOOD_TEXT = """\
# a comment
model: base
data: rows.jsonl

method: flex_dpo
beta_neg: 0.05
output_dir: runs/x
learning_rate: 1e-5
eval_strategy: no
"""


@pytest.mark.usefixtures("workspace")
def test_values_have_the_types_of_their_keys() -> None:
    config = load_text(GOOD_TEXT + "eta: 1\nlora_target_modules: [q_proj, v_proj]\nbf16: true\nmax_rows: null\n").config
    assert config.learning_rate == 1e-5 and isinstance(config.learning_rate, float)
    assert config.method_options == FlexDPOOptions(beta_neg=0.05, eta=1.0)
    assert isinstance(config.method_options.eta, float)
    assert config.eval_strategy == "no"
    assert config.bf16 is True
    assert config.max_rows is None
    assert config.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.usefixtures("workspace")
def test_every_value_has_its_source() -> None:
    loaded = load_text(GOOD_TEXT, ["--seed", "7", "--beta_neg=0.04"])
    assert loaded.sources["model"] == "c.yaml:2"
    assert loaded.sources["method"] == "c.yaml:5"
    assert loaded.sources["learning_rate"] == "c.yaml:8"
    assert loaded.sources["seed"] == loaded.sources["beta_neg"] == "command line"
    assert loaded.sources["beta_pos"] == loaded.sources["bf16"] == "default"
    # Of other parametrisations nothing is said that the config does not say.
    others = {f.name for record in parametrizations() if record.name != "lora" for f in fields(record.options)}
    assert set(loaded.sources) == {*base_keys("preference"), *method_keys("flex_dpo")} - others
    assert loaded.config.method_options.beta_neg == 0.04


@pytest.mark.usefixtures("workspace")
def test_effective_config_is_complete_and_serialisable() -> None:
    effective = load_text(GOOD_TEXT).effective()
    assert json.loads(json.dumps(effective)) == effective
    assert effective["beta_neg"] == {"value": 0.05, "source": "c.yaml:6"}
    assert effective["max_length"] == {"value": 1024, "source": "default"}


@pytest.mark.usefixtures("workspace")
def test_table_shows_every_key_once_with_its_source() -> None:
    loaded = load_text(GOOD_TEXT, ["--eta", "0.1"])
    rows = [line.split() for line in loaded.render().splitlines() if line.startswith("  ")]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=[row[0] for row in rows].index)
    assert {row[0] for row in rows} == set(loaded.sources)
    assert ["beta_neg", "0.05", "c.yaml:6"] in rows
    assert ["eta", "0.1", "command", "line"] in rows
    assert ["bf16", "auto", "default"] in rows


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("method", "parametrization", "expected"),
    [("dpo", "lora", 1e-5), ("dpo", "full", 1e-6), ("sft", "lora", 2e-4), ("sft", "full", 2e-5)],
)
def test_the_default_learning_rate_is_that_of_the_parametrization(
    method: str, parametrization: str, expected: float
) -> None:
    """Full: TRL's own defaults, read here from TRL; LoRA: ten times as much. A file that says nothing learns."""
    theirs = DPOArguments if method == "dpo" else SFTArguments
    (full,) = (field.default for field in fields(theirs) if field.name == "learning_rate")
    assert full * (10 if parametrization == "lora" else 1) == pytest.approx(expected, rel=1e-12)
    changes = {"method": method, "parametrization": parametrization, **(SUPERVISED if method == "sft" else {})}
    loaded = load(changes)
    assert loaded.effective()["learning_rate"] == {"value": pytest.approx(expected), "source": "default"}
    (line,) = [line for line in loaded.render().splitlines() if line.split()[:1] == ["learning_rate"]]
    source = "TRL 1.16" if parametrization == "full" else "10 times full: Schulman et al. 2025"
    assert f"default under parametrization: {parametrization} ({source}" in line
    assert "learning_rate" not in loaded.to_yaml()
    assert replace(loaded.config, learning_rate=3e-4).learning_rate == 3e-4
    arguments = common_arguments(loaded.config)
    assert arguments["learning_rate"] == pytest.approx(expected)


@pytest.mark.usefixtures("workspace")
def test_written_yaml_loads_to_the_same_config() -> None:
    mixture = [{"path": "rows.jsonl", "weight": 2.0}, {"path": "org/rows", "weight": 1.0, "split": "train[:10%]"}]
    changes = {
        "data": mixture,
        "model": "org/name",
        "model_revision": "12e5",
        "eval_fraction": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "learning_rate": 3e-7,
        "lora_modules_to_save": ["embed_tokens"],
        "column_map": {"prompt": "prompt"},
    }
    loaded = load(changes)
    again = load_text(loaded.to_yaml())
    assert again.config == loaded.config
    assert again.config.model_revision == "12e5"
    assert set(yaml.safe_load(loaded.to_yaml())) == {*GOOD, *changes}


@pytest.mark.usefixtures("workspace")
def test_null_on_the_command_line_takes_back_what_the_file_says() -> None:
    text = GOOD_TEXT + "lora_r: 4\nnum_train_epochs: 3\nmax_rows: 5\n"
    overrides = ["--lora_r", "null", "--parametrization", "full", "--num_train_epochs=null", "--max_steps", "5"]
    loaded = load_text(text, [*overrides, "--max_rows", "null"])
    assert loaded.config.lora_r == 16
    assert "lora_r" not in loaded.sources  # not said of a run without adapters
    assert (loaded.config.max_rows, loaded.sources["max_rows"]) == (None, "default")
    assert loaded.config.max_steps == 5


@pytest.mark.usefixtures("workspace")
def test_null_cannot_take_back_a_required_key() -> None:
    with pytest.raises(ConfigError, match="`model` is required"):
        load_text(GOOD_TEXT, ["--model", "null"])


@pytest.mark.usefixtures("workspace")
def test_method_on_the_command_line_changes_the_options() -> None:
    loaded = load_text(GOOD_TEXT, ["--method", "dpo", "--beta", "0.3", "--beta_neg", "null"])
    assert loaded.config.method_options == DPOOptions(beta=0.3)


@pytest.mark.usefixtures("workspace")
def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    monkeypatch.setenv("HOME", str(workspace))
    config = load({"model": "~/base", "output_dir": "~/runs"}).config
    assert (config.model, config.output_dir) == (str(workspace / "base"), str(workspace / "runs"))


@pytest.mark.usefixtures("workspace")
def test_files_are_not_looked_at_when_told_so() -> None:
    overrides = [f"--{key}={value}" for key, value in (GOOD | {"data": "gone.jsonl", "model": "./gone"}).items()]
    assert load_config("preference", None, overrides, check_files=False).config.data == "gone.jsonl"
    with pytest.raises(ConfigError) as caught:
        load_config("preference", None, overrides)
    assert len(caught.value.problems) == 2


@pytest.mark.usefixtures("workspace")
def test_config_made_in_python() -> None:
    config = PreferenceConfig(**GOOD, method_options=FlexDPOOptions(beta_neg=0.05), eval_fraction=0.5)
    config.validate()
    assert flatten(config)["beta_neg"] == 0.05
    assert PreferenceConfig(**GOOD).method_options == FlexDPOOptions()
    assert asdict(PreferenceConfig(**GOOD))["method_options"]["beta_pos"] == 0.1
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.usefixtures("workspace")
def test_validate_reports_everything_wrong_with_a_python_config() -> None:
    config = PreferenceConfig(
        model="./gone",
        data="gone.jsonl",
        output_dir="rows.jsonl",
        method="flex_dpo",
        method_options=FlexDPOOptions(beta_neg=-1, sft_normalization="tokens"),
        parametrization="full",
        lora_r=4,
        bf16=True,
        fp16=True,
        learning_rate="1e-5",  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError) as caught:
        config.validate()
    found = caught.value.problems
    assert all(problem.startswith("PreferenceConfig: `") for problem in found)
    named = {problem.split("`")[1].split(":")[0] for problem in found}
    expected = {"model", "data", "output_dir", "beta_neg", "sft_normalization", "lora_r", "bf16", "learning_rate"}
    assert named == expected and len(found) == len(expected)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("options", [DPOOptions(), {"beta_neg": 0.1}])
def test_validate_refuses_options_of_another_class(options: object) -> None:
    config = PreferenceConfig(**GOOD, method_options=options)
    with pytest.raises(ConfigError, match="takes FlexDPOOptions, not"):
        config.validate()


@pytest.mark.usefixtures("workspace")
def test_validate_names_an_unknown_method() -> None:
    with pytest.raises(ConfigError, match="`method: flexdpo` is not one of adpo, .*, treg. Did you mean flex_dpo?"):
        PreferenceConfig(**GOOD | {"method": "flexdpo"}).validate()


def test_the_command_line_takes_back_what_it_makes_moot_in_the_file(tmp_path: Path) -> None:
    """A recipe with epochs and LoRA, run for three steps in full: what it says of these is left out, and named."""
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d.jsonl\noutput_dir: o\nmethod: dpo\nnum_train_epochs: 3\nlora_r: 8\n")
    words = ["--max_steps", "3", "--parametrization", "full"]
    loaded = load_config("preference", file, words, check_files=False)
    assert (loaded.config.max_steps, loaded.config.num_train_epochs, loaded.config.lora_r) == (3, 1.0, 16)
    assert loaded.sources["num_train_epochs"] == "default"
    rank, epochs = loaded.taken_back
    assert epochs.endswith(":5: `num_train_epochs: 3` has no effect under `max_steps: 3` and is left out")
    assert rank.endswith(":6: `lora_r: 8` has no effect under `parametrization: full` and is left out")
    file.write_text(file.read_text() + "max_steps: 3\n")
    with pytest.raises(ConfigError, match="would be ignored under `max_steps: 3`"):
        load_config("preference", file, check_files=False)


def test_options_of_a_method_that_the_command_line_changes_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    rule = "gradient_rule: glad\nrho: 0.2\n"
    file.write_text("model: m\ndata: d.jsonl\noutput_dir: o\nmethod: flex_dpo\nbeta_neg: 0.05\neta: 0.1\n" + rule)
    words = ["--method", "dpo", "--gradient_rule", "null", "--beta", "0.2"]
    loaded = load_config("preference", file, words, check_files=False)
    assert (loaded.config.method, loaded.config.method_options.beta, loaded.config.gradient_rule) == ("dpo", 0.2, None)
    assert [line.split("`")[1] for line in loaded.taken_back] == ["beta_neg: 0.05", "eta: 0.1", "rho: 0.2"]
    with pytest.raises(ConfigError, match="`eta: 0.1` is not an option of method dpo"):
        load_config("preference", file, [*words, "--eta", "0.1"], check_files=False)
