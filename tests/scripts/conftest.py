"""Tiny models and rows on disk, made once a session, and a way to call a script as its user does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.programs.entry import run_program
from tests.distributed.layouts import LAYOUTS, Layout
from tests.programs.launching import Ended, Launcher
from tests.scripts.tiny import candidate_lists, chat_pairs, save_adapter, save_model, write_rows

Script = Callable[..., int]
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs all tests on two processes, so that they share the launch of tests/distributed."""
    for item in items:
        if item.path.parent == HERE and isinstance(item, pytest.Function) and "on_two_processes" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("distributed"))


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


@pytest.fixture
def on_two_processes(repository: Path, launchers: Callable[[Layout], Launcher]) -> Callable[..., Ended]:
    """Run ``scripts/<name>.py`` with the given words on two processes of ``accelerate launch``."""

    def run(name: str, *words: str | Path) -> Ended:
        program, variables = repository / "scripts" / f"{name}.py", {"ALIGNKIT_CACHE": os.environ["ALIGNKIT_CACHE"]}
        two = launchers(LAYOUTS["ddp 2x2"])
        return two.run(*map(str, words), directory=repository, program=program, environment=variables)

    return run


@pytest.fixture
def launch(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line of Python in a process of its own."""

    def start(*words: str | Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=repository,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return start
