from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkit.config import parse_program_arguments
from alignkit.config.keys import base_keys, method_keys, program_methods, rule_keys
from alignkit.errors import ConfigError
from alignkit.parts.rule import rule_names
from tests.configs.cases import GOOD, words

FORBIDDEN = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy", "pyarrow")
CHECK_SECONDS = 3.0


def text_of(values: dict[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in values.items())


def test_config_file_with_overrides(workspace: Path) -> None:
    (workspace / "c.yaml").write_text(text_of(GOOD))
    for given in (["--config", "c.yaml"], ["--config=c.yaml"]):
        loaded = parse_program_arguments("preference", ["--seed", "3", *given, "--bf16"])
        assert (loaded.config.seed, loaded.config.bf16) == (3, True)
        assert loaded.sources["model"] == "c.yaml:1"


@pytest.mark.usefixtures("workspace")
def test_overrides_alone() -> None:
    assert parse_program_arguments("preference", words(GOOD)).sources["model"] == "command line"


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config"], "`--config` has no value"),
        (["--config="], "`--config` has no value"),
        (["--config", "a.yaml", "--config", "b.yaml"], "`--config` is given twice (a.yaml and b.yaml)"),
        (["--config", "gone.yaml"], "gone.yaml: no such file and no shipped recipe"),
        (["c.yaml"], "a config file goes after --config"),
    ],
)
def test_bad_config_argument(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_program_arguments("preference", arguments)
    assert expected in caught.value.problems[0]


@pytest.mark.usefixtures("workspace")
def test_print_config_prints_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_program_arguments("preference", [*words(GOOD), "--print_config"])
    assert ended.value.code == 0
    assert re.search(r"^  model +base +command line$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.usefixtures("workspace")
def test_print_config_does_not_hide_problems() -> None:
    with pytest.raises(ConfigError):
        parse_program_arguments("preference", ["--print_config", "--seed", "3"])


def test_help_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_program_arguments("preference", ["--whatever", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    described = re.findall(r"^  --(\w+) ", printed, re.MULTILINE)
    own = [name for method in program_methods("preference") for name in method_keys(method)]
    own += [name for rule in rule_names() for name in rule_keys(rule)]
    assert sorted(described) == sorted(["config", "print_config", "help", *base_keys("preference"), *own])
    assert "\n  --beta_neg  a number, >= 0\n" in printed
    assert " under lora 1e-05 (10 times full" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 120


def run_python(code: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    root = Path(__file__).resolve().parents[2]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.perf_counter() - start


def test_a_bad_config_is_refused_before_torch_and_in_time(workspace: Path) -> None:
    (workspace / "c.yaml").write_text(text_of(GOOD) + "bta: 1\nquantization: nf4\nparametrization: full\n")
    code = f"""
from alignkit.config import load_config
from alignkit.errors import ConfigError
try:
    load_config("preference", "c.yaml", ["--seed=x"])
except ConfigError as error:
    assert len(error.problems) == 3, error
else:
    raise AssertionError("accepted")
load_config("preference", None, {words(GOOD)!r})
print(sorted({set(FORBIDDEN)!r} & set(sys.modules)))
"""
    done, seconds = run_python(code, workspace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert seconds < CHECK_SECONDS
