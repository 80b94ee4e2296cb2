"""``import alignkit`` is light, ``alignkit --help`` is quick, and the public names are what they say."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import alignkit
from alignkit.parts.method import load_method
from alignkit.parts.rule import load_rule
from tests.docs.pages import blocks

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "matplotlib")
BEST_OF = 3


def run_python(code: str, repository: Path) -> str:
    """Standard output of a fresh interpreter at the root of the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(statement: str, repository: Path) -> list[str]:
    """Heavy packages in ``sys.modules`` after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    return json.loads(run_python(code, repository).splitlines()[-1])


def best_seconds(arguments: list[str], repository: Path) -> float:
    """Shortest wall time of the command over a few runs: the others measure what else the machine was doing."""
    seconds = []
    for _ in range(BEST_OF):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=repository, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize(
    "statement",
    [
        "import alignkit",
        "from alignkit import ConfigError, Method, load_method, method_names\n[load_method(n) for n in method_names()]",
        "from alignkit import PreferenceConfig, load_config",
        "import alignkit.cli",
    ],
)
def test_light_names_import_nothing_heavy(statement: str, repository: Path) -> None:
    assert imported_by(statement, repository) == []


def test_a_loss_imports_torch_alone(repository: Path) -> None:
    assert set(imported_by("from alignkit import dpo_loss", repository)) <= {"torch", "numpy"}


def test_import_takes_less_than_300_ms(repository: Path) -> None:
    assert best_seconds(["-c", "import alignkit"], repository) < 0.3


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["methods"], ["recipes"]]
)
def test_the_command_line_answers_in_half_a_second(arguments: list[str], repository: Path) -> None:
    assert best_seconds(["-m", "alignkit", *arguments], repository) < 0.5


def test_a_name_that_was_public_leads_to_what_it_is_called_now() -> None:
    with pytest.warns(DeprecationWarning, match="alignkit.SFTConfig is called SupervisedConfig now"):
        assert alignkit.SFTConfig is alignkit.SupervisedConfig


@pytest.mark.parametrize("name", [n for n in alignkit.__all__ if n != "__version__"])
def test_every_public_name_exists(name: str) -> None:
    value = getattr(alignkit, name)
    assert value.__name__ == name


def test_the_names_for_type_checkers_are_the_public_names(repository: Path) -> None:
    tree = ast.parse((repository / "alignkit" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {(alias.name, node.module) for node in block.body for alias in node.names}
    assert declared == set(alignkit._MODULE_OF.items())


def imported_from(block: str) -> dict[str, set[str]]:
    """Names that a block of Python imports from alignkit, by module."""
    nodes = [node for node in ast.walk(ast.parse(block)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    found: dict[str, set[str]] = {}
    for node in nodes:
        for alias in node.names:
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            names = found.setdefault(module, set())
            if isinstance(node, ast.ImportFrom):
                names.add(alias.name)
    return {module: names for module, names in found.items() if module.partition(".")[0] == "alignkit"}


STAND_IN = "alignkit.data.synthetic"
"""Makes what a reader has already: a model, a tokenizer and rows."""


def test_what_the_pages_import_is_promised() -> None:
    """A reader copies it: a name that is not public may be another one in the next version."""
    shown = {block.where: imported_from(block.text) for block in blocks("python")}
    assert sum(len(names) for modules in shown.values() for names in modules.values()) >= 6
    for where, modules in shown.items():
        assert set(modules) - {STAND_IN} <= {"alignkit"}, where
        assert modules.get("alignkit", set()) <= set(alignkit.__all__), where


def test_an_import_past_the_public_names_is_seen() -> None:
    assert imported_from("from alignkit.objectives.dpo import DPOOptions") == {
        "alignkit.objectives.dpo": {"DPOOptions"}
    }
    assert imported_from("import torch\nfrom alignkit import dpo_loss\n") == {"alignkit": {"dpo_loss"}}


SHIPPED_METHODS = ("adpo", "d2o", "dpo", "flex_dpo", "sft", "treg")
SHIPPED_RULES = (
    "asam", "decay_to_init", "glad", "gnp", "gsam", "l2_sp", "perpgrad", "random_perturbation", "sagm", "sam",
)  # fmt: skip
"""Listed, since what a user adds as a file is no name of ``alignkit``."""


@pytest.mark.parametrize("name", SHIPPED_METHODS)
def test_a_shipped_method_is_public(name: str) -> None:
    """Its loss for those who bring their own trainer, its options for a configuration in Python."""
    assert {f"{name}_loss", load_method(name).options.__name__} <= set(alignkit.__all__)


@pytest.mark.parametrize("name", SHIPPED_RULES)
def test_the_options_of_a_shipped_rule_are_public(name: str) -> None:
    assert load_rule(name).options.__name__ in alignkit.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'grpo_los'"):
        _ = alignkit.grpo_los


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO])
def test_notices_of_bitsandbytes_are_not_logged_by_a_first_use(
    level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A level that a user has set stays in force, and afterwards all is as it was."""
    notices, told = logging.getLogger("bitsandbytes"), logging.getLogger("bitsandbytes.backends")
    before = notices.level
    notices.setLevel(level)

    def imported(module: str) -> object:
        told.warning("meanwhile")
        return SimpleNamespace(load_method="what it holds")

    monkeypatch.delitem(vars(alignkit), "load_method", raising=False)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(alignkit.importlib, "import_module", imported)
            assert alignkit.load_method == "what it holds"
        told.warning("afterwards")
        assert notices.level == level
    finally:
        notices.setLevel(before)
        del alignkit.load_method
    assert caplog.messages == (["afterwards"] if level == logging.NOTSET else ["meanwhile", "afterwards"])
