from __future__ import annotations

from typing import Any

import pytest

from alignkit.config import load_config
from alignkit.errors import ConfigError
from tests.configs.cases import GOOD, words

ACCEPTED: list[tuple[list[str], str, Any]] = [
    (["--seed", "7"], "seed", 7),
    (["--seed=7"], "seed", 7),
    (["--max_steps", "-1"], "max_steps", -1),
    (["--learning_rate", "1e-6"], "learning_rate", 1e-6),
    (["--learning_rate=5E-5"], "learning_rate", 5e-5),
    (["--learning_rate", "1"], "learning_rate", 1.0),
    (["--bf16"], "bf16", True),
    (["--bf16", "--seed", "3"], "bf16", True),
    (["--bf16", "false"], "bf16", False),
    (["--disable_dropout=false"], "disable_dropout", False),
    (["--lora_target_modules", "q_proj,v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", "[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
    (["--lora_target_modules", r".*\.q_proj"], "lora_target_modules", r".*\.q_proj"),
    (["--lora_modules_to_save", "embed_tokens"], "lora_modules_to_save", ["embed_tokens"]),
    (["--lora_modules_to_save", "[]"], "lora_modules_to_save", []),
    (["--column_map", "{prompt: prompt}"], "column_map", {"prompt": "prompt"}),
    (["--model_revision", "1234567", "--model=org/name"], "model_revision", "1234567"),
    (["--model_revision=12e5", "--model=org/name"], "model_revision", "12e5"),
    (["--model_revision", "true", "--model=org/name"], "model_revision", "true"),
    (["--model_revision", '"null"', "--model=org/name"], "model_revision", "null"),
    (["--output_dir", "runs/a=b: c"], "output_dir", "runs/a=b: c"),
    (["--output_dir", "@home"], "output_dir", "@home"),
    (["--data", "rows.jsonl,org/rows"], "data", ["rows.jsonl", "org/rows"]),
    (["--data", "[{path: rows.jsonl, split: train}]"], "data", [{"path": "rows.jsonl", "split": "train"}]),
    (["--data", "{path: rows.jsonl}"], "data", {"path": "rows.jsonl"}),
    (["--attn_implementation", "null"], "attn_implementation", None),
    (["--eval_strategy", "no"], "eval_strategy", "no"),
    (["--seed", "1", "--bf16", "--seed=2"], "seed", 2),
    (["--set", "seed=7"], "seed", 7),
    (["--set", "seed=7", "--bf16", "--set=seed=8"], "seed", 8),
    (["--seed", "9", "--set", "output_dir=runs/a=b", "--set", "seed=null"], "seed", 42),
    (["--bf16", "--bf16", "false"], "bf16", False),
    (["--seed", "7", "--seed", "null"], "seed", 42),
    (["--report_to", "wandb,tensorboard", "--report_to", "none"], "report_to", "none"),
    (["--logging_steps", "0.1"], "logging_steps", 0.1),
    (["--init_lora_weights", "true"], "init_lora_weights", True),
    (["--init_lora_weights", "pissa"], "init_lora_weights", "pissa"),
]


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("arguments", "key", "value"), ACCEPTED, ids=[" ".join(case[0]) for case in ACCEPTED])
def test_accepted(arguments: list[str], key: str, value: Any) -> None:
    named = {word.removeprefix("--").partition("=")[0] for word in arguments}
    base = words({key: value for key, value in GOOD.items() if key not in named})
    loaded = load_config("preference", None, [*base, *arguments])
    given = getattr(loaded.config, key)
    assert given == value and type(given) is type(value)


REFUSED: list[tuple[list[str], str]] = [
    (["--seed"], "`--seed` has no value. Write --seed VALUE."),
    (["--seed", "--bf16"], "`--seed` has no value. Write --seed VALUE."),
    (["--no_bf16"], "Write bf16: false (--bf16 false)."),
    (["--no-bf16"], "Write bf16: false (--bf16 false)."),
    (["--lora-r", "3"], "`lora-r: 3` is not a known key. Did you mean lora_r?"),
    (["--lr", "3"], "Write learning_rate."),
    (["--num_processes", "2"], "belongs to the launcher"),
    (["--beta", "0.1"], "is not an option of method flex_dpo; adpo, "),
    (["seed=3"], "`seed=3` is not an option. Write --seed=3."),
    (["--lora_modules_to_save", "a", "b"], "`b` belongs to no option. Write a list as a,b"),
    (["-x"], "`-x` belongs to no option"),
    (["--"], "`--` belongs to no option"),
    (["--seed", "1.5"], "`seed: 1.5` must be a whole number"),
    (["--fp16", "yes"], "`fp16: yes` must be true or false. Write true."),
    (["--fp16="], "must be true or false"),
    (["--learning_rate", "fast"], "must be a number"),
    (["--column_map", "{prompt: question"], "must be a mapping"),
    (["--column_map", "prompt=question"], "must be a mapping"),
    (["--beta_neg", "-1"], "is out of range. Write a value >= 0."),
    (["--hub_model_id", ""], "is empty"),
    (["--seed", "2", "--seed", "1.5"], "`seed: 1.5` must be a whole number"),
    (["--report_to", "wandb,tensorbord"], "`report_to: [wandb, tensorbord]` is not one of none, tensorboard"),
]


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("preference", None, [*words(GOOD), *arguments])
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("command line: `")
    assert expected in caught.value.problems[0]
