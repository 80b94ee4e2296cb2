"""Every kind of mistake gives one message that names the key, the place, the value, the reason and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.config import load_config
from alignkit.config.keys import base_keys, method_keys, program_methods
from alignkit.errors import ConfigError
from alignkit.parts.method import load_method, method_names
from alignkit.yaml_text import dump_yaml
from tests.configs.cases import GOOD, SUPERVISED, problems

BASE = "model: base\ndata: rows.jsonl\nmethod: flex_dpo\noutput_dir: runs/x\n"

LINES = {
    "unknown key": ("beta_negg: 0.1", "is not a known key. Did you mean beta_neg?"),
    "unknown key, wrong case": ("Seed: 3", "Did you mean seed?"),
    "unknown key like no other": ("zzzz: 3", "is not a known key. Remove it"),
    "key of TRL": ("model_name_or_path: x", "is not a key of alignkit. Write model."),
    "key of transformers": ("warmup_ratio: 0.1", "Write warmup_steps (a value below 1 is a share of all steps)"),
    "key with dashes": ("learning-rate: 1", "Did you mean learning_rate?"),
    "negated key": ("no_bf16: true", "Write bf16: false (--bf16 false)"),
    "option of another method": ("beta: 0.1", "is not an option of method flex_dpo; adpo, "),
    "nested file": ("training: {learning_rate: 1e-6}", "the file is flat. Write the keys below training"),
    "launcher key": ("num_processes: 2", "belongs to the launcher"),
    "ZeRO stage 2": ("zero_stage: 2", "--config_file configs/accelerate/zero2.yaml trainers/preference.py"),
    "ZeRO stage 3": ("zero_stage: 3", "--config_file configs/accelerate/zero3.yaml trainers/preference.py"),
    "FSDP": ("fsdp_version: 2", "--config_file configs/accelerate/fsdp2.yaml trainers/preference.py"),
    "DeepSpeed file": ("deepspeed: ds.json", "configs/accelerate/zero2.yaml"),
    "mixed precision": ("mixed_precision: bf16", "in this file write bf16: true or fp16: true"),
    "float in quotes": ('learning_rate: "1e-6"', "must be a number or null. Write 1e-6 without quotes"),
    "text for a float": ("learning_rate: fast", "must be a number"),
    "bool for an int": ("seed: true", "must be a whole number"),
    "int for a bool": ("fp16: 1", "must be true or false"),
    "neither bool nor the word": ("resume: newest", "must be true or false or auto. Write true or false or auto."),
    "word for a bool": ("fp16: yes", "must be true or false. Write true."),
    "float for an int": ("seed: 8.0", "must be a whole number. Write 8."),
    "int in quotes": ('seed: "8"', "must be a whole number. Write 8 without quotes"),
    "number for a text": ("model_revision: 1234567", 'put it in quotes: "1234567"'),
    "text for a list": ("lora_modules_to_save: embed_tokens", "Write [embed_tokens]"),
    "number in a list": ("lora_modules_to_save: [a, 3]", "(lora_modules_to_save[1] is 3)"),
    "list for a mapping": ("column_map: [prompt]", "must be a mapping"),
    "mapping for a text": ("hub_model_id: {a: b}", "must be text or null"),
    "no value": ("seed:", "must be a whole number. Give it a value, or remove the key to take the default"),
    "empty text": ('hub_model_id: ""', "is empty. Give it a value, or remove the key"),
    "not finite": ("learning_rate: .inf", "is not a finite number"),
    "not a number": ("weight_decay: .nan", "is not a finite number"),
    "bad choice": ("quantization: fp4", "is not one of none, nf4, int8. Did you mean nf4?"),
    "choice with a former name": ("layout: shared_prefix", "has another name now, packed. Write packed."),
    "bad choice like no other": ("layout: 7up", "is not one of auto, padded, packed. Choose one of these."),
    "wrong case of a choice": ("dtype: BFLOAT16", "Did you mean bfloat16?"),
    "bad choice of the method": ("sft_normalization: tokens", "Did you mean token?"),
    "below": ("learning_rate: 0", "is out of range. Write a value > 0."),
    "above": ("eval_fraction: 1.5", "is out of range. Write a value >= 0 and < 1."),
    "below, option of the method": ("beta_neg: -0.1", "is out of range. Write a value >= 0."),
    "below, whole number": ("lora_r: 0", "is out of range. Write a value >= 1 and <= 65536."),
    "seed too large": ("seed: 4294967296", "Write a value >= 0 and < 4294967296"),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("line", "expected"), LINES.values(), ids=LINES.keys())
def test_bad_line(line: str, expected: str) -> None:
    found = problems(f"{BASE}\n# a comment\n{line}\n")
    assert len(found) == 1
    assert found[0].startswith(f"c.yaml:7: `{line.partition(':')[0]}: ")
    assert expected in found[0]


@pytest.mark.usefixtures("workspace")
def test_the_good_lines_load() -> None:
    assert problems(BASE) == []


@pytest.mark.usefixtures("workspace")
def test_missing_keys_are_named_with_their_meaning() -> None:
    found = problems("seed: 3\n")
    assert [problem.split("`")[1] for problem in found] == ["model", "data", "method", "output_dir"]
    assert all(problem.startswith("c.yaml: ") and "is required and not given. Add it: " in problem for problem in found)
    assert f"One of {', '.join(program_methods('preference'))}" in found[2]


@pytest.mark.usefixtures("workspace")
def test_bad_method_does_not_make_its_options_unknown() -> None:
    found = problems(BASE.replace("flex_dpo", "flexdpo") + "beta_neg: 0.1\nbeta: 0.1\nbeta_neu: 1\n")
    assert len(found) == 2
    assert "Did you mean flex_dpo?" in found[0]
    assert "`beta_neu: 1` is not a known key" in found[1]


@pytest.mark.usefixtures("workspace")
def test_keys_given_twice_are_refused_at_any_depth() -> None:
    found = problems(BASE + "seed: 1\nseed: 2\ncolumn_map: {prompt: prompt,\n  prompt: prompt}\n")
    assert found == [
        "c.yaml:6: `seed` is given twice, first on line 5. Keep one of the two.",
        "c.yaml:8: `prompt` is given twice, first on line 7. Keep one of the two.",
    ]


@pytest.mark.usefixtures("workspace")
def test_all_problems_come_in_one_error_in_the_order_of_the_file() -> None:
    text = "output_dir: runs/x\nmethod: flex_dpo\nnum_processes: 2\nseed: 1.5\nbf16: true\nbta: 1\ndata: gone.jsonl\n"
    found = problems(text, ["--fp16", "--lr", "3", "--dtype=float64"])
    places = [(problem.partition(": `")[0], problem.split("`")[1].partition(":")[0]) for problem in found]
    assert places == [
        ("c.yaml:3", "num_processes"),
        ("c.yaml:4", "seed"),
        ("c.yaml:5", "bf16"),
        ("c.yaml:6", "bta"),
        ("c.yaml:7", "data"),
        ("command line", "lr"),
        ("command line", "dtype"),
        ("c.yaml", "model"),
    ]
    assert "with `fp16: true` (command line)" in found[2]
    with pytest.raises(ConfigError) as caught:
        load_config("preference", "c.yaml", ["--fp16", "--lr", "3", "--dtype=float64"])
    assert str(caught.value).startswith("the configuration c.yaml cannot work: 8 problems\n  1. c.yaml:3: ")


UNREADABLE = {
    "empty": (b"", "c.yaml: the file is empty"),
    "comments only": (b"# nothing\n", "c.yaml: the file is empty"),
    "a list": (b"\n- model: x\n", "c.yaml:2: not `key: value` lines"),
    "a text": (b"model\n", "c.yaml:1: not `key: value` lines"),
    "tab": (b"model: x\ndata:\n\t- a\n", "c.yaml:3: not valid YAML: "),
    "open bracket": (b"model: x\nlora_modules_to_save: [a\n", "c.yaml:3: not valid YAML: "),
    "Python object": (b"model: !!python/name:os.system\n", "c.yaml:1: not valid YAML: "),
    "two documents": (b"model: x\n---\nmodel: y\n", "c.yaml:2: not valid YAML: "),
    "not text": (b"model: \xff\xfe\n", "c.yaml: not UTF-8 text"),
    "control character": (b"model: \x00\n", "c.yaml: not valid YAML: "),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("content", "expected"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_file_that_is_no_mapping(content: bytes, expected: str) -> None:
    Path("c.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config("preference", "c.yaml")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(expected)


@pytest.mark.usefixtures("workspace")
def test_text_keeps_its_form_where_yaml_1_1_would_change_it() -> None:
    found = problems(BASE + "eval_strategy: off\nhub_model_id: 010\nreport_to: 2024-01-01\n")
    assert [problem.split("`")[1] for problem in found] == [
        "eval_strategy: off",
        "hub_model_id: 010",
        "report_to: 2024-01-01",
    ]


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("method", method_names())
def test_a_key_of_a_kind_it_cannot_be_is_one_problem_whatever_is_checked_afterwards(method: str) -> None:
    """No later check may rely on a value that an earlier one found wrong: it is not there any more."""
    good = {**GOOD, **(SUPERVISED if load_method(method).program == "sft" else {"method": method})}
    for key in [*base_keys(load_method(method).program), *method_keys(method)]:
        Path("c.yaml").write_text(dump_yaml({**good, key: [[{"no": {"kind": "of value"}}]]}))
        with pytest.raises(ConfigError) as caught:
            load_config(load_method(method).program, "c.yaml", [])
        assert any(f"`{key}:" in problem for problem in caught.value.problems), key


def test_rows_in_the_place_of_a_config_are_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(ConfigError, match=r"rows, by its name, and no configuration\. Write --data .*pairs\.jsonl"):
        load_config("preference", tmp_path / "pairs.jsonl", check_files=False)


def test_a_metric_with_a_slip_of_the_pen_is_answered_with_the_nearest() -> None:
    words = ["--model", "m", "--data", "d", "--output_dir", "o", "--method", "dpo", "--load_best_model_at_end"]
    words += ["--eval_strategy", "steps", "--eval_fraction", "0.1"]
    with pytest.raises(ConfigError, match=r"Did you mean loss\?"):
        load_config("preference", None, [*words, "--metric_for_best_model", "eval_los"], check_files=False)
