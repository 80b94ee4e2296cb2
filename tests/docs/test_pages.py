"""Everything shown in README, CONTRIBUTING and docs/ is true: it runs, loads, resolves, or is regenerated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from alignkit import cli
from alignkit.config import load_config
from alignkit.config.method_value import known_method
from alignkit.data.negative_schema import detect_prompt_kind, prompt_problems
from alignkit.data.prompts_schema import detect_prompt_rows, prompt_row_problems
from alignkit.data.schema import detect_kind, row_problems
from alignkit.data.supervised_schema import detect_supervised_kind, supervised_row_problems
from alignkit.data.unpaired_schema import LabelledKind, detect_unpaired_kind, labelled_problems
from alignkit.parts.shape import shapes_by_program
from alignkit.programs.translate import _entries, translated
from alignkit.shipped import recipe_names, recipe_path
from alignkit.yaml_text import parse_yaml
from scripts import docs
from tests.docs.pages import REPOSITORY, Block, anchors, blocks, commands, links, pages, sessions

SHELL_BLOCKS = blocks("bash")
PROGRAM_OF_CONFIG = {f"trainers/{program}.py": program for program in shapes_by_program()}
PLAIN_COMMANDS = ("pip install ", "git clone ", "pytest ", "source ", "echo ")


def by_place(block: Block) -> str:
    return block.where


@cache
def makefile_targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text()
    return set(text.partition(".PHONY:")[2].partition("\n")[0].split())


@cache
def help_of(*program: str) -> str:
    command = [sys.executable, *program, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True).stdout


def program_of(text: str) -> str:
    """The program of the method that a config names."""
    method = parse_yaml(text)["method"]
    return next(program for program in shapes_by_program() if known_method(program, method))


def check_config(program: str, recipe: str, overrides: list[str], folder: Path) -> None:
    """The config a command names is accepted; ``run.yaml`` is the file README shows."""
    if recipe == "run.yaml":
        (folder / "run.yaml").write_text(blocks("yaml")[0].text)
        recipe = str(folder / "run.yaml")
    elif not recipe.endswith(".yaml"):
        assert recipe in recipe_names()
    own = {"--help", "--print_config"}
    load_config(program, recipe, [word for word in overrides if word not in own], check_files=False)


def check_command(words: list[str], folder: Path) -> None:
    """One shown command: its program exists and takes these options."""
    if words[0] == "make":
        unknown = {word for word in words[1:] if "=" not in word} - makefile_targets()
        assert not unknown
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(words[2:], folder)
    elif words[0] == "python":
        check_program(words[1], words[2:], folder)
    elif words[0] == "alignkit" and words[1] in ("train", "config") and not words[2].startswith("-"):
        program = program_of(recipe_path(words[2]).read_text()) if words[2] in recipe_names() else "preference"
        check_config(program, words[2], words[3:], folder)
    elif words[:2] == ["alignkit", "translate"]:
        assert ".yaml" in words[2] or "# to do" not in translated(_entries(words[2:]))
    elif words[0] == "alignkit" and words[1] in cli._PROGRAMS:
        check_options(("-m", *words[:2]), words[2:])
    elif words[0] == "alignkit":
        assert words[1] in ("config", "env", "parts", "recipes", *cli._SHOWN)
    else:
        assert f"{' '.join(words)} ".startswith(PLAIN_COMMANDS), "say how to check this command"


def check_launch(words: list[str], folder: Path) -> None:
    """The launcher's own options, each with a value, then the program."""
    while words[0].startswith("--"):
        assert words[0] in ("--config_file", "--num_processes")
        if words[0] == "--config_file":
            assert (REPOSITORY / words[1]).is_file()
        words = words[2:]
    if words[:2] == ["-m", "alignkit"]:
        check_command(words[1:], folder)
    else:
        check_program(words[0], words[1:], folder)


def check_program(program: str, arguments: list[str], folder: Path) -> None:
    """A program of the checkout and its options."""
    assert (REPOSITORY / program).is_file()
    if program in PROGRAM_OF_CONFIG:
        assert arguments[0] == "--config"
        check_config(PROGRAM_OF_CONFIG[program], arguments[1], arguments[2:], folder)
    else:
        check_options((program,), arguments)


def check_options(program: tuple[str, ...], arguments: list[str]) -> None:
    """A program names these options in its help."""
    unknown = [word for word in arguments if word.startswith("--") and word not in help_of(*program)]
    assert not unknown


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=by_place)
def test_shown_commands_exist(block: Block, tmp_path: Path) -> None:
    for command in commands(block):
        for part in command.split("&&"):
            check_command(part.partition(" > ")[0].split(), tmp_path)


@pytest.mark.parametrize("block", [block for block in SHELL_BLOCKS if block.run], ids=by_place)
def test_marked_commands_run(block: Block, tmp_path: Path) -> None:
    shim = tmp_path / "bin" / "alignkit"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m alignkit "$@"\n')
    shim.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(shim.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", sessions(), ids=by_place)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks("yaml"), ids=by_place)
def test_yaml_is_a_valid_config(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(block.text)
    load_config(program_of(block.text), file, check_files=False)


@pytest.mark.parametrize("block", blocks("json"), ids=by_place)
def test_json_is_a_valid_row(block: Block) -> None:
    row = json.loads(block.text)
    if set(row) == {"prompt", "rejected"}:
        assert prompt_problems(row, detect_prompt_kind(list(row), [row], name=block.where)) == []
    elif {"chosen", "completions"} & set(row):
        assert row_problems(row, detect_kind(list(row), [row], name=block.where)) == []
    elif "label" in row:
        kind = detect_unpaired_kind(list(row), [row], name=block.where)
        assert isinstance(kind, LabelledKind) and labelled_problems(row, kind) == []
    elif "prompt" in row and "completion" not in row:
        assert prompt_row_problems(row, detect_prompt_rows(list(row), [row], name=block.where), []) == []
    else:
        assert supervised_row_problems(row, detect_supervised_kind(list(row), [row], name=block.where)) == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_can_be_reached() -> None:
    reached = {(page.parent / link.partition("#")[0]).resolve() for page in pages() for link in links(page)}
    assert not [page.name for page in pages() if page not in reached and page.name != "README.md"]


def test_no_language_is_overlooked() -> None:
    """A block in a language no test reads would be shown unchecked."""
    fences = [
        line for page in pages() for line in page.read_text().splitlines() if line.startswith("```") and line != "```"
    ]
    assert {fence.strip("`") for fence in fences} <= {"bash", "json", "python", "text", "yaml"}


def test_generated_tables_are_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a program it is run on a copy of the checkout by ``tests/extensions``."""
    monkeypatch.setattr(sys, "argv", ["scripts/docs.py", "--check"])
    assert docs.main() == 0, capsys.readouterr().out


def test_the_readme_begins_with_the_two_commands() -> None:
    readme = [block for block in SHELL_BLOCKS if block.where.startswith("README.md")]
    assert readme[0].text.split("\n")[:2] == ["make quickstart", "make test"]


def test_the_row_that_the_readme_shows_is_messages() -> None:
    """As plain text it would pass the chat template of an instruction-tuned model by."""
    (row,) = [json.loads(block.text) for block in blocks("json") if block.where.startswith("README.md")]
    assert detect_kind(list(row), [row], name="README.md").conversational
