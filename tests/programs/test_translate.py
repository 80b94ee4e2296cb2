"""Configurations and commands of TRL, LLaMA-Factory and axolotl, and what each is here."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig

from alignkit import cli
from alignkit.config import foreign_keys, load_config
from alignkit.config.method_value import known_method
from alignkit.errors import AlignkitError
from alignkit.parts.method import load_method
from alignkit.parts.shape import shapes_by_program
from alignkit.programs.show import _all_keys
from alignkit.programs.translate import _BY_VALUE, _NAME, translate, translated
from alignkit.yaml_text import dump_yaml, parse_yaml
from scripts.tutorials import TUTORIALS, prepare

LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "m",
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "pref_beta": 0.2,
    "pref_loss": "sigmoid",
    "pref_ftx": 0.1,
    "dataset": "a.jsonl, b.jsonl",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "output_dir": "o",
    "overwrite_output_dir": True,
    "warmup_ratio": 0.1,
    "learning_rate": 5.0e-6,
}
AXOLOTL: dict[str, Any] = {
    "base_model": "m",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "val_set_size": 0.1,
    "output_dir": "o",
    "adapter": "qlora",
    "lora_model_dir": None,
    "sequence_len": 2048,
    "sample_packing": True,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "train_on_inputs": False,
    "tf32": False,
    "flash_attention": True,
    "saves_per_epoch": 1,
    "loss_watchdog_threshold": 5.0,
}


def test_a_file_of_llama_factory() -> None:
    found = translate(LLAMA_FACTORY)
    assert found.values == {
        "method": "1.0*dpo+0.1*sft",
        "model": "m",
        "parametrization": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": "all-linear",
        "beta": 0.2,
        "data": ["a.jsonl", "b.jsonl"],
        "max_length": 2048,
        "max_rows": 1000,
        "output_dir": "o",
        "overwrite": True,
        "warmup_steps": 0.1,
        "learning_rate": 5.0e-6,
    }
    assert [note.split(":")[0] for note in found.notes] == ["template", "overwrite_cache"]


def test_a_file_of_axolotl() -> None:
    found = translate(AXOLOTL)
    assert found.values == {
        "method": "sft",
        "model": "m",
        "quantization": "nf4",
        "data": "rows.jsonl",
        "eval_fraction": 0.1,
        "output_dir": "o",
        "parametrization": "lora",
        "max_length": 2048,
        "packing": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "optim": "adamw_bnb_8bit",
        "lr_scheduler_type": "cosine",
        "attn_implementation": "flash_attention_2",
        "save_strategy": "epoch",
    }
    assert [note.split(":")[0] for note in found.notes] == ["loss_watchdog_threshold"]


def test_a_command_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model_name_or_path m --dataset_name d --loss_type sigmoid sft --loss_weights 1 0.2 --output_dir o"
    cli.run(["translate", "trl", "dpo", *words.split(), "--use_peft"])
    assert parse_yaml(capsys.readouterr().out) == {
        "method": {"dpo": 1.0, "sft": 0.2},
        "model": "m",
        "data": "d",
        "output_dir": "o",
        "parametrization": "lora",
    }


def test_a_file_named_by_a_command_and_what_the_command_says_besides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs.yaml").write_text(dump_yaml(LLAMA_FACTORY))
    cli.run(["translate", "llamafactory-cli", "train", str(tmp_path / "theirs.yaml"), "--learning_rate", "1e-4"])
    written = capsys.readouterr().out
    assert parse_yaml(written)["learning_rate"] == 1e-4
    assert written.startswith("# left out: template: llama3 (the tokenizer's own chat template is used")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "has 1 weights for 2 losses"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": ["a", "b"]}, "loss_weights: a is no number"),
        ({"rpo_alpha": [1, 2]}, r"rpo_alpha: \[1, 2\] is no number"),
        ({"finetuning_type": "lora", "lora_rank": "many"}, "lora_rank: many is no number"),
    ],
)
def test_values_that_nothing_can_be_made_of_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AlignkitError, match=said):
        translate({"stage": "dpo", "model_name_or_path": "m", **changes})


def test_a_value_of_another_kind_is_left_to_the_check_of_the_config() -> None:
    theirs = {"stage": "grpo", "reward_funcs": [{"name": "x"}], "quantization_bit": [4], "optimizer": ["adamw"]}
    assert "# to do: `quantization:" in translated(theirs)


def test_an_sft_term_that_is_given_twice_is_named() -> None:
    theirs = {"stage": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0], "rpo_alpha": 0.5}
    with pytest.raises(AlignkitError, match="given twice, 1 and 0.5"):
        translate(theirs)


def test_a_loss_keeps_the_beta_that_it_has_there() -> None:
    theirs = {"stage": "dpo", "loss_type": "sigmoid_norm", "model_name_or_path": "m", "dataset_name": "d"}
    assert load_method("sigmoid_norm").options().beta != 0.1
    assert translate(theirs).values["beta"] == 0.1
    assert translate({**theirs, "beta": 2.0}).values["beta"] == 2.0
    assert "beta" not in translate({**theirs, "loss_type": "ipo"}).values


@pytest.mark.parametrize(
    ("theirs", "method", "defaults"),
    [
        ({"loss_type": "simpo"}, f"1.0*simpo+{CPOConfig.cpo_alpha}*sft", CPOConfig),
        ({"rl": "simpo"}, f"1.0*simpo+{CPOConfig.cpo_alpha}*sft", CPOConfig),
        ({"loss_type": "simpo", "cpo_alpha": 0.5}, "1.0*simpo+0.5*sft", CPOConfig),
        ({"loss_type": "simpo", "cpo_alpha": 0}, "simpo", CPOConfig),
        ({"stage": "dpo", "pref_loss": "simpo"}, "simpo", CPOConfig),  # LLaMA-Factory has no such term
        ({"loss_type": "alphapo"}, "alphapo", CPOConfig),
        ({"loss_type": "robust"}, "robust", DPOConfig),
        ({"loss_type": ["robust", "nca_pair"]}, "1.0*robust+1.0*nca_pair", DPOConfig),
        ({"loss_type": "aot_pair"}, "aot_unpaired", DPOConfig),  # sorts log-ratios, chosen against rejected
    ],
)
def test_a_loss_is_the_one_that_ran_there(theirs: dict[str, Any], method: str, defaults: Any) -> None:
    """What nothing is written of has the value that it has in the class of TRL that reads it."""
    values = translate({"base_model": "m", **theirs}).values
    assert values["method"] == method
    options = load_method(method).options
    names = {each.name for each in dataclasses.fields(options)}
    needed = {name: value for name, value in values.items() if name in names}
    found = options(**needed)
    for ours, name in {
        "beta": "beta",
        "gamma": "simpo_gamma",
        "alpha": "alpha",
        "label_smoothing": "label_smoothing",
    }.items():
        if ours in names:
            assert getattr(found, ours) == getattr(defaults, name), ours


@pytest.mark.parametrize(
    ("command", "trains"),
    [
        ("trl sft", {"parametrization": "full"}),
        ("trl sft --use_peft", {"parametrization": "lora"}),
        ("axolotl train", {"parametrization": "full"}),
        ("axolotl train --adapter lora --lora_r 4", {"parametrization": "lora", "lora_r": 4}),
        ("llamafactory-cli train", {"parametrization": "lora", "lora_r": 8, "lora_alpha": 16}),
        ("llamafactory-cli train --lora_rank 4", {"parametrization": "lora", "lora_r": 4, "lora_alpha": 8}),
        ("llamafactory-cli train --lora_alpha 5", {"parametrization": "lora", "lora_r": 8, "lora_alpha": 5}),
        ("llamafactory-cli train --finetuning_type full", {"parametrization": "full"}),
    ],
)
def test_what_trains_there_trains_here(
    command: str, trains: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights in TRL and axolotl unless an adapter is named; in LLaMA-Factory LoRA of rank 8 and twice that."""
    cli.run(["translate", *command.split(), "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"])
    found = parse_yaml(capsys.readouterr().out)
    assert {key: value for key, value in found.items() if key.startswith(("param", "lora"))} == trains


