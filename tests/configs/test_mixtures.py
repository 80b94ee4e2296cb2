"""How several methods are written as one, what is refused, and that what is written back says the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from alignkit.config import json_schema, load_config
from alignkit.errors import ConfigError
from alignkit.parts.method import load_method
from alignkit.parts.mixture import Component, components_of, text_of
from alignkit.shapes.candidates import PreferenceConfig
from alignkit.yaml_text import parse_yaml
from tests.losses.batches import random_batch

NEEDED = ["--model", "m", "--data", "d.jsonl", "--output_dir", "o"]


def loaded(*words: str, program: str = "preference") -> Any:
    return load_config(program, None, [*NEEDED, *words], check_files=False)


def problem(*words: str, program: str = "preference") -> str:
    with pytest.raises(ConfigError) as error:
        loaded(*words, program=program)
    assert len(error.value.problems) == 1, error.value
    return error.value.problems[0]


def test_a_file_a_command_line_and_python_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d.jsonl\noutput_dir: o\nmethod: {dpo: 1.0, sft: 0.2}\nbeta: 0.3\n")
    configs = [
        load_config("preference", file, check_files=False).config,
        loaded("--method", "{dpo: 1, sft: 0.2}", "--beta", "0.3").config,
        loaded("--method", "dpo + 0.2*sft", "--beta", "0.3").config,
    ]
    given_in_python = {"dpo": 1.0, "sft": 0.2}
    options = load_method("1.0*dpo+0.2*sft").options(beta=0.3)
    configs.append(
        PreferenceConfig(model="m", data="d.jsonl", output_dir="o", method=given_in_python, method_options=options)
    )
    for config in configs:
        assert (config.method, config.method_options.beta) == ("1.0*dpo+0.2*sft", 0.3)
    assert len({type(config.method_options) for config in configs}) == 1


def test_the_config_in_force_loads_to_itself(tmp_path: Path) -> None:
    config = loaded("--method", "{dpo: {weight: 0.7, beta: 0.3}, flex_dpo: 1}", "--beta_pos", "0.2")
    file = tmp_path / "written.yaml"
    file.write_text(config.to_yaml())
    again = load_config("preference", file, check_files=False)
    assert again.effective()["method"]["value"] == "0.7*dpo(beta=0.3)+1.0*flex_dpo"
    assert again.config == config.config
    assert "beta" not in vars(config.config.method_options)
    first, second = config.config.method_options.each()
    assert (first.beta, second.beta_pos, second.beta_neg) == (0.3, 0.2, 0.08)


def test_the_best_of_a_list_is_what_the_supervised_term_is_of() -> None:
    method = load_method("1.0*lipo+0.1*sft")
    assert (method.num_candidates, method.row_family) == (None, None)
    batch = random_batch(method, seed=0, size=3)
    values = {term.name: term.values for term in method.objective(batch, method.options()).terms}
    assert torch.equal(values["sft"], -batch.policy_logps[:, 0])


def test_supervised_methods_are_mixed_in_their_own_program() -> None:
    assert loaded("--method", "{sft: 1}", program="sft").config.method == "sft"
    assert "names 'dpo', which is no method of this program" in problem("--method", "{dpo: 1, sft: 1}", program="sft")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{dop: 1}", "names 'dop', which is no method of this program. Did you mean dpo?"),
        ("{dpo: 1, grpo: 1}", "names 'grpo', which is no method of this program. It is one of `online` runs; here"),
        ("{dpo: 1, sfft: 1}", "names 'sfft', which is no method of this program. Did you mean sft?"),
        ("{dpo: -1}", "gives dpo the weight -1. Write a weight > 0."),
        ("{dpo: 0}", "gives dpo the weight 0"),
        ("{dpo: .inf}", "gives dpo the weight inf"),
        ("{dpo: true}", "gives dpo true as its weight. Write {dpo: 1.0}."),
        ("{dpo: much}", 'gives dpo "much" as its weight'),
        ("{}", "names no method. Write {ipo: 1.0, sft: 0.2}."),
        ("dpo+", "ends with +"),
        ("dpo*2", "cannot be read from"),
        ("1.0*dpo+2.0*dpo", "names dpo twice"),
        ("{dpo: {beto: 1}}", "gives dpo an option 'beto' that it does not have. Its options are"),
        ("{dpo: {beta: x}}", "gives dpo `beta: x`, which must be a number. Write a number."),
        ("{dpo: {beta: -1}}", "which is out of range. Write a value > 0."),
        ("{sft: {eta: 1}, dpo: 1}", "gives sft an option 'eta' that it does not have. It has none."),
        ("{treg: 1, adpo: 1}", "treg and adpo each have rows or references of their own"),
        ("{flex_dpo: {sft_normalization: token}, dpo: 1}", "sft_normalization, which has no effect without eta"),
        ("{treg: 1, d2o: 1}", "d2o has rows of its own, which treg does not train on"),
        ("{kto: 1, sft: 0.1}", "kto has rows of its own, which sft does not train on"),
        ("{kto: 1, dpo: 1, ipo: 1}", "kto has rows of its own, which ipo does not train on"),
        ("{treg: {alpha: 1}, dpo: 1}", "fixes options of treg, which the run reads too"),
    ],
)
def test_what_cannot_be_added_up_is_refused_in_one_line(written: str, said: str) -> None:
    assert said in problem("--method", written)


def test_a_list_of_losses_elsewhere_is_answered_with_the_mixture_it_is() -> None:
    said = problem("--method", "dpo", "--loss_type", "[sigmoid, sft]")
    assert said.endswith("Write method: {dpo: 1.0, sft: 1.0}, with the weights you want.")
    assert "method: {dpo: 1.0, sft: 0.2}" in problem("--method", "dpo", "--rpo_alpha", "0.2")


def test_options_of_its_methods_are_keys_and_their_conditions_hold() -> None:
    words = ("--method", "{flex_dpo: 1, sft: 0.2}", "--sft_normalization", "sequence_sum")
    assert "it belongs to eta, which is off" in problem(*words)
    assert loaded(*words, "--eta", "0.1").config.method_options.eta == 0.1
    assert "`eta: 0.1` is not an option of method 1.0*dpo+0.2*sft" in problem(
        "--method", "{dpo: 1, sft: 0.2}", "--eta", "0.1"
    )


def test_the_schema_takes_mixtures_and_no_unknown_key() -> None:
    validator = Draft202012Validator(json_schema("preference"))
    config = {"model": "m", "data": "d", "output_dir": "o", "method": {"dpo": 1.0, "sft": 0.2}, "beta": 0.1}
    assert validator.is_valid(config)
    assert validator.is_valid(config | {"method": "1.0*dpo+0.2*sft"})
    assert not validator.is_valid(config | {"beat": 0.1})
    assert not validator.is_valid(config | {"method": "dop"})


names = st.sampled_from(["dpo", "flex_dpo", "sft", "treg"])
values = st.one_of(st.integers(-9, 9), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.none())


@given(st.dictionaries(names, st.tuples(st.floats(1e-9, 1e9), st.dictionaries(names, values, max_size=2)), min_size=1))
def test_the_text_of_a_mixture_is_read_back(drawn: dict[str, tuple[float, dict[str, Any]]]) -> None:
    components = tuple(Component(name, weight, options) for name, (weight, options) in drawn.items())
    assert components_of(text_of(components)) == components
    mapping = {name: {"weight": weight, **options} for name, (weight, options) in drawn.items()}
    assert components_of(parse_yaml(json.dumps(mapping))) == components
    assert all(math.isfinite(component.weight) for component in components)
