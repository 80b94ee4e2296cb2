"""What ``run.json`` says about versions and sources."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from alignkit.environment import environment, git_state


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "run.yaml").write_text("method: dpo\n")
    (tmp_path / "configs").mkdir()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_users_project_is_recorded_from_any_folder_of_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "configs")
    commit = git(project, "rev-parse", "HEAD")
    assert environment()["working_directory_git"] == {"commit": commit, "changed": []}
    (project / "run.yaml").write_text("method: flex_dpo\n")
    (project / "new.yaml").write_text("")
    assert environment()["working_directory_git"] == {"commit": commit, "changed": [" M run.yaml", "?? new.yaml"]}


def test_no_checkout_and_no_commit_yet(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {"commit": None, "changed": []}


def test_versions_are_those_installed() -> None:
    found = environment()
    assert found["versions"]["trl"] == metadata.version("trl")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_no_torch_is_needed() -> None:
    code = "import sys; from alignkit.environment import environment; environment(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
