"""What is said about the keys and methods of other toolkits."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from trl import DPOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig

from alignkit.config.foreign_keys import ABSENT, METHODS, SETTLED, WRITE
from alignkit.config.keys import base_keys, method_keys, program_methods
from alignkit.config.load import load_config
from alignkit.config.names import is_launcher_key
from alignkit.errors import ConfigError
from alignkit.parts.shape import shapes_by_program
from alignkit.yaml_text import parse_yaml
from tests.configs.cases import problems_of

KEYS = {name: key for program in shapes_by_program() for name, key in base_keys(program).items()}
OPTIONS = {
    name: key
    for program in shapes_by_program()
    for m in program_methods(program)
    for name, key in method_keys(m).items()
}
ALL_METHODS = [method for program in shapes_by_program() for method in program_methods(program)]

CASES = {
    "val_set_size": (0.1, "Write eval_fraction"),
    "micro_batch_size": (4, "Write per_device_train_batch_size"),
    "rpo_alpha": (1.0, "Write method: {dpo: 1.0, sft: 0.2}"),
    "cutoff_len": (512, "Write max_length"),
    "noisy_embedding_alpha": (5.0, "Write neftune_noise_alpha"),
    "sync_ref_model": (True, "anchor: ema or periodic (method: adpo)"),
    "ref_model_mixup_alpha": (0.6, "anchor_decay, which is 1 minus it"),
    "ref_model_sync_steps": (64, "Write anchor_steps (method: adpo, anchor: periodic)"),
    "packing": (True, "is a key of trainers/sft.py alone"),
    "num-epochs": (3, "Write num_train_epochs"),
    "truncation_mode": ("keep_end", "Remove it: the beginning of a row is kept"),
}


@pytest.fixture(autouse=True)
def _workspace(workspace: Any) -> None:
    """A model and rows, so that nothing else is wrong."""


@pytest.mark.parametrize("name", CASES)
def test_known_keys_are_looked_up(name: str) -> None:
    value, expected = CASES[name]
    (problem,) = problems_of({name: value})
    assert expected in problem and "Did you mean" not in problem


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("slic", "Write method: hinge"),
        ("aot_pair", "Write method: aot_unpaired"),
        ("chunked_nll", "Write method: sft"),
        ("RLOO", "method: grpo learns from completions it draws"),
        ("bco", "method: kto learns from labelled answers"),
        ("rm", "Write method: bradley_terry"),
        ("dpo_", "Did you mean dpo?"),
    ],
)
def test_methods_of_other_toolkits(value: str, expected: str) -> None:
    (problem,) = problems_of({"method": value})
    assert expected in problem and ("Did you mean" in problem) is (value == "dpo_")
    if value != "dpo_":
        (problem,) = problems_of({"loss_type": value})
        assert expected in problem


@pytest.mark.parametrize("name", WRITE)
def test_what_is_to_be_written_exists(name: str) -> None:
    advice = WRITE[name]
    key = re.match(r"\w+", advice)
    if advice.startswith("--config"):
        return
    assert key is not None and key.group() in {**KEYS, **OPTIONS}, advice
    value = re.fullmatch(r"(\w+): ([\w-]+)( .*)?", advice)
    if value is not None and value.group(1) != "data":
        found = {**OPTIONS, **KEYS}[value.group(1)]
        assert found.info.choices is None or parse_yaml(value.group(2)) in found.info.choices, advice
    for method in re.findall(r"method: (\w+)", advice):
        assert method in ALL_METHODS and (method_keys(method).keys() & {key.group()} or key.group() in KEYS), advice


def test_no_key_of_ours_is_called_foreign() -> None:
    for table in (WRITE, ABSENT, SETTLED):
        assert not table.keys() & KEYS.keys() - {"max_prompt_length"}  # of online runs alone
    assert not (WRITE.keys() & ABSENT.keys() | WRITE.keys() & SETTLED.keys() | ABSENT.keys() & SETTLED.keys())
    assert not set(METHODS) & set(ALL_METHODS)
    named = {method for advice in METHODS.values() for method in re.findall(r"method: (\w+)", advice)}
    assert named and named <= set(ALL_METHODS)


@pytest.mark.parametrize(
    "config", [DPOConfig, SFTConfig, RewardConfig, ModelConfig, ScriptArguments], ids=lambda c: c.__name__
)
def test_every_key_of_trl_is_known(config: Any) -> None:
    """Ours, the launcher's, or in the table."""
    names = {field.name for field in dataclasses.fields(config)}
    known = {*KEYS, *OPTIONS, *WRITE, *ABSENT, *SETTLED}
    assert {name for name in names if name not in known and not is_launcher_key(name)} == set()


@pytest.mark.parametrize(("theirs", "said"), [(3, True), (2, False)])
def test_a_file_of_another_toolkit_is_answered_with_translate_first(tmp_path: Path, theirs: int, said: bool) -> None:
    file = tmp_path / "theirs.yaml"
    lines = ["model_name_or_path: m", "finetuning_type: lora", "cutoff_len: 2048"][:theirs]
    file.write_text("\n".join([*lines, "method: dpo", "output_dir: out"]), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("preference", file, check_files=False)
    first = caught.value.problems[0]
    assert ("Make a config of ours of it: alignkit translate " in first and "theirs.yaml > run.yaml" in first) is said
