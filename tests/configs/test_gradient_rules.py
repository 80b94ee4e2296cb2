"""Gradient rules in a config: options beside the other keys, refused early where they cannot work."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest

from alignkit.config.check import flatten
from alignkit.config.foreign_keys import ABSENT, SETTLED, WRITE
from alignkit.config.keys import base_keys, method_keys, program_methods, rule_keys
from alignkit.config.names import is_launcher_key
from alignkit.config.values import check_value
from alignkit.errors import ConfigError
from alignkit.gradients.glad import GLADOptions
from alignkit.gradients.sam import SAMOptions
from alignkit.parts.rule import DisplacedOptions, load_rule, rule_names
from alignkit.parts.shape import shapes_by_program
from alignkit.shapes.candidates import PreferenceConfig
from tests.configs.cases import GOOD, load, load_text, problems_of

pytestmark = pytest.mark.usefixtures("workspace")

RULES = rule_names()


def test_the_rules_of_the_issue_are_there() -> None:
    assert set(RULES) == {
        "glad", "sam", "asam", "gsam", "sagm", "gnp", "random_perturbation", "perpgrad", "l2_sp", "decay_to_init",
    }  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_complete(name: str) -> None:
    rule = load_rule(name)
    assert rule.name == name and rule.summary.endswith(".") and rule.fidelity
    assert (rule.edit is None) != (rule.decay is None)
    assert (rule.displacement is not None) == issubclass(rule.options, DisplacedOptions)
    assert rule.displacement is None or rule.edit is not None
    assert f"{{{rule.paper.title}}}" in rule.paper.citation.replace("{GLAD}", "GLAD").replace("{ASAM}", "ASAM")
    assert rule.paper.arxiv_id in rule.paper.citation
    for key in rule_keys(name).values():
        assert key.info.help.endswith(".") and key.info.source
        assert check_value(key, key.default) == key.default


def test_glad_says_that_it_is_a_reconstruction() -> None:
    rule = load_rule("glad")
    assert rule.fidelity.startswith("reconstruction")
    module = sys.modules["alignkit.gradients.glad"]
    assert "reconstruction" in (module.__doc__ or "") and "Fidelity: reconstruction" in (module.edit.__doc__ or "")


@pytest.mark.parametrize(("program", "name"), list(product(shapes_by_program(), RULES)))
def test_options_collide_with_no_other_key(program: str, name: str) -> None:
    """They stand in the same flat file as the keys of the program and the options of any of its methods."""
    taken = {*base_keys(program), "config", "help", "print_config", "gradient_options"}
    taken |= {key for method in program_methods(program) for key in method_keys(method)}
    assert not taken & set(rule_keys(name))
    assert not [key for key in rule_keys(name) if is_launcher_key(key) or key in {**WRITE, **ABSENT, **SETTLED}]


@pytest.mark.parametrize("name", RULES)
def test_defaults_load_and_are_shown(name: str) -> None:
    loaded = load({"gradient_rule": name})
    assert loaded.config.gradient_options == load_rule(name).options()
    assert set(rule_keys(name)) <= set(loaded.effective())
    for key in rule_keys(name):
        assert f"  {key} " in loaded.render()


def test_glad_is_one_line_and_options_are_read() -> None:
    config = load_text(
        "model: base\ndata: rows.jsonl\nmethod: dpo\noutput_dir: x\ngradient_rule: glad\nrho: 1\nscope: global\n",
        ["--every_k", "4"],
    ).config
    assert config.gradient_options == GLADOptions(rho=1.0, scope="global", every_k=4)
    assert isinstance(config.gradient_options.rho, float)


def test_the_table_of_keys_puts_options_behind_the_rule() -> None:
    titles = [line for line in load({"gradient_rule": "glad"}).render().splitlines() if line and line[0] != " "]
    assert titles[titles.index("Method") :][:4] == ["Method", "Method flex_dpo", "Gradient rule", "Gradient rule glad"]


def test_no_rule_is_the_default() -> None:
    config = load().config
    assert config.gradient_rule is None and config.gradient_options is None
    assert load({"gradient_rule": None}).config.gradient_options is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "negative rho": ({"gradient_rule": "glad", "rho": -0.1}, "`rho: -0.1` is out of range. Write a value >= 0."),
    "rho that is no number": ({"gradient_rule": "sam", "rho": "big"}, "`rho: big` must be a number"),
    "thresholds reversed": (
        {"gradient_rule": "glad", "cosine_low": 0.9},
        "`gradient_rule: glad` cannot take these options: cosine_low: 0.9 is above cosine_up: 0.8.",
    ),
    "threshold beyond a cosine": ({"gradient_rule": "glad", "cosine_up": 1.5}, "out of range"),
    "mix above one": ({"gradient_rule": "gnp", "mix": 1.5}, "Write a value >= 0 and <= 1."),
    "no steps between steps": ({"gradient_rule": "sam", "every_k": 0}, "out of range"),
    "negative coefficient": ({"gradient_rule": "decay_to_init", "decay_coef": -1}, "out of range"),
    "unknown rule": ({"gradient_rule": "gald"}, "Did you mean glad?"),
    "option of a rule without one": (
        {"rho": 0.1},
        "`rho: 0.1` is an option of gradient rules, and there is none; asam, glad,",
    ),
    "option of another rule": (
        {"gradient_rule": "sam", "scope": "global"},
        "is not an option of gradient rule sam; glad has it. Remove it or write gradient_rule: glad",
    ),
    "misspelt option": ({"gradient_rule": "glad", "cosine_hi": 0.9}, "Did you mean cosine_up?"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_bad_values_are_refused(title: str) -> None:
    changes, message = REFUSED[title]
    (problem,) = problems_of(changes)
    assert message in problem


def test_options_of_an_unknown_rule_are_judged_once_it_is_mended() -> None:
    assert len(problems_of({"gradient_rule": "gald", "rho": -1, "scope": 3})) == 1


def test_configs_made_in_python() -> None:
    config = PreferenceConfig(**GOOD, gradient_rule="glad")
    assert config.gradient_options == GLADOptions()
    assert flatten(PreferenceConfig(**GOOD, gradient_rule="sam", gradient_options=SAMOptions(rho=0.3)))["rho"] == 0.3
    with pytest.raises(ConfigError, match="takes GLADOptions, not SAMOptions"):
        PreferenceConfig(**GOOD, gradient_rule="glad", gradient_options=SAMOptions()).validate()
    with pytest.raises(ConfigError, match="takes None, not SAMOptions"):
        PreferenceConfig(**GOOD, gradient_options=SAMOptions()).validate()


def test_rules_are_discovered_and_loaded_without_torch() -> None:
    code = (
        "import sys\nfrom alignkit.parts.rule import load_rule, rule_names\n"
        "[load_rule(name).options() for name in rule_names()]\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
