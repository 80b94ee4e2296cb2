"""Tiny models and rows on disk, made once a session, and a way to call a script as its user does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from alignkit.programs.entry import run_program
from tests.programs.launching import Launcher
from tests.scripts.tiny import candidate_lists, chat_pairs, save_adapter, save_model, write_rows

Script = Callable[..., int]
ACCELERATE = "accelerate.commands.launch"
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs all tests that launch a script, so that they share what is launched."""
    for item in items:
        if item.path.parent == HERE and isinstance(item, pytest.Function) and "launch" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("launched scripts"))


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``base``, ``other`` (another width), ``deep`` (more layers), ``wide``, ``adapter``, and rows.

    On a CPU bitsandbytes runs 4-bit layers only if their width is a multiple of 64: ``wide`` is for that.
    """
    root = tmp_path_factory.mktemp("assets")
    save_model(root / "base")
    save_model(root / "other", hidden=48)
    save_model(root / "deep", layers=3)
    save_model(root / "wide", hidden=64)
    save_adapter(root / "base", root / "adapter")
    write_rows(root / "pairs.jsonl", chat_pairs(11))
    write_rows(root / "lists.jsonl", candidate_lists(7))
    return root


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Run ``scripts/<name>.py`` in this process with the given words; returns its exit status."""

    def run(name: str, *words: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_program(importlib.import_module(f"scripts.{name}").main)
        return int(ended.value.code or 0)

    return run


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Callable[..., Launcher]]:
    """One ``accelerate launch`` for each of its configs, from whose processes scripts are forked."""
    started: dict[tuple[str, ...], Launcher] = {}

    def launcher(words: tuple[str, ...]) -> Launcher:
        if words not in started:
            config = yaml.safe_load(Path(words[words.index("--config_file") + 1]).read_text())
            variables = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
            folder, command = tmp_path_factory.mktemp("launch"), (sys.executable, *words)
            started[words] = Launcher(folder, variables, command, config["num_processes"])
        return started[words]

    yield launcher
    for one in started.values():
        one.close()


@pytest.fixture
def launch(repository: Path, launches: Callable[..., Launcher]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line of Python in processes of its own; those of ``accelerate launch`` share their start."""

    def start(*words: str | Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        texts = tuple(map(str, words))
        if ACCELERATE in texts:
            script = next(i for i, text in enumerate(texts) if text.endswith(".py"))
            variables = {"ALIGNKIT_CACHE": os.environ["ALIGNKIT_CACHE"], **environment}
            program, arguments = repository / texts[script], texts[script + 1 :]
            ended = launches(texts[:script]).run(
                *arguments, directory=repository, program=program, environment=variables
            )
            return subprocess.CompletedProcess(texts, ended.exit_code, ended.output, ended.errors)
        variables = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            [sys.executable, *texts],
            cwd=repository,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return start