def test_a_margin_given_as_a_share_of_beta_is_multiplied_by_it() -> None:
    theirs = {"base_model": "m", "rl": "simpo", "gamma_beta_ratio": 0.55}
    assert translate({**theirs, "beta": 2.5}).values["gamma"] == pytest.approx(1.375)
    assert translate(theirs).values["gamma"] == pytest.approx(0.055)


def test_no_key_but_stage_and_loss_says_the_method() -> None:
    found = translate({"base_model": "m", "rl": "ipo", "reference_free": True, "do_eval": True})
    assert found.values == {"method": "ipo", "model": "m", "parametrization": "full"}
    assert [note.split(":")[0] for note in found.notes] == ["reference_free", "do_eval"]


def test_what_is_missing_or_cannot_be_used_is_said() -> None:
    text = translated({"stage": "grpo", "model_name_or_path": "m", "dataset_name": "d", "deepspeed": "ds.json"})
    assert "# left out: deepspeed: ds.json belongs to the launcher" in text
    assert "# to do: `rewards` is required and not given" in text
    assert "# to do: `output_dir` is required and not given" in text
    assert "# left out: what is trained, which nothing here says" in translated({"model_name_or_path": "m"})
    with pytest.raises(AlignkitError, match="ppo: alignkit has not this one; method: grpo"):
        translate({"stage": "ppo"})
    with pytest.raises(AlignkitError, match=r"there is no file nowhere.yaml"):
        cli.run(["translate", "nowhere.yaml"])


def test_every_simple_advice_names_a_key() -> None:
    """What the table of other toolkits' keys says in the form of a key is one that some program or method has."""
    known = set(_all_keys())
    for name, advice in foreign_keys.WRITE.items():
        if name not in _BY_VALUE and (match := _NAME.match(advice)) is not None:
            assert match["key"] in known, name


@pytest.mark.parametrize("number", [n for n, one in enumerate(TUTORIALS) if not one.ours])
def test_the_training_commands_of_tutorials_are_translated_whole(number: int, tmp_path: Path) -> None:
    """`make tutorials` trains what comes out; here it is a config that nothing is left to do for."""
    (command,) = prepare(TUTORIALS[number], tmp_path)
    assert command.startswith("alignkit train run.yaml")
    program = next(
        p for p in shapes_by_program() if known_method(p, parse_yaml((tmp_path / "run.yaml").read_text())["method"])
    )
    load_config(program, tmp_path / "run.yaml", shlex.split(command)[3:], check_files=False)
